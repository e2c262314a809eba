"""Tasks in, shards out: runs what the store does not hold yet."""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch

from bench.errors import StoreError
from bench.measure.inspection import Inspector
from bench.measure.measured import Measured
from bench.measure.pipeline import Pipeline
from bench.plan.tasks import Task
from bench.results.provenance import provenance
from bench.results.shards import Shard
from bench.results.store import Row, Store
from bench.run.part import WHOLE, Part
from bench.system.claims import CLAIMS, Held, claim, present
from bench.system.interrupt import Stopped, stoppable
from bench.system.process_state import undisturbed
from bench.system.shared_code import shared_code
from bench.tracks import Tools, track_of

PAUSE = 1.0  # seconds between two looks at what other runs are at


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

    def leave(self, task: Task) -> None:
        """What is left of the cell is with other runs; it is started again later."""
        ...

    def wait(self, cells: int) -> None:
        """Other runs are at all that is left, which is in so many cells."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How many cells ran, were done before or by other runs meanwhile, and failed."""

    ran: int
    kept: int
    failed: int


def run(
    tasks: Sequence[Task],
    store: Store,
    pipeline: Pipeline,
    shard_size: int,
    batch_size: int,
    reporter: Reporter,
    examples: bool = False,
    part: Part = WHOLE,
) -> Outcome:
    """Run every sample of every task that ``store`` does not hold; failed shards are tried again.

    Of these, only what belongs to ``part``: which units that are does not depend on what is there. The outcome counts
    the cells that have a unit in it.

    An error in a component fails its shard, with the traceback in the store, and the next one goes on; so does any
    other way out that it takes, such as ``sys.exit``. Work that another run on the folder is at is taken last: done by
    then, or free because that run has ended. With ``examples`` the final example of each sample is kept, too.

    Raises:
        StoreError: the store cannot be written or read.
        Stopped: the process was asked to end.
    """
    missing = {task.cell.key: store.missing(task.cell) for task in tasks}  # damage is found before anything runs
    done = [task for task in tasks if not missing[task.cell.key]]
    with stoppable() as check, present(store.root, lambda: pipeline.sweep(done)):
        work = _Work(store, Tools(pipeline, Inspector(pipeline.device), batch_size, examples), reporter, check)
        own = _own(tasks, shard_size, part)
        cells = [
            _CellWork(task, _shards(task, sorted(own[task.cell.key].intersection(missing[task.cell.key])), shard_size))
            for task in tasks if own[task.cell.key]
        ]  # fmt: skip
        left = [cell for cell in cells if cell.shards]
        while left:
            held = [cell for cell in left if not work.advance(cell)]
            if len(held) == len(left):  # all that is left is with other runs
                reporter.wait(len(held))
                time.sleep(PAUSE)
                check()
            left = held
    return Outcome(
        ran=sum(cell.ours and not cell.failed for cell in cells),
        kept=sum(not cell.ours and not cell.failed for cell in cells),
        failed=sum(cell.failed for cell in cells),
    )


def _own(tasks: Sequence[Task], shard_size: int, part: Part) -> dict[str, set[int]]:
    """By the key of each cell, the positions of its samples that belong to ``part``."""
    units = [(task, shard) for task in tasks for shard in _shards(task, range(len(task.cell.ids)), shard_size)]
    own: dict[str, set[int]] = {task.cell.key: set() for task in tasks}
    for number, (task, shard) in enumerate(units):
        if part.has(number):
            own[task.cell.key].update(range(shard.start, shard.stop))
    return own


def _shards(task: Task, positions: Sequence[int], size: int) -> list[Shard]:
    """The stretches of the cell that are stored one by one."""
    if not positions:
        return []
    size = track_of(task.cell).shard_size(task, size)
    return [Shard(task.cell, start, stop) for start, stop in stretches(positions, size)]


@dataclass
class _CellWork:
    """What is left of a cell: its unfinished ``shards``; and how it went so far."""

    task: Task
    shards: list[Shard]
    ours: bool = False     # whether this run has measured any of it
    failed: bool = False
    seconds: float = 0.0
    seen: dict[str, int | None] = field(default_factory=dict)  # when its shards had failed before this run


@dataclass(frozen=True)
class _Work:
    """What one run works with."""

    store: Store
    tools: Tools
    reporter: Reporter
    check: Callable[[], None]

    def advance(self, cell: _CellWork) -> bool:
        """Run the shards of ``cell`` that no other run is at; whether it is done with, by us or by others."""
        if not cell.seen:
            cell.seen = {shard.stem: self.store.settled(shard)[1] for shard in cell.shards}
        samples = sum(shard.stop - shard.start for shard in cell.shards)
        began, ended, held = time.perf_counter(), 0, []
        self.reporter.start(cell.task, samples)
        for shard in cell.shards:
            try:
                with claim(self.store.root / CLAIMS / f"{cell.task.cell.key[:16]}-{shard.stem}.lock"):
                    self._settle(cell, shard, _Count(self.reporter, _budget(cell.task), ended, samples))
                ended += shard.stop - shard.start
            except Held:
                held.append(shard)
            self.check()
        cell.shards = held
        cell.seconds += time.perf_counter() - began
        if held:
            self.reporter.leave(cell.task)
            return False
        self.reporter.finish(cell.task, self.store.row(cell.task.cell), cell.seconds)
        return True

    def _settle(self, cell: _CellWork, shard: Shard, count: "_Count") -> None:
        """Measure ``shard``, unless another run has done so since, well or badly."""
        finished, failed = self.store.settled(shard)
        if finished:
            return
        if failed != cell.seen[shard.stem]:
            cell.failed = True
            return
        fine = _run_shard(cell.task, shard, self.store, self.tools, count)
        cell.ours = True
        cell.failed |= not fine


def _budget(task: Task) -> int:
    return task.cell.threat.query_budget or 0


def stretches(positions: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Ascending ``positions`` as stretches (start, stop) of neighbours, at most ``size`` long."""
    start = previous = positions[0]
    for position in positions[1:]:
        if position != previous + 1 or position - start >= size:
            yield start, previous + 1
            start = position
        previous = position
    yield start, previous + 1


def _run_shard(task: Task, shard: Shard, store: Store, tools: Tools, count: "_Count") -> bool:
    """Measure one shard and store it; False if it failed.

    Raises:
        Held: another process makes what it needs.
    """
    began, device = time.perf_counter(), tools.pipeline.device
    try:
        with (
            undisturbed(),
            shared_code() if task.cell.of_files else nullcontext() as code,
            track_of(task.cell).measure(task, shard.start, shard.stop, tools, count) as measured,
        ):
            if code is not None:
                code.check(str(task.cell))
            whole = replace(
                shard, figures=measured.figures, findings=measured.findings, training=measured.training
            )
            facts = {"numerics": dict(measured.numerics), "defense": _place(measured)}
            ended = _ended(whole, began, device, facts)
            store.save(ended, measured.records, *(() if measured.examples is None else (measured.examples,)))
    except (Held, Stopped, StoreError):
        raise
    except BaseException:  # whatever a component raises becomes a failed row, never a lost grid
        store.fail(_ended(replace(shard, error=traceback.format_exc()), began, device))
        return False
    return True


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


def _place(measured: Measured) -> str:
    """Where the output defense acted, in words; "" where there is none."""
    return {True: "in a process of its own", False: "in the process of the referee", None: ""}[measured.isolated]


def _ended(shard: Shard, began: float, device: torch.device, facts: Mapping[str, Any] = MappingProxyType({})) -> Shard:
    made = {**provenance(device), **{name: fact for name, fact in facts.items() if fact}}
    return replace(shard, seconds=time.perf_counter() - began, provenance=made)
