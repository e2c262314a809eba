"""Every figure of a row beside its accuracies: how it is computed, called, printed and explained, one entry each.

Tables, their legends, the keys of JSON and CSV and ``docs/figures.md`` are made of this catalogue. A new figure is an
entry in :data:`FIGURES`; it is computed from the records of rows and needs no new run, unless it wants what runs
measure once.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bench.metrics import (
    QUERY_STATISTICS,
    adaptive_calibration_error,
    calibration_error,
    log_query_curve_area,
    query_curve_area,
)
from bench.report.outcomes import certified_radius, column, distances, query_budget
from bench.results.store import Row

Place = Literal["defense", "attack", "certifier", "learner", ""]
HITS = ("first_hit",)


@dataclass(frozen=True)
class Figure:
    """One figure of one row.

    ``name`` is its key in JSON and CSV, ``label`` the head of its column in the table ``place``. ``better`` says which
    way a defense wants it. It is computed where the row has what it ``needs``, columns of records or what shards have
    measured once, and left out where it is NaN.
    """

    name: str
    label: str
    unit: str
    better: Literal["higher", "lower", ""]
    needs: tuple[str, ...]
    compute: Callable[[Row], float]
    sentence: str
    place: Place = ""
    form: str = "{:.2f}"
    scale: float = 1                 # of what is printed
    after: str = ""                  # the figure that stands behind an arrow in the same column
    infinite: str = "> all"          # what is printed for infinity
    least: Callable[[Row], float] | None = None  # below which it is not known: there it is printed as "≤ least"

    def of(self, row: Row) -> float:
        """Its value; NaN where the row does not say."""
        there = all(name in row.columns or name in row.figures for name in self.needs)
        return float(self.compute(row)) if there else math.nan

    def text(self, value: float, row: Row | None = None) -> str:
        """``value`` of ``row`` as people read it."""
        if math.isinf(value):
            return self.infinite
        bound = self.least is not None and row is not None and 0 < value <= self.least(row)
        return ("≤ " if bound else "") + self.form.format(self.scale * value)


def figures(row: Row) -> dict[str, float]:
    """Every figure of a row that its records give, by name."""
    found = {figure.name: figure.of(row) for figure in FIGURES}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def placed(place: Place) -> list[Figure]:
    """The figures that have a column in this table, in their order."""
    return [figure for figure in FIGURES if figure.place == place]


def legend(shown: Iterable[Figure]) -> str:
    """What the columns of these figures hold."""
    return "; ".join(f"{figure.label}: {figure.sentence}" for figure in shown)


def _mean(name: str) -> Callable[[Row], float]:
    return lambda row: float(column(row, name).mean())


def _stored(name: str) -> Callable[[Row], float]:
    """What shards have measured once."""
    return lambda row: row.figures[name]


def _total(name: str) -> Callable[[Row], float]:
    """What each shard has measured once, together."""
    return lambda row: sum(shard.figures.get(name, 0.0) for shard in row.shards)


def _calibration(error: Callable[[NDArray[Any], NDArray[Any]], float], when: str) -> Callable[[Row], float]:
    return lambda row: error(
        column(row, f"{when}_confidence").astype(float), column(row, f"{when}_pred") == column(row, "y")
    )


def _changed(row: Row) -> float:
    return float((column(row, "clean_pred") != column(row, "twin_pred")).mean())


def _expected(row: Row) -> float:
    return float(np.where(column(row, "first_hit") == 0, 0, column(row, "final_share")).mean())


def _of_queries(statistic: Callable[[NDArray[np.float64], int], float]) -> Callable[[Row], float]:
    return lambda row: statistic(row.hits, query_budget(row)) if query_budget(row) else math.nan


def _statistic(name: str) -> Callable[[Row], float]:
    return _of_queries(QUERY_STATISTICS[name])


def _fooled(row: Row) -> float:
    return float((column(row, "applied_pred") != column(row, "clean_pred")).mean())


def _dominance(classes: int) -> Callable[[Row], float]:
    """The share of images that fall into the ``classes`` most frequent ones."""
    return lambda row: float(np.sort(np.bincount(column(row, "applied_pred")))[-classes:].sum() / row.n)


def _size(name: str) -> Callable[[Row], float]:
    """The mean of a column over the samples that were attacked."""

    def mean(row: Row) -> float:
        attacked = column(row, "first_hit") != 0
        return float(column(row, name)[attacked].mean()) if attacked.any() and query_budget(row) else math.nan

    return mean


def _median_distance(row: Row) -> float:
    """Over the attacked samples; infinite where fewer than half were beaten at any distance, NaN for other attacks.

    A search ends when its sample falls, at a distance that says only that it is below the radius: it counts as that.
    """
    nearest = distances(row)[column(row, "first_hit") != 0]
    if not np.isfinite(nearest).any():
        return math.nan
    reached = np.maximum(nearest, row.cell.threat.eps)
    return float(np.sort(reached)[(len(reached) - 1) // 2])


def _twice(
    name: str, label: str, unit: str, needs: tuple[str, ...], of: Callable[[str], Callable[[Row], float]], form: str,
    sentence: str,
) -> tuple[Figure, Figure]:
    """A figure of the answers to clean images, and the same of those to final examples, behind an arrow."""
    before, after = ((*(f"{when}_{need}" for need in needs), "y") for when in ("clean", "final"))
    return (
        Figure(name, label, unit, "lower", before, of("clean"), sentence, "defense", form, after=f"attacked_{name}"),
        Figure(f"attacked_{name}", label, unit, "lower", after, of("final"), f"{sentence}, on final examples",
               form=form),
    )  # fmt: skip


FIGURES: tuple[Figure, ...] = (
    Figure(
        "changed_predictions", "changed", "%", "lower", ("clean_pred", "twin_pred"), _changed,
        "clean images that are given another class than without the defense", "defense", "{:.1f}", 100,
    ),
    Figure(
        "logit_change", "Δ logits", "logits", "lower", ("logit_change",), _mean("logit_change"),
        "mean l2 distance of the logits from those without the defense, on clean images", "defense",
    ),
    Figure(
        "probability_change", "Δ probs", "0 to 1", "lower", ("probability_change",), _mean("probability_change"),
        "mean total variation between the probabilities with the defense and without, on clean images", "defense",
        "{:.3f}",
    ),
    Figure("cost", "cost", "ratio", "lower", ("cost",), _stored("cost"),
           "time of a query over that of the undefended network", "defense"),
    Figure("false_alarms", "false alarms", "%", "lower", ("false_alarms",), _stored("false_alarms"),
           "clean images that a defense with a memory answers otherwise in a stream of clean images, each asked once, "
           "than where it has met no other", "defense", "{:.1f}", 100),
    Figure("defense_queries", "training queries", "questions", "", ("defense_queries",), _stored("defense_queries"),
           "answers of the network that an output defense took to be trained", "defense", "{:,.0f}"),
    Figure("probes", "probes", "questions", "", ("probes",), _stored("probes"),
           "questions that probing the service for red flags has cost, once for all attacks", "defense", "{:,.0f}"),
    *_twice("ece", "ECE", "%", ("confidence", "pred"), partial(_calibration, calibration_error), "{:.1%}",
            "expected calibration error, 15 bins of equal width"),
    *_twice("adaptive_ece", "adaptive ECE", "%", ("confidence", "pred"),
            partial(_calibration, adaptive_calibration_error), "{:.1%}",
            "the same in 15 bins of equally many images"),
    *_twice("brier", "Brier", "0 to 2", ("brier",), lambda when: _mean(f"{when}_brier"), "{:.2f}",
            "mean squared distance of the probabilities from the truth"),
    *_twice("nll", "NLL", "nats", ("nll",), lambda when: _mean(f"{when}_nll"), "{:.2f}",
            "mean of minus the logarithm of the true class's probability"),
    Figure("auc", "AUC", "0 to 1", "higher", HITS, _of_queries(query_curve_area),
           "area under accuracy against queries, of all images", "attack", "{:.3f}"),
    Figure("log_auc", "log AUC", "0 to 1", "higher", HITS, _of_queries(log_query_curve_area),
           "the same against the logarithm of 1 + queries", "attack", "{:.3f}"),
    Figure("success_rate", "success", "%", "lower", HITS, _statistic("success_rate"),
           "attacked images that a query beat", "attack", "{:.1%}"),
    Figure("mean_queries", "mean", "queries", "higher", HITS, _statistic("mean_queries"),
           "queries of the successes, which fall when an attack gives up on hard images", "attack", "{:.0f}"),
    Figure("median_queries", "median", "queries", "higher", HITS, _statistic("median_queries"),
           "their median", "attack", "{:.0f}"),
    Figure("restricted_mean_queries", "mean of all", "queries", "higher", HITS, _statistic("restricted_mean_queries"),
           "queries of all attacked images, those that stand with the whole budget", "attack", "{:.0f}"),
    Figure("censored_median_queries", "median of all", "queries", "higher", HITS, _statistic("censored_median_queries"),
           "their median, “> all” where fewer than half were beaten", "attack", "{:.0f}"),
    Figure("asked", "asked", "questions", "", ("asked",), _total("asked"),
           "questions that a service was really asked, to judge clean images and final examples, too; more than the "
           "queries of the attack, and fewer where answers are kept", "attack", "{:,.0f}"),
    Figure("linf", "linf", "pixel scale", "higher", (*HITS, "norm_linf"), _size("norm_linf"),
           "mean size of the final changes", "attack", "{:.4f}"),
    Figure("rmse", "RMSE", "pixel scale", "higher", (*HITS, "rmse"), _size("rmse"),
           "root mean square of the final changes of an image, averaged", "attack", "{:.4f}"),
    Figure(
        "surrogate_passes", "surrogate passes", "passes", "", (*HITS, "surrogate_forwards", "surrogate_backwards"),
        lambda row: _size("surrogate_forwards")(row) + _size("surrogate_backwards")(row),
        "forward and backward passes of each attacked image through the networks that its example was made on",
        "attack", "{:.0f}",
    ),
    Figure("fooling", "fooled", "%", "lower", ("applied_pred", "clean_pred"), _fooled,
           "images, also those misclassified when clean, that a perturbation for all images gives another class",
           "attack", "{:.1f}", 100),
    *(Figure(f"dominance_{classes}", f"top {classes}", "%", "lower", ("applied_pred",), _dominance(classes),
             f"images with that perturbation in the most frequent {'class' if classes == 1 else f'{classes} classes'}",
             "attack", "{:.1f}", 100) for classes in (1, 3, 5)),
    Figure("fit_fooling", "fooled in fit", "%", "lower", ("fit_fooling",), _stored("fit_fooling"),
           "held-out training images that it gives another class in the network that it was fitted to", "attack",
           "{:.1f}", 100),
    Figure("fit_fooling_unclipped", "unclipped", "%", "lower", ("fit_fooling_unclipped",),
           _stored("fit_fooling_unclipped"), "the same of sums that are not clamped to the box, which no service is "
           "asked about", "attack", "{:.1f}", 100),
    Figure(
        "median_distance", "distance", "norm of the threat", "higher", (*HITS, "best_distance"), _median_distance,
        "median distance of the nearest misclassified query of a minimum-norm attack, of all attacked images; a search "
        "ends at the radius, so “≤” it is all that is known of what fell; “none” where fewer than half have such a "
        "query", "attack", "{:.4f}", infinite="none", least=lambda row: row.cell.threat.eps,
    ),
    Figure("expected_accuracy", "expected", "%", "higher", ("first_hit", "final_share"), _expected,
           "mean share of fresh evaluations of the final example that are right", "attack", "{:.1%}"),
    Figure("ACR", "ACR", "l2, pixel scale", "higher", ("radius",), lambda row: float(certified_radius(row).mean()),
           "average certified radius of all images, 0 where the certified class is wrong or none is", "certifier",
           "{:.3f}"),
    Figure("abstained", "abstained", "%", "lower", ("abstained",), _mean("abstained"),
           "images of which the certifier says nothing", "certifier", "{:.1f}", 100),
    Figure("peak", "peak", "%", "lower", ("peak_test_accuracy",), _stored("peak_test_accuracy"),
           "test accuracy after the best epoch, chosen on the test images, which favours the learner", "learner",
           "{:.1f}", 100),
    Figure("train", "train", "%", "", ("train_accuracy",), _stored("train_accuracy"),
           "accuracy on the released images after the last epoch", "learner", "{:.1f}", 100),
    Figure("changed pixels", "changed pixels", "pixels", "lower", ("changed_pixels_mean",),
           _stored("changed_pixels_mean"), "mean number of places in an image that the protection changed", "learner"),
    Figure("PSNR", "PSNR", "dB", "higher", ("psnr",), _stored("psnr"),
           "of all pixels together, left out where nothing changed", "learner"),
)  # fmt: skip
BY_NAME = {figure.name: figure for figure in FIGURES}
