"""What a run would cost, from a few timed images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.measure.keys import fit_key, recipe_key
from bench.measure.pipeline import Pipeline
from bench.plan.tasks import Task
from bench.protocols import FittedAttack
from bench.results.store import Store
from bench.run.timing import seconds_of_fit, seconds_of_training, seconds_per_query
from bench.tracks import track_of


@dataclass(frozen=True)
class Estimate:
    """The most that a cell can still cost: samples to run, queries for them, and seconds to ask those.

    Samples that fall early cost less. ``seconds`` are ``None`` for a service, whose time is its own. ``training`` are
    those of the training and of the fit of an attack that this cell is the first to need, 0 where it needs none or
    another cell has made it, ``None`` where it could not be timed.
    """

    task: Task
    samples: int
    queries: int
    seconds: float | None
    training: float | None


def estimate(tasks: Sequence[Task], store: Store, device: torch.device, batch_size: int) -> list[Estimate]:
    """Plan ``tasks`` against what ``store`` holds; nothing is trained to its end, attacked or written."""
    timings: dict[tuple[object, ...], float] = {}
    trainings = _Trainings(Pipeline(store.root / "networks", device, batch_size), device)
    plans = []
    for task in tasks:
        samples = len(store.missing(task.cell))
        if samples == 0:
            plans.append(Estimate(task, 0, 0, 0.0, 0.0))
            continue
        training = trainings.needed(task)
        queries = track_of(task.cell).queries(task, samples)
        if queries is None:
            plans.append(Estimate(task, samples, 0, 0.0, training))
            continue
        if task.service:  # of which a plan asks nothing
            plans.append(Estimate(task, samples, queries, None, training))
            continue
        batch = min(batch_size, samples)
        served = (part for part in task.cell.defense if part.stage == "output")  # the others change no network's speed
        parts = tuple((part.spec, part.version) for part in (task.cell.dataset, task.cell.model, *served))
        kind = (*parts, task.attack.access, batch)
        if kind not in timings:
            timings[kind] = seconds_per_query(task, device, batch)
        plans.append(Estimate(task, samples, queries, queries * timings[kind], training))
    return plans


class _Trainings:
    """The trainings of a plan, each counted at the first cell that needs it, and timed once for all seeds."""

    def __init__(self, pipeline: Pipeline, device: torch.device) -> None:
        self.pipeline, self.device = pipeline, device
        self.counted: set[str] = set()
        self.timings: dict[tuple[object, ...], float | None] = {}

    def needed(self, task: Task) -> float | None:
        """The seconds that ``task`` adds, of its training and of fitting its attack."""
        training, fit = self._training(task), self._fit(task)
        return None if training is None or fit is None else training + fit

    def _fit(self, task: Task) -> float | None:
        if not isinstance(task.attack, FittedAttack):
            return 0.0
        key = fit_key(task)
        if key in self.counted or self.pipeline.has(key):
            return 0.0
        self.counted.add(key)
        return seconds_of_fit(task, self.device)

    def _training(self, task: Task) -> float | None:
        learns = track_of(task.cell).queries(task, 1) is None  # its cost is all training
        key = task.cell.key if learns else recipe_key(task)
        if not (learns or task.trains) or key in self.counted or (not learns and self.pipeline.has_network(task)):
            return 0.0
        self.counted.add(key)
        early = (part for part in task.cell.defense if part.stage == "training")
        parts = (task.cell.dataset, task.cell.model, *early, *([task.cell.attack] if learns else []))
        kind = tuple((part.spec, part.version) for part in parts)
        if kind not in self.timings:
            self.timings[kind] = seconds_of_training(task, self.device)
        return self.timings[kind]
