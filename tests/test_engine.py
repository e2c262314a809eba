"""Another library answers for a network where it agrees with torch, and a hit of its is one of plain float32."""

import copy
import pickle
import re
import sys
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from bench import engine, numerics
from bench.errors import RefereeError
from bench.measure import search
from bench.measure.attacked import attack_served
from bench.measure.pipeline import Pipeline
from bench.measure.search import WORTH, mode_of, without_engine
from bench.registry import defenses
from tests import test_numerics as networks
from tests.test_numerics import IMAGES, Network, with_statistics
from tests.test_runner import grid

CPU = torch.device("cpu")
INSTALLED = engine.installed()
needs_openvino = pytest.mark.skipif(INSTALLED is None, reason="openvino is not installed")


NETWORK = """
import torch
from torch import nn
from sklearn.datasets import load_digits


def nearest(classes, shape, model_dir):
    "Calls a digit what the mean of whose images is the nearest."
    images, labels = load_digits(return_X_y=True)
    means = torch.stack([torch.tensor(images[labels == k] / 16).float().mean(0) for k in range(classes)])
    convolution, norm = nn.Conv2d(1, classes, 8), nn.BatchNorm2d(classes)
    convolution.weight.data = means.view(classes, 1, 8, 8)
    convolution.bias.data = -means.square().sum(1) / 2
    return nn.Sequential(convolution, norm, nn.Flatten()).eval()
"""


@dataclass
class Pretended:
    """An engine that is torch itself, its logits a little off, and counts what it is asked."""

    off: float = 0.0
    fails: bool = False
    name: str = "Pretended 1.0"
    batches: list[int] = field(default_factory=list)

    def __call__(self, network, images):
        if self.fails:
            raise NotImplementedError("no convolutions here")

        def answer(x):
            self.batches.append(len(x))
            with torch.no_grad():
                return network(x) * (1 + self.off)

        return answer


@pytest.fixture
def pretended(monkeypatch):
    """The engine that is installed."""
    found = Pretended()
    monkeypatch.setattr(engine, "installed", lambda: found)
    monkeypatch.setattr(search, "WORTH", 1)
    return found


@pytest.fixture
def tasks(tmp_path):
    """Cells of a network that nobody has to train."""
    (tmp_path / "mine.py").write_text(NETWORK)

    def make(**settings):
        return grid(model=[f"{tmp_path / 'mine.py'}:nearest"], **{"attack": ["square"]} | settings)

    return make


def test_an_engine_that_agrees_answers():
    found = Pretended(off=1e-6)
    converted = numerics.fast(with_statistics(Network()), IMAGES, engine=found)
    assert found.batches == [len(IMAGES), 1, len(IMAGES), len(IMAGES)]
    assert converted.facts["engine"] == "Pretended 1.0"
    assert converted.facts["used"] == "float32, channels last, 2 batch-norms folded"
    assert 0 < converted.difference < 1e-5
    converted.module(IMAGES)
    assert len(found.batches) == 5


@pytest.mark.parametrize(
    ("found", "why"),
    [(Pretended(off=1e-3), r"Pretended 1.0 changes its logits by [\d.e-]+"),
     (Pretended(off=float("nan")), "Pretended 1.0 changes its logits by nan"),
     (Pretended(fails=True), r"Pretended 1.0 fails \(NotImplementedError: no convolutions here\)")],
)  # fmt: skip
def test_an_engine_that_does_not_is_left_alone_and_the_row_says_why(found, why):
    network = with_statistics(Network())
    converted, own = numerics.fast(network, IMAGES, engine=found), numerics.fast(network, IMAGES)
    assert re.fullmatch(f"torch: {why}", converted.engine)
    assert torch.equal(converted.module(IMAGES), own.module(IMAGES))
    assert converted.used == own.used


def test_gradients_are_torchs():
    found, network = Pretended(), with_statistics(Network())
    module = numerics.fast(network, IMAGES, engine=found).module
    found.batches.clear()
    x = IMAGES.clone().requires_grad_(True)
    (ours,) = torch.autograd.grad(module(x).sum(), x)
    (plain,) = torch.autograd.grad(network(x).sum(), x)
    torch.testing.assert_close(ours, plain)
    assert not found.batches


def test_a_network_that_draws_has_no_engine():
    converted = numerics.fast(with_statistics(networks.RandomInTorch()), IMAGES, engine=Pretended())
    assert converted.engine == "torch"
    assert "its answers to one question differ" in converted.reason


@pytest.mark.parametrize(
    ("settings", "why"),
    [({}, ""), ({"defense": ["rnd"]}, ""), ({"defense": ["aaa-linear"]}, ""),
     ({"defense": ["unig"]}, "may look into the network"), ({"defense": ["dent"]}, "may look into the network"),
     ({"defense": ["blacklight"]}, "could not be confirmed"), ({"attack": ["pgd"]}, "gradients"),
     ({"queries": WORTH // 100 - 1}, "too few queries")],
)  # fmt: skip
def test_who_gets_an_engine(settings, why, pretended, monkeypatch):
    monkeypatch.setattr(search, "WORTH", WORTH)
    (task,) = grid(**{"attack": ["square"], "queries": WORTH // 100} | settings)
    assert re.search(why or "^$", without_engine(task, CPU))


def test_without_the_library_the_row_says_so(monkeypatch):
    monkeypatch.setattr(engine, "installed", lambda: None)
    (task,) = grid(attack=["square"], queries=WORTH // 100)
    assert without_engine(task, CPU) == "openvino is not installed"


@pytest.mark.parametrize(
    ("defense", "mode"), [("none", "fast"), ("rnd", "fast"), ("blacklight", "plain"), ("dent(variant=online)", "plain")]
)
def test_on_a_gpu_hits_that_cannot_be_confirmed_are_searched_in_plain_numbers(defense, mode):
    (task,) = grid(attack=["square"], defense=[defense])
    assert mode_of(task, torch.device("cuda")) == mode
    assert mode_of(task, torch.device("cpu")) == "fast"


def attacked(task, folder):
    """Records, and what a row would remember of the numbers."""
    pipeline = Pipeline(folder, torch.device("cpu"), 256)
    with pipeline.serving(task) as target:
        return attack_served(task, target, list(task.cell.ids), torch.device("cpu")), target.numbers


@pytest.mark.parametrize("defense", ["none", "rnd(sigma=0.1)", "aaa-linear"])
def test_rows_are_the_same_with_and_without(defense, tasks, tmp_path, pretended, monkeypatch):
    (task,) = tasks(defense=[defense], n=40)
    row, told = attacked(task, tmp_path)
    assert sum(pretended.batches) > 500
    monkeypatch.setattr(engine, "installed", lambda: None)
    own, plain = attacked(task, tmp_path)
    assert (row["first_hit"] > 0).any()
    for column in ("first_hit", "forwards", "final_pred", "unconfirmed"):
        assert row[column].equals(own[column])
    assert (told["engine"], told["hits"]) == ("Pretended 1.0", "confirmed in float32")
    assert plain["engine"] == "torch: openvino is not installed"
    assert "hits" not in plain


def test_a_hit_of_an_engine_is_one_of_plain_float32(tasks, tmp_path, pretended, monkeypatch):
    """An engine that errs far more than any that is let through."""
    monkeypatch.setattr(numerics, "ENGINE", 10.0)
    monkeypatch.setattr(Pretended, "__call__", lambda self, network, images: lambda x: network(x).roll(1, 1))
    (task,) = tasks(n=40, queries=20)
    records, _ = attacked(task, tmp_path)
    fallen = records["first_hit"].between(1, 20)
    assert (records["unconfirmed"] > 0).any()
    assert (records["final_pred"] != records["y"])[fallen].all()


DEFENSE = """
from torch import nn

from bench.registry import defenses


class Halved(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) / 2


class Halves:
    stage, random, outside, version, paper = "output", False, True, 1, ""

    def __call__(self, model, calibration, seed):
        return Halved(model).eval()
"""


@needs_openvino
@pytest.mark.slow
def test_openvino_answers_for_a_defense_in_a_process_of_its_own(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "WORTH", 1)
    (tmp_path / "halves.py").write_text(DEFENSE)
    (task,) = tasks(defense=[f"{tmp_path / 'halves.py'}:Halves"], n=20, queries=20)
    records, told = attacked(task, tmp_path)
    assert told["engine"] == INSTALLED.name
    monkeypatch.setattr(engine, "installed", lambda: None)
    own, _ = attacked(task, tmp_path)
    assert records["first_hit"].equals(own["first_hit"])
    assert not records["unconfirmed"].any()


class Peeks(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.scale = model, sum(float(weight.abs().mean()) for weight in model.parameters())

    def forward(self, x):
        return self.model(x) * self.scale


def test_a_defense_that_looks_into_the_network_cannot_say_that_it_stays_outside():
    from bench.check.output import stays_outside
    from bench.check.verdict import Broken, Remark

    class Looks:
        stage, random, outside = "output", False, True

        def __call__(self, model, calibration, seed):
            return Peeks(model).eval()

    class Subject:
        component = Looks()

    with pytest.raises(Broken, match="a network that can only be called"):
        stays_outside(Subject())
    Subject.component = defenses.create("rnd")
    assert stays_outside(Subject()) == "only calls the network"
    Subject.component = defenses.create("unig")
    assert isinstance(stays_outside(Subject()), Remark)


HOOKED = """
from torch import nn


class Hooks:
    "Turns the sign of what the first layer says, by a hook that no other library sees."

    stage, random, outside, version, paper = "output", False, True, 1, ""

    def __call__(self, model, calibration, seed):
        layer = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
        layer.register_forward_hook(lambda module, given, answer: -answer)
        return nn.Sequential(model).eval()
"""


def test_a_defense_that_says_wrongly_that_it_stays_outside_fails_its_cell(tasks, tmp_path, pretended, monkeypatch):
    monkeypatch.setattr(Pipeline, "isolates", lambda self, task: False)
    monkeypatch.setattr(Pretended, "__call__", lambda self, network, images: copy.deepcopy(network))  # as it is now
    (tmp_path / "hooks.py").write_text(HOOKED)
    (task,) = tasks(defense=[f"{tmp_path / 'hooks.py'}:Hooks"], n=20, queries=20)
    with pytest.raises(RefereeError, match=r"declares outside = True, and answers \d+ of \d+ images otherwise where"):
        attacked(task, tmp_path)


@needs_openvino
@pytest.mark.parametrize(
    ("build", "why"),
    [(Network, ""), (networks.EditedBetween, ""), (networks.BranchesOnItsInput, ""), (networks.normalising_hook, ""),
     (networks.weight_norm, ""), (networks.BranchesOnValues, "depends on values"), (networks.StaysInTraining, "torch")],
)  # fmt: skip
def test_openvino_is_the_same_function_or_refused(build, why):
    network = with_statistics(build())
    converted = numerics.fast(network, IMAGES, engine=INSTALLED)
    for count in (1, 5, 9):
        queries = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected = network(queries)
            assert (converted.module(queries) - expected).abs().max() <= 1e-4 * IMAGES.max()
    assert converted.engine == INSTALLED.name if not why else why in converted.engine


@needs_openvino
def test_openvino_computes_in_float32_on_as_many_threads_as_torch_and_tells_nobody():
    answers = INSTALLED(with_statistics(Network()), IMAGES)
    assert answers._compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert answers._compiled.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()
    assert "openvino.tools.ovc" not in sys.modules


@needs_openvino
def test_other_numbers_than_float32_are_refused(monkeypatch):
    monkeypatch.setattr(engine, "_settings", lambda: {"INFERENCE_PRECISION_HINT": "dynamic"})
    converted = numerics.fast(with_statistics(Network()), IMAGES, engine=INSTALLED)
    assert "OpenVINO computes in dynamic" in converted.engine


@needs_openvino
def test_openvino_goes_to_other_processes_and_keeps_its_answers():
    module = numerics.fast(with_statistics(Network()), IMAGES, engine=INSTALLED).module
    there = pickle.loads(pickle.dumps(module))
    first = module(IMAGES)
    kept = first.clone()
    assert torch.equal(there(IMAGES), first)
    module(1 - IMAGES)
    assert torch.equal(first, kept)
    assert module(IMAGES[:0]).shape == (0, 2)


@needs_openvino
def test_a_run_with_openvino(tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "WORTH", 1)
    (task,) = tasks(defense=["aaa-linear"], n=20, queries=20)
    _, told = attacked(task, tmp_path)
    assert told["engine"] == INSTALLED.name


def test_a_library_that_does_not_import_costs_speed_alone(monkeypatch):
    engine._openvino.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    converted = numerics.fast(with_statistics(Network()), IMAGES, engine=engine.OpenVINO("OpenVINO 1"))
    assert converted.engine.startswith("torch: OpenVINO 1 fails (ConfigError: openvino")
    engine._openvino.cache_clear()
    assert engine.installed() is None
