"""Rows beside published figures: who compares with whom, what is named, and the numbers, all worked out by hand."""

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest

from bench.oracle import NEVER
from bench.plan.cell import Component
from bench.report.beside_published import Match, match, render_matches
from bench.report.published import Figure, Ours, Published
from bench.report.sequence import confidence_sequence
from bench.report.stats import wilson
from bench.results.store import Row
from bench.threat import Threat
from tests.rows import learner, row
from tests.test_until import of

HITS = [0, 1, 10, 11, 100, NEVER, NEVER, NEVER]  # 7 of 8 right when clean; 5, 4 and 3 left at 10, 50 and 100 queries


def figure(**settings: Any) -> Figure:
    plain: dict[str, Any] = {
        "source": "Someone, 2020", "place": "table 1", "dataset": "digits", "model": "CNN", "attack": "Square",
        "norm": "linf", "eps": 8 / 255, "queries": 100, "metric": "robust accuracy", "value": 40.0,
        "spec": Ours(model="cnn", defense="none", attack="square"),
    }  # fmt: skip
    return Figure(**{**plain, **settings})


def pair(published: Figure, ours: Row, **copies: str) -> Match | None:
    found = match(Published([published], copies), [ours]).found
    assert len(found) <= 1
    return found[0] if found else None


def named(published: Figure, ours: Row, **copies: str) -> list[str]:
    result = pair(published, ours, **copies)
    assert result is not None
    return [str(difference) for difference in result.differences]


@pytest.mark.parametrize(
    ("settings", "value", "right", "n"),
    [
        ({"metric": "clean accuracy"}, 87.5, 7, 8),
        ({"queries": 10}, 62.5, 5, 8),
        ({"queries": 50}, 50.0, 4, 8),
        ({"queries": 100}, 37.5, 3, 8),
        ({"metric": "success rate", "queries": 50}, 300 / 7, 3, 7),
        ({"metric": "failure rate", "queries": 50}, 400 / 7, 4, 7),
    ],
)
def test_shares_are_measured_as_the_figure_means_them(settings, value, right, n):
    result = pair(figure(**settings), row(HITS))
    assert result is not None
    assert result.value == pytest.approx(value)
    assert result.interval == pytest.approx([100 * end for end in wilson(right, n)])
    assert result.difference == pytest.approx(value - 40)


@pytest.mark.parametrize(("metric", "right", "n"), [("robust accuracy", 3, 8), ("success rate", 4, 7)])
def test_what_could_have_stopped_at_any_image_has_the_interval_of_a_sequence(metric, right, n):
    result = pair(figure(metric=metric), of(row(HITS), list(range(8))))
    assert result is not None
    assert result.interval == pytest.approx([100 * end for end in confidence_sequence(right, n)])


@pytest.mark.parametrize(
    ("metric", "queries", "value"),
    [("mean queries", 100, 30.5), ("median queries", 100, 10.5), ("mean queries", 10, 5.5)],
)
def test_queries_are_averaged_over_the_samples_that_fell(metric, queries, value):
    result = pair(figure(metric=metric, queries=queries), row(HITS))
    assert result is not None
    assert (result.value, result.interval, result.inside) == (value, None, None)


def test_what_a_row_cannot_say_has_no_counterpart():
    assert pair(figure(metric="mean queries"), row([NEVER, NEVER])) is None
    assert pair(figure(metric="mean distance", value=0.5), row(HITS)) is None
    assert pair(figure(), row([], asked=4, error="boom")) is None


def test_the_change_of_logits_needs_no_attack():
    ours = row(HITS)
    changes = ours.records.assign(
        logit_change=1.5, probability_change=0.1, twin_pred=0, clean_pred=0, final_share=1.0,
        **{f"{when}_{name}": 0.5 for when in ("clean", "final") for name in ("confidence", "brier", "nll")},
    )  # fmt: skip
    published = figure(metric="logit difference", value=1.09, spec=Ours(defense="none"))
    result = pair(published, Row(ours.cell, changes, ours.shards))
    assert result is not None
    assert (result.value, result.interval) == (1.5, None)
    assert pair(published, ours) is None, "rows of earlier versions do not hold it"


@pytest.mark.parametrize(("value", "inside"), [(37.5, True), (13.7, True), (13.6, False), (69.4, True), (69.5, False)])
def test_inside_means_inside_the_wilson_interval(value, inside):
    result = pair(figure(value=value), row(HITS))  # 3 of 8: [13.68, 69.43]
    assert result is not None
    assert result.inside is inside


@pytest.mark.parametrize(
    "other",
    [
        {"dataset": "cifar10"},
        {"spec": Ours(defense="rnd", attack="square")},
        {"spec": Ours(defense="none", attack="pgd")},
        {"spec": Ours(defense="none")},
        {"spec": Ours(attack="square")},
        {"norm": "l2"},
        {"norm": None, "eps": None},
        {"eps": 4 / 255},
        {"metric": "test accuracy"},
    ],
)
def test_another_setting_does_not_compare(other):
    assert pair(figure(), row(HITS)) is not None
    assert pair(figure(**other), row(HITS)) is None


def test_equal_settings_differ_in_nothing():
    assert named(figure(n=8, quantise=False), row(HITS)) == []


def test_everything_that_differs_is_named():
    ours = row(HITS, "rnd(sigma=0.05)", "square(p_init=0.3)", data_hash="abc")
    cell = replace(
        ours.cell,
        defense=(Component("rnd(sigma=0.05)", params={"sigma": 0.05, "clip": True}),),
        attack=Component("square(p_init=0.3)", params={"p_init": 0.3, "loss": "margin"}),
    )
    published = figure(
        model="WRN-28-10",
        n=10000,
        eps=0.031,
        queries=2500,
        quantise=True,
        spec=Ours(defense="rnd(sigma=0.02, clip=true)", attack="square(p_init=0.05, loss=margin)"),
    )
    assert named(published, Row(cell, ours.records, ours.shards), abc="JPEG-coded copy") == [
        "model WRN-28-10 ≠ cnn",
        "data the original ≠ JPEG-coded copy",
        "n 10000 ≠ 8",
        "sigma 0.02 ≠ 0.05",
        "p_init 0.05 ≠ 0.3",
        "eps 0.031 ≠ 8/255",
        "queries 2500 ≠ 100",
        "input 8-bit ≠ float",
    ]


def test_states_of_the_row_are_differences_too():
    assert named(figure(), row(HITS, asked=9)) == ["row whole ≠ incomplete"]
    assert named(figure(queries=None), row(HITS)) == ["queries not stated ≠ 100"]
    rescaled = row(HITS, traits=("rescaled",))
    assert named(figure(), rescaled) == []
    assert named(figure(queries=10), rescaled) == ["schedule for its own budget ≠ for 100 queries"]
    assert named(figure(), row(HITS, data_hash="0123456789")) == ["data the original ≠ an unknown copy (01234567)"]


def test_a_model_that_is_the_defense_compares_with_itself_alone():
    hardened = figure(model="CNN-AT", defense="adversarial training", spec=Ours(model="cnn", attack="square"))
    undefended = figure(spec=Ours(defense="none", attack="square"))
    found = match(Published([hardened, undefended], {}), [row(HITS)]).found
    assert [each.figure.model for each in found] == ["CNN-AT"]
    assert pair(replace_model(hardened, "resnet20"), row(HITS)) is None


def replace_model(published: Figure, name: str) -> Figure:
    return published.model_copy(update={"spec": published.spec.model_copy(update={"model": name})})


def test_clean_accuracy_comes_once_whatever_the_attacks():
    rows = [row(HITS), row(HITS, attack="pgd"), row([NEVER] * 20, attack="rays")]
    (only,) = match(Published([figure(metric="clean accuracy")], {}), rows).found
    assert (only.n, only.value) == (20, 100)


def test_learners_compare_by_protection_and_recipe():
    published = figure(metric="test accuracy", queries=None, spec=Ours(defense="ops", attack="standard"))
    result = pair(published, learner(9, 10, "ops"))
    assert result is not None
    assert result.value == 10
    assert pair(published, learner(9, 10)) is None


PUBLISHED = Published([figure(), figure(queries=10, value=99, n=50), figure(dataset="mnist", defense="DENT")], {})


def test_markdown_shows_both_numbers_the_verdict_and_the_source():
    text = render_matches(match(PUBLISHED, [row(HITS)]), PUBLISHED, "md")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| [")]
    assert lines == [
        ["[1] @100", "40", "37.5 [14, 69]", "-2.5", "yes", ""],
        ["[1] @10", "99", "62.5 [31, 86]", "-36.5", "no", "n"],
    ]
    assert "n: 50 ≠ 8" in text
    assert "[1] CNN, Square: Someone, 2020, table 1" in text
    assert "2 of 3 published figures have rows here; 1 have not run (--all lists them)." in text
    assert "DENT" not in text
    listed = render_matches(match(PUBLISHED, [row(HITS)]), PUBLISHED, "md", show_missing=True)
    assert "- mnist · CNN · DENT · Square, linf 8/255: @100 40" in listed


def test_latex_has_a_table_for_each_row_and_names_its_sources():
    both = match(PUBLISHED, [row(HITS), row(HITS, defense="rnd")])
    text = render_matches(both, PUBLISHED, "latex", show_missing=True)
    assert text.count(r"\begin{table}") == len({each.cell.key for each in both.found}) + 1
    assert "{[}1] @100 & 40 & 37.5 [14, 69] & -2.5 & yes &" in text
    assert "[1] CNN, Square: Someone, 2020, table 1." in text
    assert r"n: 50 $\neq$ 8." in text
    assert r"mnist $\cdot$ CNN $\cdot$ DENT $\cdot$ Square, linf 8/255 & @100 40" in text


def test_csv_and_json_hold_the_same_records():
    matches = match(PUBLISHED, [row(HITS)])
    from_json = json.loads(render_matches(matches, PUBLISHED, "json", show_missing=True))
    from_csv = list(csv.DictReader(io.StringIO(render_matches(matches, PUBLISHED, "csv", show_missing=True))))
    assert [record["differs"] for record in from_json] == ["", "n 50 ≠ 8", "not run"]
    assert [record["ours"] for record in from_json] == [37.5, 62.5, None]
    assert [record["ours"] for record in from_csv] == ["37.5", "62.5", ""]
    assert from_json[0]["inside"] is True
    assert from_json[0]["source"] == "Someone, 2020"
    assert len(json.loads(render_matches(matches, PUBLISHED, "json"))) == 2


def test_threats_of_other_access_do_not_matter_where_no_budget_is_stated():
    ours = row(HITS, attack="pgd", threat=Threat("linf", 8 / 255, "gradients", 100))
    assert named(figure(queries=None, spec=Ours(model="cnn", defense="none", attack="pgd")), ours) == []
