"""Samples taken in their order until a figure is decided: how wide its interval is, or which rank a defense has.

Cells take turns in groups, a block of samples each, the same for all that are still open. After each turn of a group
its rows are looked at. Intervals and tests hold whenever a run stops (:mod:`bench.report.sequence`), so looking often
costs nothing but the looks.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bench.errors import ConfigError
from bench.plan.cell import Cell
from bench.plan.order import in_order
from bench.report.line import by_defense
from bench.report.outcomes import is_control
from bench.report.ranking import beaten
from bench.report.sequence import confidence_sequence
from bench.report.settings import by_setting
from bench.results.records import length
from bench.results.store import Row
from bench.run.worst_only import Stored, Turn
from bench.tracks import Contested, track_of

FIRST, GROWTH = 5, 8  # a first block is a fifth of a shard; each later one an eighth of what was taken, and no smaller


def looks(samples: int, first: int = 20) -> list[int]:
    """After how many of ``samples`` it is looked whether anything is decided, where the first block has so many."""
    found = [min(first, samples)]
    while found[-1] < samples:
        found.append(min(next_look(found[-1], first), samples))
    return found


def next_look(taken: int, first: int) -> int:
    """After how many samples it is looked next, where so many have been ``taken``."""
    return taken + max(first, taken // GROWTH)


class Rule(Protocol):
    """When it is decided."""

    def check(self, cells: Sequence[Cell]) -> None:
        """Whether anything can be decided early.

        Raises:
            ConfigError: so many samples cannot give such a width even if all of them stand; there are no two defenses
                to rank.
        """
        ...

    def groups(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """Those of ``cells`` that may stop early, and which of them are decided together."""
        ...

    def open(self, rows: Sequence[Row]) -> set[str]:
        """The keys of the cells of a group that have to go on, where these are their ``rows`` so far."""
        ...


@dataclass(frozen=True)
class Width:
    """Until the interval of what is left after all queries is at most ``points`` percentage points wide, end to end."""

    points: float

    def __str__(self) -> str:
        return f"width={self.points:g}"

    def groups(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        return [[cell] for cell in cells]

    def open(self, rows: Sequence[Row]) -> set[str]:
        return {row.cell.key for row in rows if self._width(row) > self.points}

    def check(self, cells: Sequence[Cell]) -> None:
        n = max((len(cell.ids) for cell in cells if cell.threat.asks), default=0)
        if (least := _width(confidence_sequence(n, n))) > self.points:
            raise ConfigError(
                f"--until width={self.points:g} takes more than the {n} samples of a cell, which give "
                f"{math.ceil(10 * least) / 10:g} at best; ask for a larger width, or raise n"
            )

    def _width(self, row: Row) -> float:
        left = track_of(row.cell).line(row, ()).left if row.stopped else None
        return _width(left[1].interval) if left else math.inf


def _width(interval: tuple[float, float]) -> float:
    low, high = interval
    return 100 * (high - low)


@dataclass(frozen=True)
class Ranked:
    """Until each defense that can be ranked has been told apart from all others of its table.

    Who cannot be ranked, and a pair that no test tells apart, goes on to the end.
    """

    def __str__(self) -> str:
        return "ranked"

    def groups(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """Cells whose defenses meet in a table, and those of tables that have some in common."""
        together: list[set[str]] = []
        for rows in _contests(Row(cell, {}, ()) for cell in cells):
            keys = {row.cell.key for row in rows if not is_control(row)}
            apart = [group for group in together if not group & keys]
            together = [*apart, keys.union(*(group for group in together if group & keys))]
        return [[cell for cell in cells if cell.key in group] for group in together]

    def open(self, rows: Sequence[Row]) -> set[str]:
        return {key for members in _contests(rows) for key in _undecided(members)}

    def check(self, cells: Sequence[Cell]) -> None:
        if not self.groups(cells):
            raise ConfigError(
                "--until ranked has no rank to decide: no two defenses meet attacks on a served model here; add "
                "another --defense, or ask for --until width=POINTS"
            )


def _contests(rows: Iterable[Row]) -> list[list[Row]]:
    """The tables of ``rows`` in which two defenses or more have worst cases to rank."""
    found = by_setting(rows).values()
    contested = (members for members in found if isinstance(track_of(members[0].cell), Contested))
    return [members for members in contested if len(by_defense(members)) > 1]


def _undecided(members: Sequence[Row]) -> set[str]:
    """The keys of cells of a table whose defenses have not been told apart from all others that can be ranked."""
    track = track_of(members[0].cell)
    by = beaten(track.contest(members)) if isinstance(track, Contested) else {}
    decided = {
        name for name in by
        if len(by) > 1 and all(other in by[name] or name in by[other] for other in by if other != name)
    }  # fmt: skip
    return {row.cell.key for name, rows in by_defense(members).items() if name not in decided for row in rows}


def parse(text: str) -> Width | Ranked:
    """Read ``width=2`` or ``ranked``.

    Raises:
        ConfigError: it is neither.
    """
    name, equals, value = text.partition("=")
    if text == "ranked":
        return Ranked()
    try:
        points = float(value)
    except ValueError:
        points = math.nan
    if name != "width" or not equals or not 0 < points < 100:
        raise ConfigError(f"until is {text!r}; say width=2, for an interval 2 points wide from end to end, or ranked")
    return Width(points)


class Until:
    """Gives cells their turns; see :mod:`bench.run.until`.

    Run on all samples at once are learners, controls where ranks are asked for, and what is not independent of the
    samples beside it. The first sample of a cell always runs, with which the served model is probed. A cell of which a
    turn has failed has no further one.
    """

    def __init__(
        self, rule: Rule, cells: Sequence[Cell], store: Stored, shard_size: int, entangled: Collection[str] = ()
    ) -> None:
        self._rule, self._store, self._first = rule, store, max(1, shard_size // FIRST)
        self._cells = {cell.key: cell for cell in cells}
        free = [cell for cell in cells if cell.threat.asks and cell.key not in entangled]
        self._groups = [_Group([cell.key for cell in group]) for group in rule.groups(free)]
        grouped = {key for group in self._groups for key in group.keys}
        self._whole = [cell.key for cell in cells if cell.key not in grouped]
        self._failed: set[str] = set()

    def first(self) -> list[Turn]:
        """What can begin at once."""
        whole = [Turn(key, self._store.missing(self._cells[key]), chosen=False) for key in self._whole]
        return [*whole, *(turn for group in self._groups for turn in self._next(group))]

    def after(self, turn: Turn) -> list[Turn]:
        """Whose turn it is when ``turn`` is at its end, well or badly: nobody's while others of its group are at it."""
        if set(turn.positions).intersection(self._store.missing(self._cells[turn.key])):
            self._failed.add(turn.key)
        group = next((group for group in self._groups if turn.key in group.keys), None)
        if group is None:
            return []
        group.at_it.discard(turn.key)
        return [] if group.at_it else self._next(group)

    def ended(self, key: str) -> bool:
        """Whether the cell ``key`` gets no turn any more."""
        return not any(key in group.keys and group.at_it for group in self._groups)

    def _next(self, group: "_Group") -> list[Turn]:
        rows = {key: self._store.row(self._cells[key]) for key in group.keys}
        going_on = self._rule.open(list(rows.values())) - self._failed
        open_ = [key for key in group.keys if key in going_on and not rows[key].complete]
        taken = {key: length(rows[key].prefix) for key in open_}
        least = min(taken.values(), default=0)
        until = next_look(least, self._first)
        turns = [Turn(key, self._block(key, until), chosen=True) for key in open_ if taken[key] < until]
        group.at_it = {turn.key for turn in turns}
        return turns

    def _block(self, key: str, until: int) -> list[int]:
        """What is missing of the first samples of a cell, ``until`` so many, and of its very first one."""
        cell = self._cells[key]
        wanted = {0, *in_order(cell.ids)[:until].tolist()}
        return sorted(wanted.intersection(self._store.missing(cell)))


@dataclass
class _Group:
    """Cells that are decided together, by their keys, and those of them whose turn has not come to its end."""

    keys: list[str]
    at_it: set[str] = field(default_factory=set)
