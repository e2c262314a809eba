"""A recording answers as the network does, whatever the batch; what cannot be recorded is refused, and the row says so.

There is no GPU here: a recording is pretended by running the network again where CUDA would launch its kernels.
"""

import copy
import pickle
import re
from typing import ClassVar
from unittest import mock

import pytest
import torch
from torch import nn

from bench import cuda_graphs, numerics, replay
from bench.cuda_graphs import SIZES, CudaGraphs, Recorded, batches
from bench.measure import search
from bench.measure.attacked import attack_served
from bench.measure.pipeline import Pipeline
from bench.measure.search import WORTH, in_numbers, without_engine
from tests import test_numerics as networks
from tests.pretend import GPU, pretended_gpu
from tests.test_engine import tasks  # noqa: F401  # a fixture
from tests.test_numerics import IMAGES, Network, with_statistics
from tests.test_runner import grid

SMALL = (4, 8)


class Pretended:
    """Records by keeping the network, and counts what is replayed."""

    replayed: ClassVar[list[int]] = []

    def __call__(self, network, x):
        logits = network(x)

        def replay():
            self.replayed.append(len(x))
            with torch.no_grad():
                logits.copy_(network(x))

        return logits, replay


class Stale(Pretended):
    """Whose replays leave everything as it is."""

    def __call__(self, network, x):
        return network(x), lambda: None


class Failing(Pretended):
    def __call__(self, network, x):
        if len(x) > 4:
            raise torch.OutOfMemoryError("there is no memory")
        return super().__call__(network, x)


PRETENDED = CudaGraphs(Pretended)


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "SIZES", SMALL)
    monkeypatch.setattr(Pretended, "replayed", [])
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("count", "cut"),
    [(0, [0]), (1, [1]), (16, [16]), (17, [17]), (65, [64, 1]), (179, [64, 64, 51]), (180, [180]), (300, [256, 44]),
     (700, [256, 256, 188]), (1000, [1000]), (1025, [1024, 1]), (4096, [1024] * 4)],
)  # fmt: skip
def test_a_batch_is_cut_into_graphs_that_are_full_or_cheap(count, cut):
    assert batches(count, SIZES) == cut
    assert sum(batches(count, (16,))) == count


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9, 21])
def test_any_batch_has_its_own_answers_and_keeps_them(count):
    network = with_statistics(Network())
    recorded = PRETENDED(network, IMAGES)
    x = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(count))
    with torch.no_grad():
        expected = network(x)
        first = recorded(x)
        recorded(1 - x)
        torch.testing.assert_close(first, expected)
        torch.testing.assert_close(recorded(x), expected)
        assert recorded(x[:, :, :8]).shape == (count, 2)  # images of another size


def test_a_recording_takes_part_where_it_agrees():
    converted = numerics.fast(with_statistics(Network()), IMAGES, engine=PRETENDED)
    assert converted.facts["engine"] == "CUDA graphs"
    Pretended.replayed.clear()
    converted.module(IMAGES)
    assert Pretended.replayed == [8, 4]
    assert converted.module(IMAGES.clone().requires_grad_(True)).requires_grad
    assert Pretended.replayed == [8, 4]


class DependsOnTheBatch(Network):
    def forward(self, x):
        return super().forward(x - x.mean(dim=0))


class Chooses(Network):
    def forward(self, x):
        return super().forward(x)[torch.ones(len(x), dtype=torch.bool)]


@pytest.mark.parametrize(
    ("build", "recorder", "why"),
    [(Network, Stale, "a recording of 8 images answers otherwise by"),
     (Network, Failing, "CUDA graphs fails (OutOfMemoryError: there is no memory)"),
     (DependsOnTheBatch, Pretended, "CUDA graphs changes its logits by"),
     (networks.BranchesOnValues, Pretended, "its Python depends on values (aten._local_scalar_dense.default)"),
     (Chooses, Pretended, "its Python depends on values (aten.index.Tensor)")],
)  # fmt: skip
def test_what_cannot_be_recorded_is_torchs_own_and_says_why(build, recorder, why):
    network = with_statistics(build())
    converted = numerics.fast(network, IMAGES, engine=CudaGraphs(recorder))
    assert converted.engine.startswith("torch: ")
    assert why in converted.engine
    torch.testing.assert_close(converted.module(IMAGES), network(IMAGES))


def test_what_goes_from_one_device_to_another_is_refused():
    with cuda_graphs._Watch(), pytest.raises(cuda_graphs.ConfigError, match="from one device to another"):
        torch.zeros(()).to("meta")
    with cuda_graphs._Watch():
        torch.zeros(3, device="meta") * torch.tensor(2.0)
        torch.zeros(3)[torch.tensor([0, 1])]


def test_a_copy_shares_its_recordings_and_another_process_makes_its_own():
    recorded = PRETENDED(with_statistics(Network()), IMAGES)
    assert copy.deepcopy(recorded) is recorded
    there = pickle.loads(pickle.dumps(recorded))
    assert isinstance(there, Recorded)
    assert not there._graphs
    torch.testing.assert_close(there(IMAGES), recorded(IMAGES))
    assert sorted(there._graphs) == [4, 8]


def test_a_gpu_is_warmed_up_aside_and_records_into_one_pool(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(cuda_graphs, "aside", lambda call, device: seen.append("aside") or call())
    monkeypatch.setattr(cuda_graphs, "record", lambda call, device, pool: seen.append(pool) or call() or "play")
    network = with_statistics(Network())
    logits, play = cuda_graphs.Cuda()(network, IMAGES)
    assert seen == ["aside"] * cuda_graphs.WARM_UP + ["pool"]
    assert play == "play"
    torch.testing.assert_close(logits, network(IMAGES))


def test_a_recording_that_fails_leaves_the_generator_free(monkeypatch):
    generator = mock.Mock()
    for name in ("CUDAGraph", "device", "graph"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    torch.cuda.graph.return_value.__exit__.side_effect = RuntimeError("operation not permitted")
    with pytest.raises(RuntimeError, match="not permitted"):
        replay.record(lambda: None, GPU)
    generator.graphsafe_set_state.assert_called_once_with(generator.clone_state.return_value)


def test_large_images_have_smaller_graphs(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "VALUES", 5 * 3 * 9 * 9)
    assert list(PRETENDED(with_statistics(Network()), IMAGES)._graphs) == [4]


def test_weights_that_are_cast_once_give_what_casting_them_each_time_gives():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5)).eval()
    module(IMAGES)
    eager = numerics.InBfloat16(numerics.plain(with_statistics(module)))
    settled = numerics._settled(eager)
    with torch.no_grad():
        assert torch.equal(settled(IMAGES), eager(IMAGES))
    kinds = [parameter.dtype for parameter in settled.parameters()]
    assert kinds == [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.bfloat16] * 2
    assert all(parameter.dtype == torch.float32 for parameter in eager.parameters())


@pytest.mark.parametrize(
    ("settings", "why"),
    [({}, ""), ({"defense": ["rnd"]}, ""), ({"defense": ["unig"]}, "may look into the network"),
     ({"attack": ["pgd"]}, "gradients"), ({"queries": WORTH // 100 - 1}, "too few queries")],
)  # fmt: skip
def test_who_is_recorded_on_a_gpu(settings, why):
    (task,) = grid(**{"attack": ["square"], "queries": WORTH // 100} | settings)
    assert re.search(why or "^$", without_engine(task, GPU))


@pytest.fixture
def recording(monkeypatch):
    """A pretended GPU that can record."""
    monkeypatch.setattr(search, "CudaGraphs", lambda: PRETENDED)
    monkeypatch.setattr(search, "WORTH", 1)


def test_on_the_device_a_recording_answers_in_bf16_and_waits_for_nobody(recording):
    (task,) = grid(attack=["square"], n=20)
    with pretended_gpu() as gpu:
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)
        converted = in_numbers(task, with_statistics(nn.Sequential(*layers)).to(GPU), "fast", GPU)
        x = task.data.test.pixels()[:5].to(GPU)
        gpu.waits.clear()
        logits = converted.module(x)
        assert not gpu.waits
        assert logits.is_cuda
    assert converted.facts["engine"] == "CUDA graphs"
    assert converted.used == "bfloat16, channels last, 1 batch-norms folded"
    assert converted.difference > 0


@pytest.mark.parametrize(
    "defense", ["aaa-linear", *(pytest.param(one, marks=pytest.mark.slow) for one in ("none", "rnd(sigma=0.1)"))]
)
def test_rows_are_the_same_with_and_without(defense, tasks, tmp_path, recording, monkeypatch):  # noqa: F811
    (task,) = tasks(defense=[defense], n=20, queries=10)

    def row():
        with pretended_gpu(), Pipeline(tmp_path, GPU, 256).serving(task) as target:
            return attack_served(task, target, list(task.cell.ids), GPU), target.numbers

    recorded, told = row()
    assert Pretended.replayed
    monkeypatch.setattr(search, "WORTH", 10**9)
    eager, plain = row()
    assert (told["engine"], plain["engine"]) == ("CUDA graphs", "torch: too few queries")
    assert (recorded["first_hit"] > 0).any()
    for column in ("first_hit", "forwards", "final_pred", "unconfirmed"):
        assert recorded[column].equals(eager[column])
