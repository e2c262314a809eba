"""Tasks in, shards out: runs what the store does not hold yet."""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import pandas as pd
import torch

from bench.errors import StoreError
from bench.evaluate import Inspector, Measured, attack_served, learn_released
from bench.grid import Task
from bench.interrupt import Stopped, stoppable
from bench.pipeline import Pipeline
from bench.process_state import seed_globals, undisturbed
from bench.provenance import provenance
from bench.served import Target
from bench.shards import Shard
from bench.store import Row, Store
from bench.witness import Witness


class Reporter(Protocol):
    """Whoever wants to know how a run goes."""

    def start(self, task: Task, samples: int) -> None:
        """``samples`` of the cell are about to run."""
        ...

    def work(self, done: int, total: int, unit: str) -> None:
        """So much of the cell in work is done: epochs, or queries settled, among them those that a fall has saved."""
        ...

    def finish(self, task: Task, row: Row, seconds: float) -> None:
        """The cell has ended, well or badly."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How many cells ran, were done before, and failed."""

    ran: int
    kept: int
    failed: int


def run(
    tasks: Sequence[Task], store: Store, pipeline: Pipeline, shard_size: int, batch_size: int, reporter: Reporter
) -> Outcome:
    """Run every sample of every task that ``store`` does not hold; failed shards are tried again.

    An error in a component fails its shard, with the traceback in the store, and the next one goes on; so does any
    other way out that it takes, such as ``sys.exit``.

    Raises:
        StoreError: the store cannot be written or read.
        Stopped: the process was asked to end.
    """
    with stoppable() as check:
        return _run(tasks, store, pipeline, shard_size, batch_size, reporter, check)


def _run(
    tasks: Sequence[Task],
    store: Store,
    pipeline: Pipeline,
    shard_size: int,
    batch_size: int,
    reporter: Reporter,
    check: Callable[[], None],
) -> Outcome:
    ran = kept = failed = 0
    inspect = Inspector(pipeline.device)
    missing = {task.cell.key: store.missing(task.cell) for task in tasks}  # damage is found before anything runs
    for task in tasks:
        todo = missing[task.cell.key]
        if not todo:
            kept += 1
            continue
        reporter.start(task, len(todo))
        started = time.perf_counter()
        fine, ended = True, 0
        # A learner's training serves all samples at once.
        for start, stop in stretches(todo, len(task.cell.ids) if task.learns else shard_size):
            count = _Count(reporter, task.cell.threat.query_budget or 0, ended, len(todo))
            fine &= _run_shard(task, start, stop, store, pipeline, inspect, batch_size, count)
            check()
            ended += stop - start
        ran += fine
        failed += not fine
        reporter.finish(task, store.row(task.cell), time.perf_counter() - started)
    return Outcome(ran, kept, failed)


def stretches(positions: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Ascending ``positions`` as stretches (start, stop) of neighbours, at most ``size`` long."""
    start = previous = positions[0]
    for position in positions[1:]:
        if position != previous + 1 or position - start >= size:
            yield start, previous + 1
            start = position
        previous = position
    yield start, previous + 1


def _run_shard(
    task: Task,
    start: int,
    stop: int,
    store: Store,
    pipeline: Pipeline,
    inspect: Inspector,
    batch_size: int,
    count: "_Count",
) -> bool:
    """Measure one shard and store it; False if it failed."""
    began = time.perf_counter()
    shard = Shard(task.cell, start, stop)

    def save(measured: Measured) -> None:
        whole = replace(shard, figures=measured.figures, findings=measured.findings)
        store.save(_ended(whole, began, pipeline.device, measured.numerics), measured.records)

    try:
        with undisturbed():
            if task.learns:
                _learn(task, start, stop, pipeline, count, save)
            else:
                save(_attack(task, start, stop, pipeline, inspect, batch_size, count))
    except (Stopped, StoreError):
        raise
    except BaseException:  # whatever a component raises becomes a failed row, never a lost grid
        store.fail(_ended(replace(shard, error=traceback.format_exc()), began, pipeline.device))
        return False
    return True


def _learn(
    task: Task, start: int, stop: int, pipeline: Pipeline, count: "_Count", save: Callable[[Measured], None]
) -> None:
    released = pipeline.released(task, count.epochs)
    seed_globals(task.cell.seed)
    with pipeline.learning(task, count.epochs) as job:  # what is trained is safe when it is saved
        measured = learn_released(task, released, list(task.cell.ids[start:stop]), job, task.build)
        pipeline.check_data(task)
        save(measured)


def _attack(
    task: Task, start: int, stop: int, pipeline: Pipeline, inspect: Inspector, batch_size: int, count: "_Count"
) -> Measured:
    ids = list(task.cell.ids[start:stop])
    pipeline.train(task, count.epochs)
    seed_globals(task.cell.seed)  # after what only the first shard has to do, so that it matters to none
    tables = []
    with pipeline.serving(task) as target:
        witness = _witness(task, target) if start == 0 else None
        for first in range(0, len(ids), batch_size):
            part = ids[first : first + batch_size]
            met = replace(target, searched=witness.watch(target.searched)) if witness and first == 0 else target
            tables.append(attack_served(task, met, part, pipeline.device, partial(count.queries, first)))
        records, numbers = pd.concat(tables, ignore_index=True), target.searched.numbers
        if start:
            return Measured(records, numerics=numbers)
        figures, findings = inspect(task, target)
        return Measured(records, figures, [*findings, *([asdict(witness.finding())] if witness else [])], numbers)


def _witness(task: Task, target: Target) -> Witness | None:
    """Who watches the attack; nobody where answers are said to depend on earlier queries, or cannot be had twice."""
    if any("stateful" in defense.traits for defense in task.cell.defense):
        return None
    with suppress(Exception):  # copying runs the model's own code
        return Witness(target.searched)
    return None


@dataclass(frozen=True)
class _Count:
    """Tells a reporter how far a cell is: ``ended`` of its ``samples`` are, the others may still cost ``budget``."""

    reporter: Reporter
    budget: int
    ended: int
    samples: int

    def epochs(self, done: int, total: int) -> None:
        self.reporter.work(done, total, "epochs")

    def queries(self, first: int, settled: int) -> None:
        """``settled`` queries of the batch that starts at sample ``first`` of the shard."""
        done = (self.ended + first) * self.budget + settled
        self.reporter.work(done, self.samples * self.budget, "queries settled")


def _ended(shard: Shard, began: float, device: torch.device, numerics: Mapping[str, Any] | None = None) -> Shard:
    made = {**provenance(device), **({"numerics": dict(numerics)} if numerics else {})}
    return replace(shard, seconds=time.perf_counter() - began, provenance=made)
