"""Values of samples, and who stands under attacks, on the samples that all of some rows have met."""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.report.outcomes import column, query_budget, robust
from bench.report.stats import mcnemar
from bench.results.store import Row

SIGNIFICANT = 0.01


class Samples(NamedTuple):
    """A value for each of some samples."""

    ids: NDArray[Any]
    by_sample: NDArray[Any]


def in_common(*parts: Samples) -> NDArray[Any]:
    """(n, parts) the values of the samples that all parts have, in the order of their numbers."""
    if _alike(parts):  # as a rule
        order = np.argsort(parts[0].ids)
        return np.stack([part.by_sample[order] for part in parts], axis=1)
    ids = common_ids(parts)
    return np.stack([part.by_sample[np.argsort(part.ids)[np.isin(np.sort(part.ids), ids)]] for part in parts], axis=1)


def common_ids(parts: Sequence[Samples]) -> NDArray[Any]:
    """The samples that all parts have, in the order of their numbers."""
    if _alike(parts):
        return np.sort(parts[0].ids)
    return reduce(np.intersect1d, (part.ids for part in parts))


def _alike(parts: Sequence[Samples]) -> bool:
    """Whether all parts have the same samples in the same order."""
    first = parts[0].ids
    return all(part.ids is first or np.array_equal(part.ids, first) for part in parts[1:])


def standing(rows: Sequence[Row], queries: int) -> Samples:
    """For the samples that all rows have met: whether none of them beat it in so many queries.

    A row with a smaller budget counts with what it had.
    """
    parts = [Samples(column(row, "sample_id"), robust(row, min(queries, query_budget(row))).right) for row in rows]
    if len(parts) == 1:
        return parts[0]
    return Samples(common_ids(parts), np.all(in_common(*parts), axis=1))


class Comparison(NamedTuple):
    """Who stands (n,) under one set of attacks and beside it under another, on their common samples."""

    left: NDArray[np.bool_]
    beside: NDArray[np.bool_]

    @property
    def n(self) -> int:
        return len(self.left)

    @property
    def gap(self) -> float:
        """By how much less is left than beside."""
        return int(np.count_nonzero(self.beside) - np.count_nonzero(self.left)) / self.n if self.n else 0.0

    @property
    def p(self) -> float:
        return mcnemar(self.left, self.beside)

    def exceeds(self, effect: float) -> bool:
        """Whether so much less is left than beside, and not by chance."""
        return self.gap > effect and self.p < SIGNIFICANT


def beside(ours: Samples, theirs: Samples) -> Comparison:
    """Who of ``ours`` stands, beside who of ``theirs``."""
    if _alike((ours, theirs)):  # as a rule, and a comparison does not depend on the order of its samples
        return Comparison(ours.by_sample, theirs.by_sample)
    both = in_common(ours, theirs)
    return Comparison(both[:, 0], both[:, 1])


def compared(ours: Sequence[Row], theirs: Sequence[Row], queries: int) -> Comparison:
    """Who stands under all of ``ours`` in so many queries, beside who stands under all of ``theirs``."""
    return beside(standing(ours, queries), standing(theirs, queries))
