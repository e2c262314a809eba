"""Every registered component against the same truths; a new file in ``attacks/`` or ``defenses/`` is met here."""

import copy
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.dataset import Dataset, Split
from bench.norms import lp_norm
from bench.oracle import NEVER
from bench.protection import protected_rows
from bench.protocols import Job
from bench.registry import attacks, datasets, defenses, parameters
from bench.rng import SampleRng
from tests.problems import asks_for, attack_with, referee

FOREIGN = ["torchattacks:PGD", "torchattacks:PGDL2", "torchattacks:FGSM", "torchattacks:Square(n_queries=20)"]
QUERYING = [
    (name, norm)
    for name in [*attacks.names(), *FOREIGN]
    if not name.endswith(":") and attacks.create(name).access != "training-data"
    for norm in sorted(attacks.create(name).norms)
]
LEARNERS = [
    name for name in attacks.names() if not name.endswith(":") and attacks.create(name).access == "training-data"
]
BY_STAGE = {
    stage: [name for name in defenses.names() if defenses.create(name).stage == stage]
    for stage in ("data", "training", "output")
}
BUDGET = 25


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 6)]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def batch():
    x = torch.rand(12, 3, 15, 15, generator=torch.Generator().manual_seed(1))
    return x, network()(x).argmax(1)


def attacked(name, norm, x, y, eps, seed=0, ids=None, model=None):
    attack = attacks.create(name)
    model = network() if model is None else model
    oracle = referee(model, x, y, norm=norm, eps=eps, budget=BUDGET, seed=seed, ids=ids, **asks_for(attack, model))
    return attack_with(attack, oracle, x, y, seed=seed, ids=ids), oracle.ledger


def radius(norm):
    return {"linf": 0.02, "l2": 0.2, "l1": 2.0}[norm]


@pytest.mark.parametrize(("name", "norm"), QUERYING)
class TestAttacks:
    def test_examples_stay_in_ball_and_box_within_the_budget(self, name, norm, batch):
        x, y = batch
        x_adv, ledger = attacked(name, norm, x, y, radius(norm))  # the oracle refuses what is outside
        assert x_adv.shape == x.shape
        assert x_adv.dtype == x.dtype
        assert (lp_norm(x_adv - x, norm) <= radius(norm) + 1e-6).all()
        assert ledger.forwards.max() <= BUDGET
        assert ledger.forwards.min() >= 1
        assert ((ledger.first_hit == NEVER) | (ledger.first_hit == ledger.forwards)).all()  # nothing after the hit

    def test_a_hit_is_a_misclassified_final_example(self, name, norm, batch):
        x, y = batch
        x_adv, ledger = attacked(name, norm, x, y, 20 * radius(norm))
        hit = ledger.first_hit != NEVER
        assert hit.any()  # at twenty times the radius
        assert (network()(x_adv).argmax(1) != y)[hit].all()

    def test_inputs_and_model_stay_as_they_were(self, name, norm, batch):
        x, y = batch
        before_x, before_y, model = x.clone(), y.clone(), network()
        state = copy.deepcopy(model.state_dict())
        attacked(name, norm, x, y, radius(norm), model=model)
        assert torch.equal(x, before_x)
        assert torch.equal(y, before_y)
        assert not model.training
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def test_one_seed_one_result_and_the_global_generator_untouched(self, name, norm, batch):
        x, y = batch
        torch.manual_seed(11)
        first = attacked(name, norm, x, y, radius(norm))
        model = network()  # seeds the global generator
        torch.manual_seed(12)
        expected = torch.rand(2)
        torch.manual_seed(12)
        again = attacked(name, norm, x, y, radius(norm), model=model)
        assert torch.equal(torch.rand(2), expected)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1].first_hit, again[1].first_hit)

    def test_no_radius_no_change(self, name, norm, batch):
        x, y = batch
        x_adv, ledger = attacked(name, norm, x, y, 0.0)
        assert (lp_norm(x_adv - x, norm) <= 1e-6).all()
        assert (ledger.first_hit == NEVER).all()

    def test_a_sample_does_not_see_its_batch(self, name, norm, batch):
        if getattr(attacks.create(name), "batch_dependent", False):
            pytest.skip("declares itself batch-dependent, and is marked so in every table")
        x, y = (part.double() if part.is_floating_point() else part for part in batch)
        model = network().double()
        whole = attacked(name, norm, x, y, radius(norm), model=model)[1]
        ids = torch.arange(12).split(1)
        one = [attacked(name, norm, x[i], y[i], radius(norm), 0, i, model)[1] for i in ids]
        assert torch.equal(torch.cat([ledger.first_hit for ledger in one]), whole.first_hit)
        assert torch.equal(torch.cat([ledger.forwards for ledger in one]), whole.forwards)


@pytest.fixture(scope="module")
def data() -> Dataset:
    digits = datasets.create("digits")(None)
    rows = slice(0, 120)
    splits = {part: getattr(digits, part).subset(rows) for part in ("train", "calibration", "test")}
    return Dataset("small digits", digits.classes, **splits)


def small(name: str, registry, **fewer: int) -> object:
    """The component as it is, trained for one epoch where it trains, and with ``fewer`` of what else it counts."""
    known = parameters(registry.factory(name)) or {}
    few = {"epochs": 1, "subspace_epochs": 1, **fewer}
    given = ", ".join(f"{key}={value}" for key, value in few.items() if key in known)
    return registry.create(f"{name}({given})" if given else name)


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


@pytest.mark.parametrize(
    ("registry", "name"), [(attacks, name) for name in LEARNERS] + [(defenses, name) for name in BY_STAGE["training"]]
)
class TestTrainers:
    def test_the_network_is_trained_and_ready(self, registry, name, data):
        reported = []
        job = Job(seed=0, progress=lambda done, total: reported.append((done, total)))
        model = small(name, registry)(build, data, job)
        assert not model.training
        assert model(data.test.pixels()).shape == (120, 10)
        assert model(data.test.pixels()).isfinite().all()
        assert reported[-1] in ((1, 1), (2, 2))  # a second training has an epoch of its own

    def test_one_seed_one_network(self, registry, name, data):
        def train(seed):
            return weights_of(small(name, registry)(build, data, Job(seed=seed)))

        torch.manual_seed(3)
        first = train(0)
        torch.manual_seed(4)
        assert torch.equal(train(0), first)
        assert not torch.equal(train(1), first)


@pytest.mark.parametrize("name", BY_STAGE["data"])
class TestDataDefenses:
    def defense(self, name):
        return small(name, defenses, checkpoints=1, steps=2, rounds=1, draws=1, adv_steps=1)

    def test_the_release_keeps_labels_order_and_bounds(self, name, data):
        defense = self.defense(name)
        original = data.train.images.clone()
        released = defense(data, Job())
        assert isinstance(released, Split)
        assert released.images.dtype == torch.uint8
        assert released.images.shape == original.shape
        assert torch.equal(released.labels, data.train.labels)
        assert torch.equal(data.train.images, original)
        change = released.images.double() - original.double()
        size = lp_norm(change / (1 if defense.norm == "l0" else 255), defense.norm)
        assert size.max() <= defense.eps + 1e-9
        assert size.max() > 0

    def test_one_seed_one_release(self, name, data):
        defense = self.defense(name)
        assert torch.equal(defense(data, Job(seed=2)).images, defense(data, Job(seed=2)).images)

    def test_no_more_than_the_share_changes(self, name, data):
        released = dataclasses.replace(self.defense(name), share=0.3)(data, Job(seed=2))
        changed = (released.images != data.train.images).flatten(1).any(dim=1)
        assert set(changed.nonzero().squeeze(1).tolist()) <= set(protected_rows(data.train, 0.3, Job(seed=2)).tolist())
        assert changed.any()


@pytest.mark.parametrize("name", BY_STAGE["output"])
class TestOutputDefenses:
    def served(self, name, data):
        torch.manual_seed(0)
        return defenses.create(name)(build().eval(), data.calibration, 0)

    def answer(self, name, data, rows, seed=0):
        model, x = self.served(name, data), data.test.pixels(rows)
        with torch.no_grad():
            if defenses.create(name).random:
                return model(x, SampleRng.create(seed, rows, "defense"))
            return model(x)

    def test_logits_for_every_image(self, name, data):
        logits = self.answer(name, data, torch.arange(40))
        assert logits.shape == (40, 10)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()
        assert not self.served(name, data).training

    def test_random_as_declared_and_only_by_the_streams_it_is_given(self, name, data):
        rows = torch.arange(40)
        torch.manual_seed(1)
        first = self.answer(name, data, rows)
        torch.manual_seed(2)
        assert torch.equal(self.answer(name, data, rows), first)
        assert torch.equal(self.answer(name, data, rows, seed=5), first) != defenses.create(name).random

    def test_a_row_does_not_see_its_batch(self, name, data):
        if any(getattr(defenses.create(name), trait, False) for trait in ("batch_dependent", "stateful")):
            pytest.skip("declares that rows depend on others, and is marked so in every table")
        whole = self.answer(name, data, torch.arange(40))
        parts = [self.answer(name, data, rows) for rows in torch.arange(40).split(7)]
        assert torch.allclose(torch.cat(parts), whole, atol=1e-3)

    def test_gradients_reach_the_image(self, name, data):
        model, x = self.served(name, data), data.test.pixels(torch.arange(5)).requires_grad_(True)
        streams = (SampleRng.create(0, torch.arange(5), "defense"),) if defenses.create(name).random else ()
        (gradient,) = torch.autograd.grad(model(x, *streams)[:, 0].sum(), x)
        assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()


def test_every_component_says_what_it_is():
    for registry in (attacks, defenses):
        for name in registry.names():
            if not name.endswith(":"):
                component = registry.create(name)
                assert component.paper
                assert component.version >= 1
                assert type(component).__doc__


TOY_ATTACK = '''
from dataclasses import dataclass
from typing import ClassVar
from bench.registry import attacks

@attacks("toy-attack")
@dataclass(frozen=True)
class Toy:
    """Ask once."""
    access: ClassVar = "scores"
    norms: ClassVar = frozenset({"linf"})
    version: ClassVar = 1
    paper: ClassVar = "nobody"

    def __call__(self, oracle, x, y, threat, rng):
        x_adv = (x + threat.eps * (rng.uniform(*x.shape[1:]).to(x) * 2 - 1)).clamp(0, 1)
        oracle.scores(x_adv)
        return x_adv
'''
TOY_DEFENSE = '''
from dataclasses import dataclass
from typing import ClassVar
from torch import nn
from bench.registry import defenses

@defenses("toy-defense")
@dataclass(frozen=True)
class Toy:
    """Double the logits."""
    stage: ClassVar = "output"
    random: ClassVar = False
    version: ClassVar = 1
    paper: ClassVar = "nobody"

    def __call__(self, model, calibration, seed):
        return Doubled(model).eval()

class Doubled(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return 2 * self.model(x)
'''


def test_a_new_file_is_all_that_a_component_takes(tmp_path):
    """Drop one file into each package: it is registered, and this very suite tests it."""
    here = Path(__file__).parents[1]
    for package in ("attacks", "defenses", "tests"):
        shutil.copytree(here / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "attacks" / "toy.py").write_text(TOY_ATTACK)
    (tmp_path / "defenses" / "toy.py").write_text(TOY_DEFENSE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_conformance.py", "-ktoy-"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(here)])}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert "10 passed" in result.stdout, result.stdout + result.stderr  # 6 for the attack in linf, 4 for the defense
