"""The pieces that a run is cut into, as plain data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.plan import order
from bench.plan.tasks import Task
from bench.results.shards import stem_of
from bench.run.part import Part
from bench.tracks import track_of


@dataclass(frozen=True)
class Unit:
    """The samples ``start:stop`` of the cell with the key ``cell``, or what has to be made before them.

    ``chosen`` are their positions where others of that stretch are left out, ``in_order`` if that is since samples are
    taken in the order of the cell, and ``until`` what the run is to decide, after which it ends. ``makes`` is the key
    of released images or of a trained network, and the cell is then the first that needs it.
    """

    cell: str
    start: int
    stop: int
    makes: str = ""
    chosen: tuple[int, ...] = ()
    in_order: bool = False
    until: str = ""

    @property
    def positions(self) -> Sequence[int]:
        """Where its samples stand among those of the cell, ascending."""
        return self.chosen or range(self.start, self.stop)

    @property
    def stem(self) -> str:
        """The name of its shard."""
        return stem_of(self.start, self.stop, self.chosen)


Cut = Callable[[Task, Sequence[int], int], "list[Unit]"]  # a cell's ascending positions, so many at a time


def units_of(
    tasks: Sequence[Task], missing: Mapping[str, Sequence[int]], cuts: Mapping[str, Cut], shard_size: int, part: Part
) -> dict[str, list[Unit]]:
    """By the key of each cell that has any sample in ``part``, the units of it that are ``missing``.

    Which units belong to the part does not depend on what is missing. What is missing of a cell may lie in splinters:
    then ``cuts`` has another way to cut it than in stretches.
    """
    everything = [unit for task in tasks for unit in in_stretches(task, range(len(task.cell.ids)), shard_size)]
    own: dict[str, set[int]] = {}
    for number, unit in enumerate(everything):
        if part.has(number):
            own.setdefault(unit.cell, set()).update(range(unit.start, unit.stop))
    left = {key: sorted(positions.intersection(missing[key])) for key, positions in own.items()}
    return {
        task.cell.key: cuts.get(task.cell.key, in_stretches)(task, left[task.cell.key], shard_size)
        for task in tasks if task.cell.key in own
    }  # fmt: skip


def in_stretches(task: Task, positions: Sequence[int], size: int) -> list[Unit]:
    """The stretches of the cell that are stored one by one."""
    if not positions:
        return []
    size = track_of(task.cell).shard_size(task, size)
    return [Unit(task.cell.key, start, stop) for start, stop in stretches(positions, size)]


def chosen(task: Task, positions: Sequence[int], size: int) -> list[Unit]:
    """Ascending ``positions`` that are some of many, stored so many at a time."""
    size = track_of(task.cell).shard_size(task, size)
    parts = [tuple(positions[first : first + size]) for first in range(0, len(positions), size)]
    return [Unit(task.cell.key, part[0], part[-1] + 1, chosen=part) for part in parts]


def in_order(task: Task, positions: Sequence[int], size: int, until: str = "") -> list[Unit]:
    """``positions`` as they come in the order of the cell, stored so many at a time; ``until`` something is decided."""
    size, left = track_of(task.cell).shard_size(task, size), set(positions)
    ordered = [place for place in order.in_order(task.cell.ids).tolist() if place in left]
    parts = [tuple(sorted(ordered[first : first + size])) for first in range(0, len(ordered), size)]
    return [Unit(task.cell.key, part[0], part[-1] + 1, chosen=part, in_order=True, until=until) for part in parts]


def stretches(positions: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Ascending ``positions`` as stretches (start, stop) of neighbours, at most ``size`` long."""
    start = previous = positions[0]
    for position in positions[1:]:
        if position != previous + 1 or position - start >= size:
            yield start, previous + 1
            start = position
        previous = position
    yield start, previous + 1
