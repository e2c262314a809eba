"""The pieces that a run is cut into, as plain data."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.plan.tasks import Task
from bench.results.shards import stem_of
from bench.run.part import Part
from bench.tracks import track_of


@dataclass(frozen=True)
class Unit:
    """The samples ``start:stop`` of the cell with the key ``cell``, or what has to be made before them.

    ``chosen`` are their positions where others of that stretch are left out. ``makes`` is the key of released images or
    of a trained network, and the cell is then the first that needs it.
    """

    cell: str
    start: int
    stop: int
    makes: str = ""
    chosen: tuple[int, ...] = ()

    @property
    def positions(self) -> Sequence[int]:
        """Where its samples stand among those of the cell, ascending."""
        return self.chosen or range(self.start, self.stop)

    @property
    def stem(self) -> str:
        """The name of its shard."""
        return stem_of(self.start, self.stop, self.chosen)


def units_of(
    tasks: Sequence[Task], missing: Mapping[str, Sequence[int]], gapped: Collection[str], shard_size: int, part: Part
) -> dict[str, list[Unit]]:
    """By the key of each cell that has any sample in ``part``, the units of it that are ``missing``.

    Which units belong to the part does not depend on what is missing. Of cells that are ``gapped``, since their attacks
    met what others had left, what is missing lies in splinters, which are taken together.
    """
    everything = [unit for task in tasks for unit in in_stretches(task, range(len(task.cell.ids)), shard_size)]
    own: dict[str, set[int]] = {}
    for number, unit in enumerate(everything):
        if part.has(number):
            own.setdefault(unit.cell, set()).update(range(unit.start, unit.stop))
    left = {key: sorted(positions.intersection(missing[key])) for key, positions in own.items()}
    return {
        task.cell.key: (chosen if task.cell.key in gapped else in_stretches)(task, left[task.cell.key], shard_size)
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


def stretches(positions: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Ascending ``positions`` as stretches (start, stop) of neighbours, at most ``size`` long."""
    start = previous = positions[0]
    for position in positions[1:]:
        if position != previous + 1 or position - start >= size:
            yield start, previous + 1
            start = position
        previous = position
    yield start, previous + 1
