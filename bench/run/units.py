"""The pieces that a run is cut into, as plain data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.plan.tasks import Task
from bench.run.part import Part
from bench.tracks import track_of


@dataclass(frozen=True)
class Unit:
    """The samples ``start:stop`` of the cell with the key ``cell``, or what has to be made before them.

    ``makes`` is then the key of released images or of a trained network, and the cell is the first that needs it.
    """

    cell: str
    start: int
    stop: int
    makes: str = ""

    @property
    def stem(self) -> str:
        """The name of its shard, as :attr:`bench.results.shards.Shard.stem`."""
        return f"{self.start:06d}-{self.stop:06d}"


def units_of(
    tasks: Sequence[Task], missing: Mapping[str, Sequence[int]], shard_size: int, part: Part
) -> dict[str, list[Unit]]:
    """By the key of each cell that has any sample in ``part``, the units of it that are ``missing``.

    Which units belong to the part does not depend on what is missing.
    """
    everything = [unit for task in tasks for unit in _units(task, range(len(task.cell.ids)), shard_size)]
    own: dict[str, set[int]] = {}
    for number, unit in enumerate(everything):
        if part.has(number):
            own.setdefault(unit.cell, set()).update(range(unit.start, unit.stop))
    return {
        task.cell.key: _units(task, sorted(own[task.cell.key].intersection(missing[task.cell.key])), shard_size)
        for task in tasks if task.cell.key in own
    }  # fmt: skip


def _units(task: Task, positions: Sequence[int], size: int) -> list[Unit]:
    """The stretches of the cell that are stored one by one."""
    if not positions:
        return []
    size = track_of(task.cell).shard_size(task, size)
    return [Unit(task.cell.key, start, stop) for start, stop in stretches(positions, size)]


def stretches(positions: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Ascending ``positions`` as stretches (start, stop) of neighbours, at most ``size`` long."""
    start = previous = positions[0]
    for position in positions[1:]:
        if position != previous + 1 or position - start >= size:
            yield start, previous + 1
            start = position
        previous = position
    yield start, previous + 1
