"""What the records of a row say: who was right when clean, after so many queries and in the end."""

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report.sequence import confidence_sequence
from bench.report.stats import wilson
from bench.results.records import Columns, joined, length, rows_of
from bench.results.store import Row
from bench.rules import NEVER

_FRAME = re.compile(r'^ +File "(.+)", line (\d+)', re.MULTILINE)  # of a traceback
_NOTHING = np.zeros(0)
_OUR_ERROR = re.compile(r"^bench\.errors\.\w+: ")  # whose message says it all


@dataclass(frozen=True)
class Share:
    """A share of samples, of one network or on average over several, each with its own outcome on every sample.

    The interval, 95 % Wilson, is that of the images; how far networks are apart is their standard deviation. Nothing
    when there are no samples. Where outcomes have decided how many samples there are, it is that of a confidence
    ``sequence``.
    """

    right: NDArray[np.bool_]  # (n,), or (networks, n)
    sequence: bool = False

    @property
    def n(self) -> int:
        return int(self.right.shape[-1])

    @property
    def networks(self) -> int:
        return 1 if self.right.ndim == 1 else len(self.right)

    @cached_property
    def value(self) -> float:
        return float(self.right.mean()) if self.n else float("nan")

    @property
    def spread(self) -> float:
        """The standard deviation over networks."""
        return float(self.right.mean(axis=1).std(ddof=1)) if self.networks > 1 and self.n else 0.0

    @property
    def by_sample(self) -> NDArray[Any]:
        """(n,) whether it is right on each sample; of several networks, the share of them."""
        return self.right if self.right.ndim == 1 else self.right.mean(axis=0)

    @cached_property
    def interval(self) -> tuple[float, float]:
        successes = round(self.value * self.n) if self.n else 0
        return (confidence_sequence if self.sequence else wilson)(successes, self.n)

    def __str__(self) -> str:
        return self.text()

    def text(self, interval: bool = True) -> str:
        """In percent, with the spread over several networks and, if wanted, the interval of the images."""
        if not self.n:
            return ""
        low, high = self.interval
        digits = 0 if self.n < 1000 else 1  # below, the ends are further apart than any decimal of theirs
        spread = f" ± {100 * self.spread:.1f}" if self.networks > 1 else ""
        ends = f" [{100 * low:.{digits}f}, {100 * high:.{digits}f}]" if interval else ""
        return f"{100 * self.value:.1f}{spread}{ends}"


def column(row: Row, name: str) -> NDArray[Any]:
    """A column of the records, one entry for each sample; empty where the row does not have it."""
    return row.columns.get(name, _NOTHING)


def distances(row: Row) -> NDArray[np.float64]:
    """(n,) of the nearest misclassified query that a minimum-norm attack found; infinite where none is, and of others.
    """
    found = column(row, "best_distance").astype(float)
    return np.where(np.isnan(found), math.inf, found) if len(found) else np.full(row.n, math.inf)


def query_budget(row: Row) -> int:
    """How many queries each sample could cost; 0 for a learner."""
    return row.cell.threat.query_budget or 0


def clean(row: Row) -> Share:
    """Right before any attack."""
    return Share(column(row, "first_hit") != 0, row.sequential)


def robust(row: Row, queries: int) -> Share:
    """Right when clean, and not beaten by any of the first ``queries``; nothing beyond what the row was run with."""
    if queries > query_budget(row):
        return Share(np.zeros(0, dtype=bool))
    hit = column(row, "first_hit")
    return Share((hit == NEVER) | (hit > queries), row.sequential)


def final(row: Row) -> Share:
    """Right when clean, and right on the final example, re-evaluated in plain float32."""
    right = (column(row, "first_hit") != 0) & (column(row, "final_pred") == column(row, "y"))
    return Share(right, row.sequential)


def standing(row: Row, queries: int) -> Share:
    """Not beaten by any of the first ``queries``, by :func:`robust`, nor by a final example that came of no hit.

    Where no query was a hit and the final example is wrong all the same, the search was answered in another precision
    than the one that counts: the sample has fallen, and the search has not seen it.
    """
    held = robust(row, queries).right
    unseen = (column(row, "first_hit") == NEVER) & (column(row, "final_pred") != column(row, "y"))
    return Share(held & ~unseen if len(held) else held, row.sequential)


def lasting(row: Row, queries: int) -> Share:
    """Like :func:`robust`, but a sample counts as beaten only where its example is wrong when re-evaluated, too.

    For random defenses, whose first hit may be luck. The search ended at that hit, so this is what it had come to, and
    not what it would have found by going on.
    """
    beaten_for_good = column(row, "final_pred") != column(row, "y")
    held = robust(row, queries).right
    return Share(held | (clean(row).right & ~beaten_for_good) if len(held) else held, row.sequential)


def tested(row: Row) -> Share:
    """Right on clean test images, for the network that a learner has trained."""
    return Share(column(row, "final_pred") == column(row, "y"), row.sequential)


RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)  # that papers print


def certified_radius(row: Row) -> NDArray[Any]:
    """(n,) within which each sample is proven right; 0 where it is wrong, or where the certifier abstained."""
    return np.where(column(row, "final_pred") == column(row, "y"), column(row, "radius"), 0.0)


def certified(row: Row, radius: float) -> Share:
    """Proven right within ``radius`` at least."""
    right = (column(row, "final_pred") == column(row, "y")) & ~column(row, "abstained").astype(bool)
    return Share(right & (column(row, "radius") >= radius))


def radii(rows: Sequence[Row]) -> list[float]:
    """Of :data:`RADII`, those that the draws of ``rows`` could have proven."""
    most = max((float(column(row, "radius_most").max(initial=0)) for row in rows), default=0.0)
    return [radius for radius in RADII if radius <= most] or [0.0]


def is_control(row: Row) -> bool:
    """Whether its attack works on the undefended network, which no attacker of a service has."""
    return row.cell.attack.control


def taken(row: Row) -> Row:
    """``row`` with the samples that it took in order, where it has stopped, as its records: then its shares have
    intervals of a sequence."""
    return Row(row.cell, row.prefix, row.shards) if row.stopped else row


def seen(row: Row) -> Row:
    """``row`` with all that it has measured as its records: for what is said of single samples, never for a share."""
    return Row(row.cell, row.measured, row.shards) if row.partial else row


def restricted(row: Row, ids: Collection[int]) -> Row:
    """``row`` with the records of the samples ``ids`` alone, in the order of their numbers."""
    kept = list(ids)
    if row.partial:
        row = replace(row, cell=replace(row.cell, ids=tuple(sorted(set(row.cell.ids).intersection(kept)))))
    columns, partial = _of_samples(row.columns, kept), _of_samples(row.partial, kept)
    unchanged = columns is row.columns and partial is row.partial
    return row if unchanged else replace(row, columns=columns, partial=partial)


def _of_samples(records: Columns, ids: list[int]) -> Columns:
    if not length(records):
        return records
    samples = records["sample_id"]
    if np.array_equal(samples, ids) and (samples[1:] > samples[:-1]).all():  # all of them, as a rule
        return records
    kept = np.flatnonzero(np.isin(samples, ids))
    return rows_of(records, kept[np.argsort(samples[kept], kind="stable")])


def aligned(values: NDArray[Any], samples: NDArray[Any], wanted: Sequence[int], missing: Any) -> NDArray[Any]:
    """``values`` of ``samples`` for those that are ``wanted``, in their order; ``missing`` where there is none."""
    found = np.full(len(wanted), missing)
    _, here, there = np.intersect1d(wanted, samples, return_indices=True)
    found[here] = values[there]
    return found


def within(row: Row, budget: int) -> Row:
    """``row`` as its first ``budget`` queries say; its final examples are still those of all that it had."""
    threat = replace(row.cell.threat, query_budget=budget)
    columns, partial = (_within(table, budget) for table in (row.columns, row.partial))
    return replace(row, cell=replace(row.cell, threat=threat), columns=columns, partial=partial)


def _within(records: Columns, budget: int) -> Columns:
    if not length(records):
        return {}
    hits = records["first_hit"]
    return {**records, "first_hit": np.where(hits > budget, NEVER, hits)}


def network(row: Row) -> int | None:
    """Which of several networks its figures belong to: each seed trains one; weights that are given are one for all.

    So is a service, whose weights nobody has seen. A learner always trains one: it is given no weights.
    """
    trains = any(part.stage in ("data", "training") for part in row.cell.defense)
    given = row.cell.weights_hash or "service" in row.cell.model.traits
    return row.cell.seed if trains or not given else None


def under_all(networks: list[list[Row]], ids: Sequence[int], right: Callable[[Row], Any]) -> Share:
    """The samples that are right under every attack on a network, for each of the networks.

    A sample that fell to one attack has fallen, whatever others would have done to it. One that stood under all that
    met it stands where no attack has passed it by; where one has, nobody knows, and there is no share.

    Args:
        networks: rows by network, of these samples alone; see :func:`restricted`.
        ids: (n,) the samples, ascending.
        right: (n,) of a row.
    """
    each = [_pooled(rows, np.asarray(ids), right) for rows in networks]
    if any((held & passed).any() for held, passed in each):
        return Share(np.zeros(0, dtype=bool))
    sequence = any(row.sequential for rows in networks for row in rows)
    return Share(each[0][0] if len(each) == 1 else np.stack([held for held, _ in each]), sequence)


def _pooled(rows: list[Row], ids: NDArray[Any], right: Callable[[Row], Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(n,) whether a sample is right under all ``rows`` that met it, and (n,) whether one of them has not."""
    whole = [right(row) for row in rows if not row.partial]
    held = np.logical_and.reduce(whole) if whole else np.ones(len(ids), dtype=bool)
    passed = np.zeros(len(ids), dtype=bool)
    for row in rows:
        if row.partial:
            met = np.isin(ids, row.partial["sample_id"])
            held[met] &= right(seen(row))
            passed |= ~met
    return held, passed


def first_answers(rows: list[Row]) -> list[Row]:
    """The rows of a network that tell its answers to clean images, which no attack changes, and no seed but of a random
    defense: those that met all samples; where there are none, what the others met together."""
    known: dict[int, list[Row]] = {}
    for row in rows:
        random = any("random" in part.traits for part in row.cell.defense)
        known.setdefault(row.cell.seed if random else 0, []).append(row)
    return [row for same in known.values() for row in _whole(same) or [_together(same)]]


def _whole(rows: list[Row]) -> list[Row]:
    return [row for row in rows if not row.partial]


def _together(rows: list[Row]) -> Row:
    """The partial ``rows``, one for all, with each sample once."""
    return replace(rows[0], partial=joined([row.partial for row in rows]))


def scope(row: Row) -> set[int]:
    """The samples that a row can speak of beside others: those that it met, or passed by because they had fallen."""
    return set(row.cell.ids) if row.partial else set(column(row, "sample_id").tolist())


def failure(row: Row) -> str:
    """The last line of its last error, and where in a user's file; empty where none of its shards has failed."""
    if not row.errors:
        return ""
    trace = row.errors[-1].strip()
    said = _OUR_ERROR.sub("", trace.splitlines()[-1].strip()) if trace else "an error without a message"
    named = " ".join(component.spec for component in (row.cell.model, *row.cell.defense, row.cell.attack))
    places = [(Path(file).name, line) for file, line in _FRAME.findall(trace)]
    own = [f" ({file}, line {line})" for file, line in places if re.search(rf"(?<![\w.-]){re.escape(file)}:", named)]
    return said + (own[-1] if own else "")
