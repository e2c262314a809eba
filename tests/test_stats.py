"""Intervals and tests, against values worked out by hand."""

import math

import numpy as np
import pytest

from bench.stats import holm, mcnemar, wilson


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
    both, neither = 7, 4  # have no say
    a = np.array([True] * only_a + [False] * only_b + [True] * both + [False] * neither)
    b = np.array([False] * only_a + [True] * only_b + [True] * both + [False] * neither)
    assert mcnemar(a, b) == pytest.approx(p)
    assert mcnemar(b, a) == pytest.approx(p)


def test_holm_multiplies_the_smallest_most_and_never_turns_the_order():
    # Sorted 0.005, 0.01, 0.03, 0.04 become 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 raised to what comes before it.
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])
    assert holm(np.array([0.02])) == pytest.approx([0.02])
