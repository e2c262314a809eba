"""Only the worst case: whose turn it is next, and which samples the attacks before it have left.

A ranking asks of each sample whether any attack beats it. So the attacks on a network take turns, each on the samples
that still stand. The one that has taken the most from this model so far, for what it cost, comes first.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from bench.plan.cell import Cell
from bench.report.line import by_defense
from bench.report.outcomes import column, final, is_control, network, query_budget, robust, seen
from bench.report.ranking import Terms
from bench.report.settings import by_setting
from bench.results.store import Row
from bench.tracks import track_of

PASSES = {"forwards": 1, "backwards": 2, "surrogate_forwards": 1, "surrogate_backwards": 2}  # and what each costs


class Stored(Protocol):
    """What there is of a cell; a :class:`bench.results.store.Store`."""

    def row(self, cell: Cell) -> Row: ...
    def missing(self, cell: Cell) -> list[int]: ...


class Turn(NamedTuple):
    """The cell whose turn it is, by its key, and the ``positions`` of its samples to run, some ``chosen`` among others.
    """

    key: str
    positions: list[int]
    chosen: bool


@dataclass(frozen=True)
class _Pool:
    """The cells of one defense on one network whose attacks are one worst case, the ``ids`` that it and the ranks are
    of, and those of them that have ``fallen``."""

    cells: frozenset[str]
    ids: frozenset[int]
    fallen: set[int] = field(default_factory=set)


class WorstOnly:
    """Gives each cell its turn.

    A sample has fallen once no figure of the worst case can count it any more: a query beat it and its final example is
    wrong when judged afresh, or it was wrong before any attack. It has to have fallen in each table that has a worst
    case of the cell: where some see gradients and others ask, those who ask have a table of their own.

    Run on all samples are controls, which are in no worst case and come last, learners, and what is not independent of
    the samples beside it. The first sample of a cell always runs: so every attack has a row, with what probing shows.
    So does the first that a full run has left of a cell: so its row says what that is, some that others had left.
    """

    def __init__(self, cells: Sequence[Cell], store: Stored, entangled: Collection[str] = ()) -> None:
        """``entangled`` are the keys of cells whose samples bear on each other; see
        :func:`bench.declarations.is_entangled`."""
        self._entangled = frozenset(entangled)
        self._cells = {cell.key: cell for cell in cells}
        self._store = store
        self._pools = _pools(cells)
        self._queues = _queues(cells)
        self._yields: dict[str, tuple[int, float]] = {}  # of each cell: samples that it took, passes that it cost
        for cell in cells:
            self._note(store.row(cell))

    def first(self) -> list[Turn]:
        """Who begins: of the cells on one network, one."""
        return [turn for queue in self._queues for turn in self._next(queue)]

    def after(self, key: str) -> list[Turn]:
        """Whose turn it is when the cell ``key`` is at its end, well or badly; nobody's where it was the last one."""
        self._note(self._store.row(self._cells[key]))
        return self._next(next(queue for queue in self._queues if key in queue.all))

    def _next(self, queue: "_Queue") -> list[Turn]:
        while queue.waiting:
            key = min(queue.waiting, key=self._order)
            queue.waiting.remove(key)
            if (turn := self._turn(key)).positions:
                return [turn]
        return []

    def _order(self, key: str) -> tuple[bool, float]:
        """Lower for earlier: by what the attack has taken from this model for each pass, whatever defended it."""
        cell = self._cells[key]
        alike = [found for other, found in self._yields.items() if _attack(self._cells[other]) == _attack(cell)]
        taken, passes = sum(taken for taken, _ in alike), sum(passes for _, passes in alike)
        return cell.attack.control, -taken / passes if passes else 0.0

    def _turn(self, key: str) -> Turn:
        cell, missing = self._cells[key], self._store.missing(self._cells[key])
        pools = [pool for pool in self._pools if key in pool.cells]
        if not pools or key in self._entangled:
            return Turn(key, missing, chosen=False)
        row = self._store.row(cell)
        again = {position for shard in row.shards if shard.error is not None for position in shard.positions}
        first = {0, *(missing[:1] if not row.partial else ())}  # of a cell, and of what a full run has left of one
        wanted = set().union(*(pool.ids - pool.fallen for pool in pools))
        positions = [at for at in missing if at in first or at in again or cell.ids[at] in wanted]
        return Turn(key, positions, chosen=len(positions) < len(missing) or bool(row.partial))

    def _note(self, row: Row) -> None:
        """Keep in mind what a row has shown."""
        met, key = seen(row), row.cell.key
        if not (row.cell.threat.asks and met.n):
            return
        fallen = ~(robust(met, query_budget(met)).right | final(met).right)
        ids = column(met, "sample_id")
        for pool in self._pools:
            if key in pool.cells:
                pool.fallen.update(ids[fallen].tolist())
        taken = int((fallen & (column(met, "first_hit") != 0)).sum())
        passes = sum(cost * float(column(met, name).sum()) for name, cost in PASSES.items())
        self._yields[key] = taken, passes


@dataclass(frozen=True)
class _Queue:
    """Cells on one network, which take turns."""

    all: frozenset[str]
    waiting: list[str]


def _pools(cells: Sequence[Cell]) -> list[_Pool]:
    """The worst cases that cells belong to: in each table that pools, each defense on each of its networks."""
    found = []
    for rows in _tables(cells):
        if not track_of(rows[0].cell).pools:
            continue
        met = by_defense(rows)
        ranked = Terms.of(met).ids
        for members in met.values():
            attacks = [row for row in members if not is_control(row)]
            if not attacks:
                continue
            shown = set.intersection(*(set(row.cell.ids) for row in attacks))
            for number in dict.fromkeys(map(network, attacks)):
                keys = frozenset(row.cell.key for row in attacks if network(row) == number)
                found.append(_Pool(keys, frozenset(shown.union(ranked))))
    return found


def _queues(cells: Sequence[Cell]) -> list[_Queue]:
    """Cells apart by the network that they meet; what shares none has a queue of its own."""
    linked: list[set[str]] = []
    for rows in _tables(cells):
        for members in by_defense(rows).values():
            for number in dict.fromkeys(map(network, members)):
                keys = {row.cell.key for row in members if network(row) == number}
                apart = [queue for queue in linked if not queue & keys]
                linked = [*apart, keys.union(*(queue for queue in linked if queue & keys))]
    order = {cell.key: number for number, cell in enumerate(cells)}
    queues = [sorted(queue, key=order.__getitem__) for queue in linked]
    return [_Queue(frozenset(queue), queue) for queue in sorted(queues, key=lambda queue: order[queue[0]])]


def _tables(cells: Iterable[Cell]) -> list[list[Row]]:
    """The cells that stand in one table each, as rows that nobody has run."""
    return list(by_setting(Row(cell, {}, ()) for cell in cells).values())


def _attack(cell: Cell) -> tuple[str, ...]:
    """An attack on one model, however that is defended."""
    return cell.attack.spec, cell.data_hash, cell.model.spec, cell.weights_hash
