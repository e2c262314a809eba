"""A defense as pictures show it, in numbers: accuracy against queries or radius, what attacks leave, calibration."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bench.metrics import BINS, calibration_bins
from bench.report.line import Line, attack_label, by_classifier, hardest
from bench.report.outcomes import (
    certified,
    certified_radius,
    column,
    distances,
    is_control,
    network,
    query_budget,
    restricted,
)  # fmt: skip
from bench.report.ranking import counted
from bench.report.sequence import sequence_bounds
from bench.report.stats import wilson_bounds
from bench.results.store import Row
from bench.threat import Norm

WORST, CONTROL = "#d9480f", "#9a9aa2"  # colours, of the worst case and of controls, on light and on dark paper
PALETTE = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5cc4", "#8c6d31", "#4d8076")  # of attacks
POINTS = 48  # of a curve, evenly spaced on a logarithmic scale
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Axis:
    """What curves run over: its ``name``, what stands below it, what ``measures`` of the images is shown, and
    ``reading``, a place on it in words, with ``%{x}`` for the number."""

    name: Literal["queries", "radius"]
    title: str
    measures: str
    reading: str
    about: str
    log: bool = False


QUERIES = Axis(
    "queries", "queries of each image", "robust accuracy", "%{x} queries",
    "Images that stand after so many queries, with 95 % intervals. Choose attacks in the legend.", log=True,
)  # fmt: skip
RADIUS = Axis(
    "radius", "certified radius (l2, pixel scale)", "certified accuracy", "radius %{x}",
    "Images that are right and proven to stay so within the radius, with 95 % intervals.",
)  # fmt: skip


def distance(norm: Norm) -> Axis:
    """Of curves over the radius of a ball in ``norm``, each from one run of a minimum-norm attack."""
    return Axis(
        "radius", f"radius ({norm}, pixel scale)", "robust accuracy", "radius %{x}",
        "Images of which no misclassified query was found within the radius, with 95 % intervals; a curve is from one "
        "run and begins at its radius, within which nothing is sought any nearer.",
    )  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """Accuracy (k,) at places ``at`` (k,), with the ends of its 95 % interval; that of a worst case is ``pooled``."""

    name: str
    at: Floats
    share: Floats
    low: Floats
    high: Floats
    control: bool = False
    pooled: bool = False


@dataclass(frozen=True)
class Graph:
    """Curves over one axis."""

    axis: Axis
    curves: list[Curve]


@dataclass(frozen=True)
class Bar:
    """What one attack leaves in the end, or all of them together, with the ends of the 95 % interval."""

    name: str
    share: float
    low: float
    high: float
    pooled: bool = False
    control: bool = False


@dataclass(frozen=True)
class Reliability:
    """By bin of confidence (b,), where there are images: the mean confidence, the accuracy and the number of images."""

    name: str
    confidence: Floats
    accuracy: Floats
    count: NDArray[np.int64]


@dataclass(frozen=True)
class Portrait:
    """All pictures of one defense in one setting; the worst case comes first, then the strongest attack."""

    graphs: list[Graph]
    bars: list[Bar]
    reliability: list[Reliability]


def portrait(rows: Sequence[Row], lines: Sequence[Line]) -> Portrait:
    """The pictures of a defense, from its rows in a table and its lines there, of which the first is its worst case.

    Where attacks met only what others had left, how soon samples fall to the worst of them is not known: no curves.
    """
    if certificates := overview(rows):
        return certificates
    served = [row for row in rows if query_budget(row) and row.n]
    whole = not any(row.partial for row in rows)
    asked = served if whole and any(name.startswith("@") for line in lines for name in line.shares) else []
    graphs = [Graph(QUERIES, _curves(asked, lines))] if asked else []
    if near := _distance_curves(served):
        graphs.append(Graph(distance(served[0].cell.threat.norm), near))
    return Portrait(graphs, _bars(lines), _reliabilities(lines))


def overview(rows: Sequence[Row]) -> Portrait | None:
    """One picture of all defenses of a table: of certificates, which have one curve each; ``None`` of others."""
    proven = [row for row in rows if row.n and row.cell.threat.proves]
    return Portrait([Graph(RADIUS, _certified_curves(proven))], [], []) if proven else None


def curve(name: str, rows: Sequence[Row]) -> Curve:
    """Accuracy against queries, each sample under whichever of ``rows`` beats it soonest; the mean over networks."""
    by_network: dict[int | None, list[Row]] = {}
    for row in rows:
        by_network.setdefault(network(row), []).append(row)
    common = sorted(_common(rows))
    queries = _places(max(query_budget(row) for row in rows))
    hits = [
        np.sort(np.min([restricted(row, common).hits for row in members], axis=0)) for members in by_network.values()
    ]
    n = len(common)
    stand = np.mean([n - np.searchsorted(each, queries, side="right") for each in hits], axis=0)
    bounds = sequence_bounds if any(row.sequential for row in rows) else wilson_bounds
    low, high = bounds(stand.round(), n)
    return Curve(name, queries, stand / max(n, 1), low, high, all(map(is_control, rows)))


@cache  # of all curves with this budget
def _places(budget: int) -> NDArray[Any]:
    """Numbers of queries up to ``budget``, at which a curve is drawn."""
    return np.unique(np.geomspace(1, budget, POINTS).round()).astype(int)


def _certified_curves(rows: Sequence[Row]) -> list[Curve]:
    """Certified accuracy over the radius, of each defense with each of its certifiers; the highest curve first."""
    pairs = by_classifier(rows)
    several = len({defense for defense, _ in pairs}) > 1
    found = [_certified_curve(f"{defense}, {certifier}" if several else certifier, members)
             for (defense, certifier), members in pairs.items()]  # fmt: skip
    return sorted(found, key=lambda each: -each.share.mean() * each.at[-1])


def _certified_curve(name: str, rows: Sequence[Row]) -> Curve:
    """Up to the largest radius that is proven of an image, and there down to zero."""
    common = _common(rows)
    whole = [restricted(row, common) for row in rows]
    at = np.linspace(0, max(float(certified_radius(row).max(initial=0)) for row in whole), POINTS)
    right = np.mean([[certified(row, radius).right.sum() for radius in at] for row in whole], axis=0)
    at, right = np.append(at, at[-1]), np.append(right, 0)
    low, high = wilson_bounds(right.round(), len(common))
    return Curve(name, at, right / max(len(common), 1), low, high)


def _distance_curves(rows: Sequence[Row]) -> list[Curve]:
    """Accuracy over the radius, of each minimum-norm attack that has found anything; the lowest curve first."""
    found = [_distance_curve(row) for row in rows if np.isfinite(distances(row)).any()]
    return sorted(found, key=lambda each: (each.control, each.share.mean()))


def _distance_curve(row: Row) -> Curve:
    """From the radius of the run on, within which nothing is sought any nearer, to the largest distance found."""
    wrong, nearest = column(row, "first_hit") == 0, distances(row)
    reached = np.where(wrong, -1.0, np.maximum(nearest, row.cell.threat.eps))
    at = np.linspace(row.cell.threat.eps, max(reached[np.isfinite(reached)].max(), row.cell.threat.eps), POINTS)
    stand = row.n - np.searchsorted(np.sort(reached), at, side="right")
    low, high = (sequence_bounds if row.sequential else wilson_bounds)(stand, row.n)
    return Curve(attack_label(row), at, stand / row.n, low, high, is_control(row))


def _common(rows: Sequence[Row]) -> set[int]:
    """The samples that all ``rows`` have met, by their numbers."""
    return set.intersection(*(set(column(row, "sample_id").tolist()) for row in rows))


def _curves(rows: Sequence[Row], lines: Sequence[Line]) -> list[Curve]:
    single = sorted((curve(attack_label(row), [row]) for row in rows), key=lambda each: (each.control, each.share[-1]))
    return single if len(rows) == 1 else [replace(curve(lines[0].attack, counted(rows)), pooled=True), *single]


def _bars(lines: Sequence[Line]) -> list[Bar]:
    """The worst case first, then attacks from the lowest share on, controls last."""
    found = []
    for place, line in enumerate(lines):
        if line.left:
            share = line.left[1]
            pooled = place == 0 and len(lines) > 1
            found.append(Bar(line.attack, share.value, *share.interval, pooled, "control" in line.marks))
    return sorted(found, key=lambda bar: (not bar.pooled, bar.control, bar.share))


def _reliabilities(lines: Sequence[Line]) -> list[Reliability]:
    """On clean images, and on the final examples of the attack that left the least of these."""
    least = hardest(lines)
    if least is None or least.row is None:
        return []
    sides = (("clean", "clean images"), ("final", f"after {least.attack}"))
    return list(filter(None, (_reliability(least.row, when, name) for when, name in sides)))


def _reliability(row: Row, when: str, name: str) -> Reliability | None:
    confidence = column(row, f"{when}_confidence").astype(float)
    if not len(confidence) or not np.isfinite(confidence).all():
        return None
    right = column(row, f"{when}_pred") == column(row, "y")
    bins = calibration_bins(confidence)
    count = np.bincount(bins, minlength=BINS)
    there = count > 0
    means = [np.bincount(bins, values, minlength=BINS)[there] / count[there] for values in (confidence, right)]
    return Reliability(name, means[0], means[1], count[there])


def shown(curves: Iterable[Curve], most: int) -> list[Curve]:
    """The worst case and the strongest attacks, ``most`` together, so that a picture can be read."""
    return [each for each in curves if not each.control][:most]
