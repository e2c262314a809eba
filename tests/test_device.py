"""What only a GPU would show, without one: components on a pretended device, where nothing may mix and nobody wait."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import nn

from bench.check.attack import fitted
from bench.check.problem import CLASSES, pretrained, to_train
from bench.dataset import Dataset, Split
from bench.measure.fitting import around
from bench.oracle.served import ServedModel
from bench.protocols import Job
from bench.registry import attacks, datasets, defenses
from bench.rng import SampleRng
from bench.threat import Threat
from tests.pretend import GPU, MixedDevices, pretended_gpu
from tests.problems import asks_for, attack_with, referee
from tests.registered import BY_STAGE, CERTIFIERS, LEARNERS, QUERYING, build, learned, network, radius, small

BUDGET = 20
# Looking at who is still alive takes three waits in 16 queries; the rest is laid down before, or looked at in the end.
WAITS = 14
# More: a hundred free steps on the twin look, too; networks that are trained between two queries, which waits anyway;
# probing asks of some samples alone, and each such call is looked at for repeats: 35 at most, however large the budget.
BETWEEN = {"transfer": 16, "query-net": 100, "autoquery": 26}
# Waits of one query: whose chain a row goes on with, and in which order; fingerprints, in a table of the host.
REMEMBERING = {"unig": 6, "blacklight": 2}


def few(count: int = 60) -> Dataset:
    digits = datasets.create("digits")(None)
    splits = {part: getattr(digits, part).subset(slice(count)) for part in ("train", "calibration", "test")}
    return Dataset("few digits", digits.classes, **splits)


def attacked(name: str, norm: str, device: torch.device, began: Callable[[], None]) -> tuple[torch.Tensor, ...]:
    attack = attacks.create(name)
    x = torch.rand(4, 3, 15, 15, generator=torch.Generator().manual_seed(1))
    y = network()(x).argmax(1)
    model, x, y, ids = network().to(device), x.to(device), y.to(device), torch.arange(4).to(device)
    known = fitted(attack, Threat(norm, radius(norm), attack.access, BUDGET), device=device)
    oracle = referee(model, x, y, norm=norm, eps=radius(norm), budget=BUDGET, ids=ids, fitted=known, classes=CLASSES,
                     **asks_for(attack, model))  # fmt: skip
    began()
    x_adv = attack_with(attack, oracle, x, y, ids=ids)
    return x_adv.cpu(), oracle.ledger.first_hit.cpu(), oracle.ledger.forwards.cpu()


def quick(name: str) -> bool:
    """Whether an attack is no mere variant of Square, which only has another rule."""
    return not name.endswith("-square") or name in ("bi-square", "crowd-square", "eot-square")


@pytest.mark.parametrize(
    ("name", "norm"),
    [pytest.param(*one, marks=() if quick(one[0]) else pytest.mark.slow) for one in QUERYING if ":" not in one[0]],
)
def test_an_attack_stays_on_the_device_and_seldom_waits(name, norm):
    with pretended_gpu() as gpu:
        there = attacked(name, norm, GPU, gpu.waits.clear)
    here = attacked(name, norm, torch.device("cpu"), lambda: None)
    assert all(torch.equal(one, other) for one, other in zip(there, here, strict=True))
    assert gpu.waited <= WAITS + BETWEEN.get(name.partition("(")[0], 0), gpu.waits


@pytest.mark.parametrize(("name", "most"), [("square(preset=aaa)", 95), ("simba", 95), ("sign-hunter", 80)])
def test_a_query_is_few_launches(name, most):
    """On few images each of them takes the host longer than the device."""

    def launches(budget: int) -> int:
        attack = attacks.create(name)
        with pretended_gpu() as gpu:
            x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(GPU)
            model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4, bias=False)).to(GPU)
            y, ids = model(x).argmax(1), torch.arange(4).to(GPU)
            oracle = referee(model, x, y, eps=0.0, budget=budget, ids=ids, classes=4, **asks_for(attack, model))
            attack_with(attack, oracle, x, y, ids=ids)
        return gpu.launches

    assert (launches(40) - launches(8)) / 32 <= most


@pytest.mark.parametrize("name", BY_STAGE["output"])
def test_an_output_defense_answers_on_the_device_without_waiting(name):
    data, defense = few(), defenses.create(name)
    known = learned(defense, data)
    torch.manual_seed(0)
    model = build().eval()

    def answer(device: torch.device) -> torch.Tensor:
        own = copy.deepcopy(model).to(device)
        served = ServedModel(around(defense, own, data.calibration.to(device), 0, known, "it"), defense.random)
        x, rng = data.test.pixels().to(device), SampleRng.create(0, torch.arange(60).to(device), "defense")
        before = gpu.waited
        with torch.no_grad():
            logits = served(x, rng)
        assert gpu.waited - before <= REMEMBERING.get(name, 0), gpu.waits
        return logits.cpu()

    with pretended_gpu() as gpu:
        there = answer(GPU)
    assert torch.allclose(there, answer(torch.device("cpu")), atol=1e-5)


@pytest.mark.parametrize("name", CERTIFIERS)
def test_a_certifier_proves_the_same_on_the_device_and_waits_for_no_batch(name):
    torch.manual_seed(0)
    model = build().eval()

    def certify(device: torch.device, batch: int) -> list[torch.Tensor]:
        x, rng = few().test.pixels()[:4].to(device), SampleRng.create(0, torch.arange(4).to(device), "certificate")
        with torch.no_grad():
            found = small(name, attacks, n=60)(copy.deepcopy(model).to(device), x, rng, batch)
        return [found.votes.cpu(), found.radius.cpu()]

    waits = []
    for batch in (120, 20):
        with pretended_gpu() as gpu:
            there = certify(GPU, batch)
        waits.append(gpu.waited)
    here = certify(torch.device("cpu"), 20)
    assert all(torch.equal(one, other) for one, other in zip(there, here, strict=True))
    assert waits[0] == waits[1], gpu.waits


@pytest.mark.parametrize(
    ("registry", "name"), [(attacks, name) for name in LEARNERS] + [(defenses, name) for name in BY_STAGE["training"]]
)
def test_training_stays_on_the_device_and_waits_in_no_step(registry, name):
    def train(device: torch.device, batch_size: int) -> nn.Module:
        job = Job(device=device, pretrained=pretrained())
        component = small(name, registry, batch_size=batch_size, linear_epochs=1)
        return component(*to_train(component, few()), job)

    waits = []
    for batch_size in (30, 15):  # 2 steps, and 4
        with pretended_gpu() as gpu:
            there = train(GPU, batch_size).state_dict()
            there = {key: value.cpu() for key, value in there.items()}
        waits.append(gpu.waited)
    here = train(torch.device("cpu"), 15).state_dict()
    assert all(torch.allclose(there[key].double(), value.double(), atol=1e-5) for key, value in here.items())
    assert waits[0] == waits[1], gpu.waits


@pytest.mark.parametrize("name", BY_STAGE["data"])
def test_a_data_defense_works_on_the_device(name):
    def protect(device: torch.device) -> Split:
        defense = small(name, defenses, checkpoints=1, steps=2, rounds=1, draws=1, adv_steps=1)
        return defense(few(), Job(device=device))

    exact = mock.patch.object(torch, "autocast", return_value=nullcontext())  # signs of gradients follow
    with pretended_gpu(), exact:
        there = protect(GPU).images.cpu()
    assert torch.equal(there, protect(torch.device("cpu")).images)


class TestThePretendedDevice:
    """It refuses and counts what CUDA refuses and waits for."""

    @pytest.mark.parametrize(
        "mix",
        [
            lambda x, here: x + here, lambda x, here: torch.cat((x, here)), lambda x, here: here[x.long()],
            lambda x, here: x.index_add_(0, here.long(), x), lambda x, here: torch.where(here > 0, x, 0),
            lambda x, here: here.add_(x), lambda x, here: x.numpy(),
            lambda x, here: torch.rand(3, device=GPU, generator=torch.Generator()),
        ],
    )  # fmt: skip
    def test_mixing_is_refused(self, mix):
        with pretended_gpu(), pytest.raises(MixedDevices):
            mix(torch.zeros(3, device=GPU), torch.zeros(3))

    @pytest.mark.parametrize(
        "wait",
        [
            lambda x: bool(x.any()), lambda x: x.sum().item(), lambda x: float(x.max()), lambda x: x.nonzero(),
            lambda x: x[x > 0], lambda x: x.tolist(), lambda x: x.cpu(), lambda x: torch.tensor(1.0, device=GPU),
            lambda x: torch.zeros(3).to(x), lambda x: x[torch.tensor([0, 1])], lambda x: torch.equal(x, x),
        ],
    )  # fmt: skip
    def test_waiting_is_counted(self, wait):
        with pretended_gpu() as gpu:
            x = torch.zeros(3, device=GPU)
            wait(x)
        assert gpu.waited == 1, gpu.waits

    def test_what_a_gpu_does_by_itself_is_not(self):
        with pretended_gpu() as gpu:
            x = torch.zeros(3, device=GPU)
            y = torch.where(x > 0, x, 1) + torch.arange(3, device=x.device) + torch.tensor(2.0)
            assert y.is_cuda
            assert copy.deepcopy(y).is_cuda
            assert y.new_zeros(2).is_cuda
            assert not torch.zeros(2).is_cuda
            y[torch.arange(2, device=GPU)] = x[:2]
        assert gpu.waited == 0, gpu.waits
