"""Intervals and paired tests that hold at every moment at which a run may stop, and at all of them together.

Both are bets against what is to be shown wrong, a mixture of bets on every other share with equal weights: while that
is true the capital grows to 1 / ``a`` at any time with a probability of at most ``a`` (Ville, 1939).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

HALVINGS = 60  # of an interval, until its end is one number


def confidence_sequence(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval in [0, 1] for a share of ``successes`` among the first ``n`` samples; all of it when ``n`` is 0.

    With a probability of at least ``confidence`` the intervals of all ``n`` hold the share, whatever made a run stop.

    Source: Robbins, 1970, Annals of Mathematical Statistics 41(5); the bound of Ville with a uniform mixture.
    """
    low, high = sequence_bounds(np.array(successes), n, confidence)
    return float(low), float(high)


def sequence_bounds(
    successes: NDArray[Any], n: NDArray[Any] | int, confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both ends of :func:`confidence_sequence`, for each of ``successes`` among so many of ``n``."""
    return _low(successes, n, confidence), 1 - _low(n - successes, n, confidence)


def _low(successes: NDArray[Any], n: NDArray[Any] | int, confidence: float) -> NDArray[np.float64]:
    """The least share against which the capital is below 1 / (1 - confidence): the capital falls from 0 to the mean."""
    least, most = np.zeros(np.shape(successes)), np.divide(successes, np.maximum(n, 1))
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        refuted = capital(successes, n - successes, middle) >= -np.log1p(-confidence)
        least, most = np.where(refuted, middle, least), np.where(refuted, most, middle)
    return np.where(successes == 0, 0.0, least)  # nothing rounds away from the end; and outwards where it does


def capital(successes: NDArray[Any], failures: NDArray[Any], share: NDArray[Any] | float) -> NDArray[np.float64]:
    """The logarithm of what a stake of 1 has become by betting against ``share`` on samples of so many outcomes."""
    alone = special.xlogy(successes, share) + special.xlog1py(failures, -share)
    return np.asarray(special.betaln(successes + 1, failures + 1) - alone)


class Told(NamedTuple):
    """What a paired test that may stop at any time has seen: its p-value, and who stood more often at that time."""

    p: NDArray[np.float64]
    lead: NDArray[np.float64]  # positive where it was the first


def paired_sequence(differences: NDArray[Any]) -> Told:
    """Whether two are right equally often, from their ``differences`` (..., n) on the same samples in their order.

    p is at most ``a`` at any time with a probability of at most ``a`` if a difference, where there is one, is as often
    for the one as for the other: what :func:`bench.report.stats.mcnemar` tests once, at a number of samples that was
    fixed before.
    """
    more, less = (np.cumsum(each, axis=-1) for each in (differences > 0, differences < 0))
    grown = capital(more, less, 0.5)
    if not grown.shape[-1]:
        return Told(np.ones(grown.shape[:-1]), np.zeros(grown.shape[:-1]))
    at = np.argmax(grown, axis=-1)[..., None]
    most, lead = (np.take_along_axis(each, at, axis=-1)[..., 0] for each in (grown, more - less))
    return Told(np.minimum(np.exp(-most), 1), lead)
