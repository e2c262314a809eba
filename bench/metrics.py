"""Figures of a set of samples, from what was recorded about each: calibration, and what queries achieved."""

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

BINS = 15  # of calibration errors


def calibration_error(confidence: Floats, correct: Bools) -> float:
    """Expected calibration error: the gap between confidence and accuracy in 15 equal bins (a, b], averaged by size.

    Args:
        confidence: (n,) in (0, 1], of the predicted classes.
        correct: (n,) whether these are right.

    Returns:
        From 0 to 1; NaN without samples.

    Source:
        Guo et al., 2017, arXiv:1706.04599, equation 3.
    """
    bins = calibration_bins(confidence)
    sums: Floats = np.bincount(bins, confidence - correct, minlength=BINS).astype(float)
    return _gap(sums, len(confidence))


def calibration_bins(confidence: Floats) -> NDArray[np.intp]:
    """(n,) which of 15 equal bins (a, b] each confidence lies in, 0 to 14."""
    bins: NDArray[np.intp] = np.ceil(confidence * BINS).astype(int) - 1
    return np.minimum(np.maximum(bins, 0), BINS - 1)


def adaptive_calibration_error(confidence: Floats, correct: Bools) -> float:
    """As :func:`calibration_error`, in 15 bins of equally many samples, sorted by confidence.

    Source:
        Nguyen and O'Connor, 2015, arXiv:1508.05154, section 3; the equal-mass form of Nixon et al., 2019,
        arXiv:1904.01685, for the top class alone.
    """
    order = np.argsort(confidence, kind="stable")
    size, larger = divmod(len(confidence), BINS)  # of bins, the first of which hold one more
    first, rest = np.split((confidence - correct)[order], [larger * (size + 1)])
    sums = [first.reshape(larger, size + 1).sum(axis=1), rest.reshape(BINS - larger, size).sum(axis=1)]
    return _gap(np.concatenate(sums), len(confidence))


def _gap(sums: Floats, n: int) -> float:
    return float(np.abs(sums).sum() / n) if n else math.nan


def query_curve_area(hits: Floats, budget: int) -> float:
    """The area under accuracy against queries, as a share of the whole: the mean of ``min(hit, budget) / budget``.

    Args:
        hits: (n,) query that beat each sample; 0 if it was wrong when clean, infinity if none did.
        budget: queries, 1 or more. Equals the mean accuracy at 0 .. budget - 1 queries.
    """
    return float(np.minimum(hits, budget).mean() / budget) if len(hits) else math.nan


def log_query_curve_area(hits: Floats, budget: int) -> float:
    """As :func:`query_curve_area` over ``ln(1 + queries)``, which gives the first hundreds of queries their weight."""
    return float(np.log1p(np.minimum(hits, budget)).mean() / math.log1p(budget)) if len(hits) else math.nan


def query_statistics(hits: Floats, budget: int) -> dict[str, float]:
    """What queries cost and achieved among the samples that were right when clean.

    Args:
        hits: as for :func:`query_curve_area`.

    Returns:
        ``success_rate``; ``mean_queries`` and ``median_queries`` of the successes, which fall when an attack gives up
        on hard samples; ``restricted_mean_queries``, the mean of ``min(hit, budget)``, and ``censored_median_queries``,
        infinity where fewer than half fell, which do not. NaN where there is nothing to average.
    """
    return {name: statistic(hits, budget) for name, statistic in QUERY_STATISTICS.items()}


def _success_rate(hits: Floats, budget: int) -> float:
    attacked = np.count_nonzero(hits > 0)
    return float(np.count_nonzero((hits > 0) & (hits <= budget)) / attacked) if attacked else math.nan


def _mean_queries(hits: Floats, budget: int) -> float:
    fallen = hits[(hits > 0) & (hits <= budget)]
    return float(fallen.mean()) if len(fallen) else math.nan


def _median_queries(hits: Floats, budget: int) -> float:
    fallen = hits[(hits > 0) & (hits <= budget)]
    if not len(fallen):
        return math.nan
    ordered = np.sort(fallen)
    return float(ordered[(len(fallen) - 1) // 2] + ordered[len(fallen) // 2]) / 2


def _restricted_mean_queries(hits: Floats, budget: int) -> float:
    attacked = hits[hits > 0]
    return float(np.minimum(attacked, budget).mean()) if len(attacked) else math.nan


def _censored_median_queries(hits: Floats, budget: int) -> float:
    """The query by which half of the samples have fallen; infinite if fewer than half have."""
    attacked = hits[hits > 0]
    if not len(attacked):
        return math.nan
    middle = float(np.sort(attacked)[(len(attacked) - 1) // 2])
    return middle if middle <= budget else math.inf


QUERY_STATISTICS: Mapping[str, Callable[[Floats, int], float]] = {
    "success_rate": _success_rate,
    "mean_queries": _mean_queries,
    "median_queries": _median_queries,
    "restricted_mean_queries": _restricted_mean_queries,
    "censored_median_queries": _censored_median_queries,
}  # each of :func:`query_statistics` by itself
