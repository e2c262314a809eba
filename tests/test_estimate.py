"""What a run would cost, before it runs."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from bench.registry import defenses
from bench.results.store import Store
from bench.run import estimate as module
from bench.run import timing
from tests.test_grid import plan

CPU = torch.device("cpu")


@pytest.fixture
def timed(monkeypatch):
    """What is timed, by the name of its defense, in place of timing it."""
    asked, trained = [], []
    monkeypatch.setattr(module, "seconds_per_query", lambda task, *_: asked.append(task.cell.defense_name) or 0.5)
    monkeypatch.setattr(module, "seconds_of_training", lambda task, _: trained.append(task.cell.defense_name) or 7.0)
    return asked, trained


def test_a_network_is_timed_once_whatever_has_trained_it(tmp_path, timed):
    """Weights do not matter for speed: nine trainings of a large network were nine times the wait."""
    tasks = plan(defense=["none", "pgd-at", "fast-at", "ops + pgd-at", "aaa-linear", "pgd-at + aaa-linear"], queries=10)
    plans = module.estimate(tasks, Store(tmp_path), CPU, 32)
    assert timed[0] == ["none", "aaa-linear"]
    assert {each.seconds for each in plans} == {20 * 10 * 0.5}


def test_a_training_counts_at_the_first_cell_that_needs_it(tmp_path, timed):
    """Seeds train anew and take as long; output defenses train nothing."""
    tasks = plan(
        defense=["none", "pgd-at", "pgd-at + aaa-linear"], attack=["square", "rays"], seed=[0, 1], queries=10
    )
    plans = module.estimate(tasks, Store(tmp_path), CPU, 32)
    assert timed[1] == ["none", "pgd-at"]
    assert sum(each.training for each in plans) == 4 * 7.0  # two networks, two seeds
    assert {each.training for each in plans} == {0.0, 7.0}


class Clock:
    """Time that passes only as somebody says."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


@dataclass(frozen=True)
class Paced:
    """Trains at two seconds for each image in its first epoch and one later; of ten epochs, it tells of so many.

    After ``stops`` of them it ends, and tells so.
    """

    clock: Clock
    tells: int = 10
    fewest: int = 1
    stops: int = 10
    stage: ClassVar[str] = "training"

    def __call__(self, build, data, job):
        assert len(data.test) == 0
        if len(data.train) < self.fewest:
            raise ValueError("too few images")
        for epoch in range(self.tells):
            self.clock.now += len(data.train) * (2 if epoch == 0 else 1)
            job.progress(10 if epoch + 1 == self.stops else epoch + 1, 10)
        return build()


def training(clock, **settings):
    (task,) = plan(queries=10)
    object.__setattr__(task.chain, "training", Paced(clock, **settings))
    return timing.seconds_of_training(task, CPU), len(task.data.train)


def test_a_training_is_extrapolated_from_its_second_epoch_on_few_images(clock):
    seconds, images = training(clock)
    assert seconds == 10 * images
    assert clock.now == timing.FEW * 3  # of two epochs


def test_one_that_stops_early_is_timed_by_what_it_has_done(clock):
    seconds, images = training(clock, stops=2)
    assert seconds == 10 * images


@pytest.mark.parametrize("settings", [{"tells": 0}, {"fewest": 50}])
def test_what_tells_nothing_or_wants_more_is_not_timed(clock, settings):
    assert training(clock, **settings)[0] is None


@pytest.mark.parametrize(
    ("fixed", "each", "asked"),
    [
        (0.0, 0.001, [4, 16, 64, 256, 1000]),  # too short to tell before
        (0.5, 0.001, [4, 16, 64, 256, 1000]),  # more at once are cheaper
        (0.0, 0.400, [4, 16]),
        (0.0, 2.000, [4]),
    ],
)
def test_more_images_are_timed_until_that_tells_nothing_new(fixed, each, asked):
    counts = []

    def run(count):
        counts.append(count)
        return fixed + count * each

    assert timing._per_image(run, 1000) == pytest.approx(each + fixed / counts[-1])
    assert counts == asked


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["fast-at(early_stopping=true)", "sub-at", "ltd", "awp", "free-at", "gat"])
def test_trainings_of_ours_can_be_timed(spec):
    (task,) = plan(defense=[spec], queries=10)
    assert isinstance(task.chain.training, type(defenses.create(spec)))
    before = torch.random.get_rng_state()
    assert timing.seconds_of_training(task, CPU) > 0
    assert torch.equal(before, torch.random.get_rng_state())
