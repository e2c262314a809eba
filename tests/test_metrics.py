"""Figures of samples, against sums done by hand and samplers whose answer is known."""

import math

import numpy as np
import pytest

from bench.metrics import (
    adaptive_calibration_error,
    calibration_error,
    log_query_curve_area,
    query_curve_area,
    query_statistics,
)


class TestCalibration:
    def test_known_bins(self):
        confidence, correct = np.array([1.0, 1.0, 0.5, 0.5]), np.array([True, False, True, False])
        assert calibration_error(confidence, correct) == pytest.approx(0.25)

    def test_bins_are_closed_above(self):
        edge = np.array([1 / 15, 2 / 15])  # (a, b]: each in a bin of its own
        assert calibration_error(edge, np.array([True, False])) == pytest.approx(16 / 30)

    def test_equal_mass_bins_split_what_one_wide_bin_mixes(self):
        confidence = np.linspace(0.94, 1.0, 150)  # all in the last equal-width bin
        correct = np.arange(150) < 143
        by_hand = np.abs((confidence - correct).reshape(15, 10).sum(axis=1)).sum() / 150
        assert adaptive_calibration_error(confidence[::-1], correct[::-1]) == pytest.approx(by_hand)
        assert by_hand > calibration_error(confidence, correct)

    @pytest.mark.parametrize("n", [1, 14, 15, 16, 29, 30, 200, 1000])
    def test_equal_bins_differ_by_one_sample_the_larger_ones_first(self, n):
        rng = np.random.default_rng(n)
        confidence, correct = np.sort(rng.uniform(size=n)), rng.uniform(size=n) < 0.5
        by_hand = sum(abs(part.sum()) for part in np.array_split(confidence - correct, 15)) / n
        assert adaptive_calibration_error(confidence, correct) == pytest.approx(by_hand)

    @pytest.mark.parametrize("error", [calibration_error, adaptive_calibration_error])
    def test_a_calibrated_sampler_has_none_but_noise(self, error):
        n = 60_000
        rng = np.random.default_rng(0)
        confidence = rng.uniform(0.1, 1, n)
        # Each of 15 bins of about n / 15 samples is off by at most sqrt(1/4 / (n / 15)) or so; four times that.
        assert error(confidence, rng.uniform(size=n) < confidence) < 4 * 0.5 * math.sqrt(15 / n)
        assert error(confidence, rng.uniform(size=n) < confidence - 0.1) == pytest.approx(0.1, abs=0.02)

    def test_no_samples_no_figure(self):
        assert math.isnan(calibration_error(np.zeros(0), np.zeros(0, dtype=bool)))


class TestQueries:
    hits = np.array([0, 1, 10, 40, math.inf, math.inf])

    def test_the_area_is_the_mean_accuracy_over_all_smaller_budgets(self):
        rng = np.random.default_rng(0)
        hits = np.where(rng.uniform(size=200) < 0.3, math.inf, rng.integers(0, 80, 200))
        accuracies = [(hits > queries).mean() for queries in range(50)]
        assert query_curve_area(hits, 50) == pytest.approx(np.mean(accuracies))

    def test_areas_go_from_none_to_all(self):
        for area in (query_curve_area, log_query_curve_area):
            assert area(np.zeros(3), 10) == 0
            assert area(np.full(3, math.inf), 10) == pytest.approx(1)
        assert log_query_curve_area(np.array([3.0]), 15) == pytest.approx(0.5)  # ln 4 / ln 16

    def test_statistics_by_hand(self):
        assert query_statistics(self.hits, 50) == {
            "success_rate": 3 / 5,
            "mean_queries": 17,
            "median_queries": 10,
            "restricted_mean_queries": (1 + 10 + 40 + 50 + 50) / 5,
            "censored_median_queries": 40,
        }

    def test_giving_up_lowers_the_mean_of_successes_and_nothing_else(self):
        whole = query_statistics(self.hits, 50)
        lazy = query_statistics(np.where(self.hits > 10, math.inf, self.hits), 50)
        assert lazy["mean_queries"] < whole["mean_queries"]
        assert lazy["restricted_mean_queries"] > whole["restricted_mean_queries"]
        assert lazy["censored_median_queries"] == math.inf

    def test_nobody_to_attack_is_no_figure(self):
        assert all(math.isnan(value) for value in query_statistics(np.zeros(4), 50).values())
