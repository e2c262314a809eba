"""Intervals and paired tests for shares of samples."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval in [0, 1] for a share of ``successes`` among ``n`` samples; all of it when ``n`` is 0."""
    low, high = wilson_bounds(np.array(successes), n, confidence)
    return float(low), float(high)


def wilson_bounds(
    successes: NDArray[Any], n: int, confidence: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both ends of :func:`wilson`, for each of ``successes`` among ``n`` samples.

    Source: Wilson, 1927, JASA 22(158).
    """
    if n == 0:
        return np.zeros(successes.shape), np.ones(successes.shape)
    z2 = float(special.ndtri((1 + confidence) / 2)) ** 2
    share = successes / n
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # Nothing rounds away from the ends.
    return np.where(successes == 0, 0.0, middle - half), np.where(successes == n, 1.0, middle + half)


def mcnemar(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Two-sided exact p-value that ``a`` and ``b`` (n,), outcomes on the same samples, are right equally often.

    Where they are shares of several networks that are right on a sample, it is the sign test over samples: networks
    that see one image are no independent draws.

    Source: McNemar, 1947, with the binomial distribution of the discordant pairs; 1 when there are none.
    """
    return float(mcnemar_of(np.array((a > b).sum()), np.array((a < b).sum())))


def mcnemar_of(more_a: NDArray[Any], more_b: NDArray[Any]) -> NDArray[np.float64]:
    """:func:`mcnemar` of so many samples that are right with ``a`` alone, and with ``b`` alone, for each pair.

    Twice the smaller tail of a fair coin, which is symmetric.
    """
    tail: NDArray[np.float64] = special.bdtr(np.minimum(more_a, more_b), more_a + more_b, 0.5)
    return np.minimum(2 * tail, 1)


def paired_t(differences: NDArray[Any]) -> float:
    """Two-sided p-value that ``differences`` (n,), of two on the same samples, are 0 on average; 1 of fewer than two.

    It is no smaller than where all signs of those that differ are equal by chance: a few that differ alike have no
    spread, and would seem beyond any doubt.

    Source: Student, 1908, Biometrika 6(1); the bound is the sign test's.
    """
    n, mean = len(differences), float(np.mean(differences)) if len(differences) else 0.0
    if n < 2 or mean == 0:
        return 1.0
    error = float(np.std(differences, ddof=1)) / np.sqrt(n)
    p = float(2 * special.stdtr(n - 1, -abs(mean) / error)) if error > 0 else 0.0
    return max(p, 2.0 ** (1 - int(np.count_nonzero(differences))))


def binomial_above(successes: int, n: int, share: float) -> float:
    """One-sided exact p-value that so many ``successes`` of ``n`` come of a ``share``, and not of a larger one."""
    return float(special.bdtrc(successes - 1, n, share)) if successes > 0 else 1.0


def fisher_below(table: NDArray[Any]) -> float:
    """One-sided exact p-value that the odds in the first row of ``table`` (2, 2) are those of the second, not smaller.

    Source: Fisher, 1922, JRSS 85(1); the hypergeometric distribution of the upper left given both margins.
    """
    (a, b), (c, d) = (int(value) for value in table[0]), (int(value) for value in table[1])
    upper = np.arange(max(0, a - d), a + 1)  # what may stand in the upper left, up to what does

    def ways(n: int, k: NDArray[Any]) -> NDArray[np.float64]:
        """The logarithm of n over k."""
        return np.asarray(-special.betaln(1 + n - k, 1 + k) - np.log(n + 1))

    logs = ways(a + b, upper) + ways(c + d, a + c - upper) - ways(a + b + c + d, np.array(a + c))
    return min(1.0, float(np.exp(special.logsumexp(logs))))


def paired_bootstrap(
    a: NDArray[Any], b: NDArray[Any], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The interval in [-1, 1] for the mean of ``a`` minus that of ``b`` (n,), outcomes on the same samples.

    The percentiles of the difference over ``resamples`` draws of n samples with replacement. A draw matters only by
    how many samples it holds of each difference, of which there are three where outcomes are right or wrong, and these
    counts are multinomial.

    Source: Efron, 1979, Annals of Statistics 7(1).
    """
    n = len(a)
    if n == 0:
        return -1.0, 1.0
    differences, counts = np.unique(a.astype(float) - b.astype(float), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)  # (resamples, differences)
    low, high = np.quantile(drawn @ differences / n, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """p-values (m,) adjusted for ``m`` tests at once (Holm, 1979)."""
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1)
    result = np.empty_like(adjusted)
    result[order] = adjusted
    return result
