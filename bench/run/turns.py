"""In which order a run takes its cells: all at once, or in turns of which each depends on what came before."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Protocol

from bench.declarations import is_entangled
from bench.plan.tasks import Task
from bench.results.store import Store
from bench.run.part import Part
from bench.run.units import Unit, chosen, in_order, in_stretches, units_of
from bench.run.until import Rule, Until
from bench.run.worst_only import Turn, WorstOnly

Planned = Mapping[str, Sequence[Unit]]  # units by the keys of their cells


class Plan(Protocol):
    """What is to be run, and when."""

    @property
    def cells(self) -> Collection[str]:
        """The keys of all cells that may have a unit."""
        ...

    def first(self) -> Planned:
        """What can begin at once."""
        ...

    def after(self, key: str) -> Planned:
        """What can begin when all units of the cell ``key`` are at their end."""
        ...

    def ended(self, key: str) -> bool:
        """Whether nothing more of the cell ``key`` will come."""
        ...


class AtOnce:
    """Everything that is missing."""

    def __init__(
        self, tasks: Sequence[Task], store: Store, missing: Mapping[str, Sequence[int]], shard_size: int, part: Part
    ) -> None:
        begun = [task for task in tasks if 0 < len(missing[task.cell.key]) < len(task.cell.ids)]
        gapped = [row for row in (store.row(task.cell) for task in begun) if row.partial]
        # What has stopped early goes on in its order, so that it is never without an interval meanwhile.
        cuts = {row.cell.key: in_order if row.stopped else chosen for row in gapped}
        self._units = units_of(tasks, missing, cuts, shard_size, part)

    @property
    def cells(self) -> Collection[str]:
        return self._units.keys()

    def first(self) -> Planned:
        return self._units

    def after(self, key: str) -> Planned:
        return {}

    def ended(self, key: str) -> bool:
        return True


class Turns:
    """The worst case alone; see :mod:`bench.run.worst_only`."""

    def __init__(self, tasks: Sequence[Task], store: Store, shard_size: int) -> None:
        self._tasks, self._shard_size = {task.cell.key: task for task in tasks}, shard_size
        entangled = [task.cell.key for task in tasks if _entangled(task)]
        self._turns = WorstOnly([task.cell for task in tasks], store, entangled)

    @property
    def cells(self) -> Collection[str]:
        return self._tasks.keys()

    def first(self) -> Planned:
        return dict(map(self._units, self._turns.first()))

    def after(self, key: str) -> Planned:
        return dict(map(self._units, self._turns.after(key)))

    def ended(self, key: str) -> bool:
        return True

    def _units(self, turn: Turn) -> tuple[str, list[Unit]]:
        cut = chosen if turn.chosen else in_stretches
        return turn.key, cut(self._tasks[turn.key], turn.positions, self._shard_size)


class Early:
    """Until something is decided; see :mod:`bench.run.until`."""

    def __init__(self, tasks: Sequence[Task], store: Store, shard_size: int, rule: Rule) -> None:
        self._tasks, self._shard_size = {task.cell.key: task for task in tasks}, shard_size
        entangled = [task.cell.key for task in tasks if _entangled(task)]
        self._rule = str(rule)
        self._until = Until(rule, [task.cell for task in tasks], store, shard_size, entangled)
        self._at_it: dict[str, Turn] = {}

    @property
    def cells(self) -> Collection[str]:
        return self._tasks.keys()

    def first(self) -> Planned:
        return self._planned(self._until.first())

    def after(self, key: str) -> Planned:
        return self._planned(self._until.after(self._at_it.pop(key)))

    def ended(self, key: str) -> bool:
        return self._until.ended(key)

    def _planned(self, turns: Sequence[Turn]) -> Planned:
        self._at_it |= {turn.key: turn for turn in turns}
        early = partial(in_order, until=self._rule)
        return {
            turn.key: (early if turn.chosen else in_stretches)(
                self._tasks[turn.key], turn.positions, self._shard_size
            )
            for turn in turns
        }


def _entangled(task: Task) -> bool:
    return is_entangled(task.attack, task.architecture, task.chain.data, task.chain.training, task.chain.output)
