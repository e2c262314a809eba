"""The certificate track: what is proven of a network, image by image, and within which radius."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from bench.plan.cell import Cell
from bench.report.figures import figures, placed
from bench.report.line import Line, attack_label, by_classifier, has_ranks, with_rank
from bench.report.marks import UNRANKED, marks_of
from bench.report.outcomes import (
    Share,
    certified,
    certified_radius,
    failure,
    network,
    radii,
    restricted,
    scope,
    under_all,
)
from bench.report.ranking import by_mean, ranks, tiers
from bench.results.store import Row
from bench.threat import Access
from bench.tracks.track import Progress, Tools, Words

if TYPE_CHECKING:
    from bench.measure.measured import Measured
    from bench.plan.tasks import Task

SHARD = 24  # images, which cost as many draws as hours of others' queries
WORDS = Words("certified", "certifier", "certifier", "What each certifier proves", "")
RADIUS = "r: images that are right, and proven to stay so within this radius at least"
RANKS = tiers("paired t-test on the certified radii of common images")


@dataclass(frozen=True)
class Certificate:
    """A :class:`bench.tracks.track.Track`; the better classifier is proven right within larger radii.

    What stands here is a defense with its certifier: together they are the classifier of which something is proven, so
    certifiers are no worst case of each other.
    """

    name: str = "certificate"
    accesses: frozenset[Access] = frozenset({"certificate"})
    beside: frozenset[Access] = frozenset()
    pools: bool = False
    heads: bool = False
    words: Words = WORDS
    measures: str = "certified accuracy"
    good: Literal["high", "low"] = "high"
    reading: str = (
        "The share of images that are right and proven to stay so, whatever moves them within the radius. High is good "
        "for the defense."
    )

    def shard_size(self, task: "Task", size: int) -> int:
        return min(size, SHARD)

    def measure(
        self, task: "Task", positions: Sequence[int], tools: Tools, progress: Progress
    ) -> "AbstractContextManager[Measured]":
        from bench.tracks.certifying import measure  # only here: who reads results needs no torch

        return measure(task, positions, tools, progress)

    def queries(self, task: "Task", samples: int) -> int | None:
        from bench.measure.contradiction import PASSES

        return samples * (int(task.attack.draws) + PASSES)  # type: ignore[union-attr]  # a certifier declares its draws

    def title(self, cell: Cell) -> str:
        return cell.setting

    def facts(self, cell: Cell) -> dict[str, str]:
        return {}

    def summary(self, row: Row) -> str:
        found = figures(row)
        told = (figure for figure in placed("certifier") if figure.name in found)
        parts = [f"{figure.label} {figure.text(found[figure.name])}" for figure in told]
        return ", ".join([f"certified {certified(row, 0.0)} %", *parts])

    def line(self, row: Row, budgets: Sequence[int]) -> Line:
        return _line([row], radii([row]))

    def lines(self, rows: Sequence[Row], budgets: Sequence[int]) -> list[Line]:
        """Each defense with each of its certifiers, over all of its networks; that of the largest mean radius first."""
        met = by_classifier(rows)
        shown, whole = radii(rows), [row for row in rows if not row.cell.limited] or list(rows)
        common = sorted(set.intersection(*(set(row.cell.ids) for row in whole)))
        seeds = max(len({row.cell.seed for row in members}) for members in met.values())
        lines = {pair: _line(members, shown, _short(members, common, seeds)) for pair, members in met.items()}
        held = {
            pair: np.mean([certified_radius(restricted(row, common)) for row in members], axis=0)
            for pair, members in met.items() if not lines[pair].marks & UNRANKED
        }  # fmt: skip
        ranked = ranks(held, by_mean)

        def order(pair: tuple[str, str]) -> tuple[float, ...]:
            return ranked.get(pair, len(met) + 1), -lines[pair].extra.get("ACR", 0.0)

        return [with_rank(lines[pair], ranked.get(pair), None) for pair in sorted(met, key=order)]

    def shares(self, rows: Sequence[Row], budgets: Sequence[int]) -> dict[str, Share]:
        return _shares(rows, radii(rows))

    def notes(self, lines: Sequence[Line]) -> list[str]:
        return [RADIUS, *([RANKS] if has_ranks(lines) else [])] if lines else []


def _line(rows: Sequence[Row], shown: Sequence[float], marks: frozenset[str] = frozenset()) -> Line:
    """The line of a classifier, of which each of ``rows`` is a network."""
    row, shares = rows[0], _shares(rows, shown)
    found = [figures(each) for each in rows]
    extra = {figure.name: float(np.mean([each[figure.name] for each in found if figure.name in each]))
             for figure in placed("certifier") if any(figure.name in each for each in found)}  # fmt: skip
    networks = len(set(map(network, rows)))
    name = f"{row.cell.attack.label} · {networks} networks" if networks > 1 else (
        attack_label(row, seed=network(row) is None)
    )
    n = next((share.n for share in shares.values()), 0)
    marks = marks.union(*map(marks_of, rows), {"incomplete"} if any(row.stopped for row in rows) else ())
    error = next(filter(None, map(failure, rows)), "")
    one = row if len(rows) == 1 else None
    return Line(row.cell.defense_label, name, shares, n, marks, extra=extra, row=one, error=error, says="r=0")


def _shares(rows: Sequence[Row], shown: Sequence[float]) -> dict[str, Share]:
    """The certified accuracy at each radius on the images that all networks have met, by column."""
    met = [row for row in rows if row.n]
    common = sorted(set.intersection(*map(scope, met))) if met else []
    networks: dict[int | None, list[Row]] = {}
    for row in met:
        networks.setdefault(network(row), []).append(restricted(row, common))
    if not met:
        return {f"r={radius:g}": Share(np.zeros(0, dtype=bool)) for radius in shown}
    return {f"r={radius:g}": under_all(list(networks.values()), common, partial(_right, radius)) for radius in shown}


def _right(radius: float, row: Row) -> "np.typing.NDArray[np.bool_]":
    return certified(row, radius).right


def _short(rows: Sequence[Row], ids: Sequence[int], seeds: int) -> frozenset[str]:
    """The mark of a classifier that has met fewer samples or seeds than others."""
    less = len({row.cell.seed for row in rows}) < seeds or any(not set(ids).issubset(row.cell.ids) for row in rows)
    return frozenset({"short"} if less else ())
