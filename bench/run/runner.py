"""Tasks in, shards out: runs what the store does not hold yet."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from bench.measure.inspection import Inspector
from bench.measure.keys import recipe_key
from bench.measure.needs import needs
from bench.measure.pipeline import Pipeline
from bench.plan.tasks import Task
from bench.results.provenance import provenance
from bench.results.shards import Shard
from bench.results.store import Row, Store
from bench.run.executor import Busy, Done, Event, Executor, Local, Lost, Pool, Told
from bench.run.part import WHOLE, Part
from bench.run.turns import AtOnce, Early, Plan, Turns
from bench.run.units import Unit
from bench.run.until import Rule
from bench.run.waiting import Waiting
from bench.run.worker import Finished
from bench.system.claims import CLAIMS, Held, claim, present
from bench.system.interrupt import stoppable
from bench.tracks import Tools

PAUSE = 1.0  # seconds between two looks at what other runs are at
TRIES = 3    # workers that a unit may cost
LINES = 20   # of the output of a lost worker that are kept
LOCAL = Local()


class Reporter(Protocol):
    """Whoever wants to know how a run goes."""

    def plan(self, samples: int) -> None:
        """So many samples are to be measured in all, as far as that is known by now."""
        ...

    def start(self, task: Task, unit: Unit) -> None:
        """A worker begins with a unit of a cell."""
        ...

    def work(self, unit: Unit, done: int, total: int, what: str) -> None:
        """So much of ``unit`` is done: epochs, or queries settled, among them those that a fall has saved."""
        ...

    def end(self, unit: Unit, samples: int) -> None:
        """``unit`` is at its end, and with it so many of the samples; none where it waits for another try."""
        ...

    def finish(self, task: Task, row: Row, seconds: float) -> None:
        """The cell has ended, well or badly; workers were at it for so long."""
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
    executor: Executor = LOCAL,
    unit_timeout: float | None = None,
    worst_only: bool = False,
    until: Rule | None = None,
) -> Outcome:
    """Run every sample of every task that ``store`` does not hold; failed shards are tried again.

    Of these, only what belongs to ``part``: which units that are does not depend on what is there. The outcome counts
    the cells that have a unit in it.

    The workers of ``executor`` measure, this process alone writes. An error in a component fails its shard, with the
    traceback in the store, and the next one goes on; so does any other way out that it takes, such as ``sys.exit``.
    Where what several shards need cannot be made, that is tried once, and all of them fail. A unit is tried again when
    its worker is lost, and fails with the third, or when it takes longer than ``unit_timeout`` seconds. Work that
    another run on the folder is at is taken last: done by then, or free because that run has ended. With ``examples``
    the final example of each sample is kept, too.

    With ``worst_only`` the cells on one network take turns, each on what those before it have left; see
    :mod:`bench.run.worst_only`. With ``until`` they take samples in their order until that is decided; see
    :mod:`bench.run.until`.

    Raises:
        StoreError: the store cannot be written or read.
        Stopped: the process was asked to end.
    """
    missing = {task.cell.key: store.missing(task.cell) for task in tasks}  # damage is found before anything runs
    done = [task for task in tasks if not missing[task.cell.key]]
    with stoppable() as check, present(store.root, lambda: pipeline.sweep(done)):
        plan: Plan = AtOnce(tasks, store, missing, shard_size, part)
        if worst_only or until:
            plan = Early(tasks, store, shard_size, until) if until else Turns(tasks, store, shard_size)
        cells = {task.cell.key: _CellWork(task) for task in tasks if task.cell.key in plan.cells}
        work = _Work(cells, store, pipeline, reporter, unit_timeout, plan)
        work.add(plan.first())
        if work.waiting:
            tools = Tools(pipeline, Inspector(pipeline.device), batch_size, examples)
            with executor.open([cell.task for key, cell in cells.items() if missing[key]], tools) as pool:
                work.go(pool, check)
    return Outcome(
        ran=sum(cell.ours and not cell.failed for cell in cells.values()),
        kept=sum(not cell.ours and not cell.failed for cell in cells.values()),
        failed=sum(cell.failed for cell in cells.values()),
    )


@dataclass
class _CellWork:
    """What is ``left`` of a cell; and how it went so far."""

    task: Task
    left: set[Unit] = field(default_factory=set)
    ours: bool = False     # whether this run has measured any of it
    failed: bool = False
    seconds: float = 0.0   # of workers


class _Running(NamedTuple):
    """What the worker in a seat is at; ``claims`` are held meanwhile."""

    unit: Unit
    claims: ExitStack
    began: float


class _Work:
    """One run: which units wait, which are with workers, and what is done with what those say."""

    def __init__(
        self, cells: dict[str, _CellWork], store: Store, pipeline: Pipeline, reporter: Reporter,
        timeout: float | None, plan: Plan,
    ) -> None:  # fmt: skip
        self.plan, self.samples = plan, 0                # whose turn it is; how many samples are planned by now
        self.cells, self.store, self.pipeline, self.reporter, self.timeout = cells, store, pipeline, reporter, timeout
        self.waiting = Waiting()
        self.running: dict[int, _Running] = {}           # by seat
        self.held: dict[int, str] = {}                   # by seat, the network that its worker has ready
        self.failed_before: dict[Unit, int | None] = {}  # when, in ns
        self.broken: dict[str, str] = {}                 # by key of what cannot be made, why
        self.lost: Counter[Unit] = Counter()             # workers that a unit has cost
        self.resting: list[str] = []                     # by key, cells that may get another turn
        self.looked = 0.0                                # when it was last seen what other runs are at

    def add(self, planned: Mapping[str, Sequence[Unit]]) -> None:
        """Let units of cells, by the keys of these, wait for a worker."""
        self.resting = [key for key in self.resting if key not in planned]
        for key, units in planned.items():
            if units:
                self._add(self.cells[key], units)
                self.samples += sum(len(unit.positions) for unit in units)
                self.reporter.plan(self.samples)

    def _add(self, cell: _CellWork, units: Sequence[Unit]) -> None:
        """Let ``units`` of ``cell`` wait, and before them what they need and nobody has made."""
        network, needed = recipe_key(cell.task), [need for need in needs(cell.task) if not self.pipeline.has(need.key)]
        for need in needed:
            if not self.waiting.makes(need.key):
                self.waiting.add(Unit(cell.task.cell.key, 0, 0, need.key), network, need.after)
        for unit in units:
            self.waiting.add(unit, network, [need.key for need in needed])
            self.failed_before[unit] = self.store.settled(self._shard(unit))[1]
        cell.left.update(units)

    def go(self, pool: Pool, check: Callable[[], None]) -> None:
        """Hand out units until none is left."""
        try:
            while self.waiting or self.running:
                idle = self._deal(pool)
                if self.running or not idle:
                    pool.wait(PAUSE, self._hear)
                    self._end_late(pool)
                elif self.waiting:  # all that is left is with other runs
                    self.reporter.wait(sum(bool(cell.left) for cell in self.cells.values()))
                    time.sleep(PAUSE)
                check()
        finally:
            for running in self.running.values():
                running.claims.close()

    def _deal(self, pool: Pool) -> bool:
        """Give each worker without a unit one; whether there was none for one of them."""
        for seat in pool.free():
            taken = self._take(seat)
            if taken is None:
                return True
            unit, claims = taken
            self.held[seat] = self.waiting.network(unit)
            self.running[seat] = _Running(unit, claims, time.monotonic())
            self.reporter.start(self.cells[unit.cell].task, unit)
            pool.hand(seat, unit)
        return False

    def _take(self, seat: int) -> tuple[Unit, ExitStack] | None:
        """The next unit for the worker in ``seat``, with our claims on it."""
        others = [network for other, network in self.held.items() if other != seat]
        while True:
            unit = self.waiting.take(self.held.get(seat, ""), others)
            if unit is None:
                if time.monotonic() - self.looked < PAUSE:
                    return None
                self.looked = time.monotonic()
                self.waiting.back()
                unit = self.waiting.take(self.held.get(seat, ""), others)
            if unit is None:
                return None
            claims = ExitStack()
            try:
                if not unit.makes:  # a worker claims by itself what it makes
                    claims.enter_context(claim(self.store.root / CLAIMS / f"{unit.cell[:16]}-{unit.stem}.lock"))
                if self._is_open(unit):
                    return unit, claims
            except Held:
                self.waiting.put_off(unit)
            claims.close()

    def _is_open(self, unit: Unit) -> bool:
        """Whether ``unit`` is still to be done: nobody else has since, well or badly, and what it needs is there."""
        broken = next((self.broken[key] for key in self.waiting.needs(unit) if key in self.broken), None)
        if broken is not None:
            self._fail(unit, broken)
        elif not unit.makes:
            finished, failed = self.store.settled(self._shard(unit))
            self.cells[unit.cell].failed |= not finished and failed != self.failed_before[unit]
            if not finished and failed == self.failed_before[unit]:
                return True
        else:
            return True
        self._settle(unit)
        return False

    def _hear(self, seat: int, event: Event) -> None:
        """What the worker in ``seat`` says of its unit."""
        unit = self.running[seat].unit
        match event:
            case Told():
                self.reporter.work(unit, *event)
            case Finished(facts, records, examples) if "error" not in facts:
                self.store.keep(self._shard(unit, **facts), records, examples)
                self.cells[unit.cell].ours = True
            case Finished(facts):
                self._fail(unit, **facts)
            case Done():
                self._release(seat)
                self._settle(unit)
            case Busy():
                self._release(seat)
                self.reporter.end(unit, 0)
                self.waiting.put_off(unit)
            case Lost(how, said):
                self._release(seat)
                self._lose(unit, how, said)

    def _lose(self, unit: Unit, how: str, said: str) -> None:
        self.lost[unit] += 1
        if self.lost[unit] < TRIES:
            self.reporter.end(unit, 0)
            self.waiting.again(unit)
            return
        self._fail(unit, f"{_last_of(said)}{TRIES} workers were lost at it, one after the other; the last one {how}")
        self._settle(unit)

    def _end_late(self, pool: Pool) -> None:
        """End the units that take too long."""
        now = time.monotonic()
        late = [seat for seat, at in self.running.items() if self.timeout and now - at.began > self.timeout]
        for seat in late:
            unit, said = self.running[seat].unit, pool.end(seat)
            self._release(seat)
            self._fail(unit, f"{_last_of(said)}it took longer than {self.timeout:g} s, so its worker was ended")
            self._settle(unit)

    def _release(self, seat: int) -> None:
        unit, claims, began = self.running.pop(seat)
        claims.close()
        self.cells[unit.cell].seconds += time.monotonic() - began

    def _fail(self, unit: Unit, error: str, **facts: Any) -> None:
        """Write down that ``unit`` has failed; of what it makes, for all that need it."""
        if unit.makes:
            self.broken[unit.makes] = error
            return
        facts = facts or {"provenance": provenance(self.pipeline.device)}
        self.store.fail(self._shard(unit, error=error, **facts))
        self.cells[unit.cell].ours = self.cells[unit.cell].failed = True

    def _settle(self, unit: Unit) -> None:
        """``unit`` is at its end, and its cell perhaps with it."""
        self.waiting.settle(unit.makes)
        self.reporter.end(unit, len(unit.positions))
        cell = self.cells[unit.cell]
        cell.left.discard(unit)
        if not cell.left and not unit.makes:
            self.resting.append(unit.cell)
            planned = self.plan.after(unit.cell)
            self._finish()
            self.add(planned)

    def _finish(self) -> None:
        """Tell of the cells that are at rest and get no further turn."""
        ended = [key for key in self.resting if self.plan.ended(key)]
        for cell in map(self.cells.__getitem__, ended):
            self.reporter.finish(cell.task, self.store.row(cell.task.cell), cell.seconds)
        self.resting = [key for key in self.resting if key not in ended]

    def _shard(self, unit: Unit, **facts: Any) -> Shard:
        cell = self.cells[unit.cell].task.cell
        return Shard(cell, unit.start, unit.stop, chosen=unit.chosen, in_order=unit.in_order, until=unit.until, **facts)


def _last_of(said: str) -> str:
    """The last lines of what a worker has printed, before the reason that tables show, which is the last line."""
    lines = said.strip().splitlines()[-LINES:]
    return "\n".join(["the last of its output:", *lines, ""]) if lines else ""
