"""What a run would cost, from a few timed images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.measure.keys import defense_key, fit_key, recipe_key
from bench.measure.pipeline import Pipeline
from bench.plan.tasks import Task
from bench.protocols import FittedAttack, FittedDefense
from bench.results.store import Store
from bench.run.timing import seconds_of_defense, seconds_of_fit, seconds_of_training, seconds_per_query
from bench.tracks import track_of


@dataclass(frozen=True)
class Estimate:
    """The most that a cell can still cost: samples to run, queries for them, and seconds to ask those.

    Samples that fall early cost less. ``seconds`` are ``None`` for a service, whose time is its own, and for an output
    defense that is yet to be trained. ``training`` are those of the training and of the fit of an output defense or an
    attack that this cell is the first to need, 0 where it needs none or another cell has made it, ``None`` where it
    could not be timed.
    """

    task: Task
    samples: int
    queries: int
    seconds: float | None
    training: float | None


def estimate(tasks: Sequence[Task], store: Store, device: torch.device, batch_size: int) -> list[Estimate]:
    """Plan ``tasks`` against what ``store`` holds; nothing is trained to its end, attacked or written."""
    timings: dict[tuple[object, ...], float] = {}
    pipeline = Pipeline(store.root / "networks", device, batch_size)
    trainings = _Trainings(pipeline, device)
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
        trains = isinstance(task.chain.output, FittedDefense)
        if task.service or (trains and not pipeline.has(defense_key(task))):  # of a service a plan asks nothing
            plans.append(Estimate(task, samples, queries, None, training))
            continue
        batch = min(batch_size, samples)
        served = (part for part in task.cell.defense if part.stage == "output")  # the others change no network's speed
        parts = tuple((part.spec, part.version) for part in (task.cell.dataset, task.cell.model, *served))
        kind = (*parts, task.attack.access, batch)
        if kind not in timings:
            learned = pipeline.fitted_defense(task) if trains else None
            timings[kind] = seconds_per_query(task, device, batch, learned)
        plans.append(Estimate(task, samples, queries, queries * timings[kind], training))
    return plans


class _Trainings:
    """The trainings of a plan, each counted at the first cell that needs it, and timed once for all seeds."""

    def __init__(self, pipeline: Pipeline, device: torch.device) -> None:
        self.pipeline, self.device = pipeline, device
        self.counted: set[str] = set()
        self.timings: dict[tuple[object, ...], float | None] = {}

    def needed(self, task: Task) -> float | None:
        """The seconds that ``task`` adds, of its training and of fitting its output defense and its attack."""
        parts = [self._training(task)]
        if isinstance(task.chain.output, FittedDefense):
            parts.append(self._fit(task, defense_key(task), seconds_of_defense))
        if isinstance(task.attack, FittedAttack):
            parts.append(self._fit(task, fit_key(task), seconds_of_fit))
        timed = [part for part in parts if part is not None]
        return sum(timed) if len(timed) == len(parts) else None

    def _fit(self, task: Task, key: str, time: Callable[[Task, torch.device], float | None]) -> float | None:
        if key in self.counted or self.pipeline.has(key):
            return 0.0
        self.counted.add(key)
        return time(task, self.device)

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
