"""Intervals and tests, against values worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from bench.report.stats import binomial_above, fisher_below, holm, mcnemar, paired_bootstrap, paired_t, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe, 1998, Statistics in Medicine 17, table I, method 3, to four digits
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (5, 5), (3, 7), (999, 1000)])
def test_wilson_solves_its_equation(successes, n):
    share = successes / n
    for bound in wilson(successes, n):  # |p - share| = z sqrt(p (1 - p) / n)
        assert abs(bound - share) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), abs=1e-6)


def test_no_samples_leave_everything_open():
    assert wilson(0, 0) == (0.0, 1.0)


def test_intervals_cover_the_truth_as_often_as_they_say():
    trials, n, share = 2000, 100, 0.7
    draws = np.random.default_rng(0).binomial(n, share, trials)
    intervals = {successes: wilson(int(successes), n) for successes in set(draws.tolist())}
    covered = np.mean([intervals[successes][0] <= share <= intervals[successes][1] for successes in draws.tolist()])
    # Coverage at n = 100 is within a point of 95 %; the rest is two standard errors of the simulation.
    assert covered == pytest.approx(0.95, abs=0.01 + 2 * math.sqrt(0.95 * 0.05 / trials))


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 2**5), (0, 6, 2 / 2**6), (4, 1, 2 * (1 + 5) / 2**5), (3, 3, 1.0)],
)
def test_mcnemar_is_the_binomial_test_of_the_pairs_that_differ(only_a, only_b, p):
    a, b = outcomes(only_a, only_b, both=7, neither=4)  # the last two have no say
    assert mcnemar(a, b) == pytest.approx(p)
    assert mcnemar(b, a) == pytest.approx(p)


def outcomes(only_a: int, only_b: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.array([True] * only_a + [False] * only_b + [True] * both + [False] * neither)
    b = np.array([False] * only_a + [True] * only_b + [True] * both + [False] * neither)
    return a, b


class TestPairedBootstrap:
    def test_it_is_the_percentile_interval_of_resampled_indices(self):
        a, b = outcomes(12, 5, 20, 13)
        rng, n, resamples = np.random.default_rng(1), len(a), 4000
        drawn = [a[rows].mean() - b[rows].mean() for rows in rng.integers(0, n, (resamples, n))]
        reference = np.quantile(drawn, [0.025, 0.975])
        # The ends are multiples of 1 / n, and a percentile of 4,000 draws has a standard error below half of that.
        assert paired_bootstrap(a, b) == pytest.approx(reference, abs=1.01 / n)

    def test_it_approaches_the_normal_interval_of_the_difference(self):
        a, b = outcomes(3000, 1000, 4000, 2000)
        n, share_a, share_b = 10_000, 0.3, 0.1
        deviation = math.sqrt((share_a + share_b - (share_a - share_b) ** 2) / n)
        expected = (0.2 - 1.96 * deviation, 0.2 + 1.96 * deviation)
        # Standard error of a 2.5 % percentile: sqrt(0.025 * 0.975 / 10,000) over the density there, 0.0584 / deviation.
        error = deviation * math.sqrt(0.025 * 0.975 / 10_000) / 0.0584
        assert paired_bootstrap(a, b) == pytest.approx(expected, abs=4 * error + 1 / n)

    def test_pairs_that_agree_leave_no_doubt_and_narrow_it(self):
        assert paired_bootstrap(*outcomes(0, 0, 7, 4)) == (0, 0)
        assert paired_bootstrap(*outcomes(9, 0, 0, 0)) == (1, 1)
        assert paired_bootstrap(*outcomes(0, 9, 0, 0)) == (-1, -1)
        (low, high), (near, far) = paired_bootstrap(*outcomes(9, 9, 0, 0)), paired_bootstrap(*outcomes(9, 9, 50, 50))
        assert low < near < 0 < far < high

    def test_swapping_the_sides_turns_the_sign(self):
        a, b = outcomes(30, 10, 40, 20)
        low, high = paired_bootstrap(a, b)
        assert paired_bootstrap(b, a) == pytest.approx((-high, -low), abs=2.01 / len(a))  # other draws

    def test_it_repeats_and_without_samples_leaves_everything_open(self):
        a, b = outcomes(12, 5, 20, 13)
        assert paired_bootstrap(a, b) == paired_bootstrap(a, b)
        assert paired_bootstrap(a[:0], b[:0]) == (-1, 1)


def test_holm_multiplies_the_smallest_most_and_never_turns_the_order():
    # Sorted 0.005, 0.01, 0.03, 0.04 become 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 raised to what comes before it.
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])
    assert holm(np.array([0.02])) == pytest.approx([0.02])


def test_holm_is_its_definition_on_random_tables():
    """Of m values in order, the largest of (m - j) p_j up to each, at most 1; ties take one value."""
    rng = np.random.default_rng(0)
    for m in rng.integers(1, 60, 40).tolist():
        p = (rng.random(m) ** 3).round(2)  # so that some are equal
        ordered = np.sort(p)
        adjusted = [min(1.0, max((m - j) * ordered[j] for j in range(place + 1))) for place in range(m)]
        expected = [adjusted[int(np.searchsorted(ordered, one, side="left"))] for one in p]
        assert holm(p) == pytest.approx(expected, abs=1e-12)


def test_intervals_and_tests_are_those_of_scipy_on_random_tables():
    rng = np.random.default_rng(0)
    for n in rng.integers(1, 2000, 60).tolist():
        table = rng.multinomial(n, rng.dirichlet(np.ones(4))).reshape(2, 2)
        hits, share = int(rng.integers(0, n + 1)), float(rng.random())
        found = stats.binomtest(hits, n)
        assert wilson(hits, n) == pytest.approx(found.proportion_ci(method="wilson"), abs=1e-9)
        above = stats.binomtest(hits, n, share, alternative="greater").pvalue
        assert binomial_above(hits, n, share) == pytest.approx(above, abs=1e-9)
        assert fisher_below(table) == pytest.approx(stats.fisher_exact(table, alternative="less").pvalue, abs=1e-9)
        right = np.repeat([[True, True], [True, False], [False, True], [False, False]], table.ravel(), axis=0)
        b, c = int(table[0, 1]), int(table[1, 0])
        exact = stats.binomtest(b, b + c).pvalue if b + c else 1.0
        assert mcnemar(right[:, 0], right[:, 1]) == pytest.approx(exact, abs=1e-9)
        differences = rng.normal(0.02, 0.3, n + 60)  # so many that the bound by their signs is none
        assert paired_t(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=1e-9)
