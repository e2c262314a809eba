"""Two defenses on the same samples, from records of a few samples worked out by hand."""

import csv
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.errors import ConfigError
from bench.oracle import NEVER
from bench.plan.cell import Component
from bench.report.compare import Duel, duels
from bench.report.compare_table import render_duels
from bench.report.crossing import Crossing, crossing
from bench.report.stats import mcnemar, paired_bootstrap
from bench.report.two_runs import Run, duels_of_runs
from bench.results.store import Row
from bench.threat import Threat
from tests.rows import learner, row

A = [NEVER] * 6 + [5, 5]
B = [NEVER] * 2 + [50] * 4 + [5, 0]


def only(rows: list[Row], budgets: list[int] | None = None) -> Duel:
    (duel,) = duels(rows, "a", "b", budgets)
    return duel


def values(duel: Duel, attack: str = "square") -> dict[str, tuple[float, float]]:
    return {line.at: (line.a.value, line.b.value) for line in duel.lines if line.attack == attack}


def test_both_accuracies_at_every_budget_that_is_asked():
    duel = only([row(A, "a"), row(B, "b"), row(B, "c")], [10, 60])
    assert values(duel) == {"clean": (1, 7 / 8), "@10": (6 / 8, 6 / 8), "@60": (6 / 8, 2 / 8), "final": (6 / 8, 2 / 8)}
    at_60 = duel.lines[2]
    assert at_60.p_value == mcnemar(at_60.a.right, at_60.b.right) == 2 / 2**4  # four samples, all one way
    assert at_60.interval == paired_bootstrap(at_60.a.right, at_60.b.right)
    assert duel.n == 8


def test_samples_pair_by_their_number_and_not_by_their_place():
    a, b = row(A, "a"), row(B, "b")
    late = Row(b.cell, b.records[b.records["sample_id"] >= 2], b.shards)
    duel = only([a, late])
    assert duel.n == 6
    assert values(duel)["@100"] == (4 / 6, 0)


def test_the_worst_case_is_over_the_attacks_that_both_have_met():
    rows = [
        row([NEVER, NEVER, 7, NEVER], "a"), row([3, NEVER, NEVER, NEVER], "a", "pgd"), row([1] * 4, "a", "rays"),
        row([NEVER, 7, NEVER, NEVER], "b"), row([NEVER, NEVER, NEVER, 9], "b", "pgd"),
    ]  # fmt: skip
    duel = only(rows, [8])
    assert values(duel, "worst of 2")["@8"] == (2 / 4, 3 / 4)
    assert values(duel)["@8"] == (3 / 4, 3 / 4)
    assert values(duel, "rays") == {}
    assert duel.unshared == {"a": ["rays"], "b": []}
    assert "only a has met rays" in render_duels([duel], "md")


def test_learners_compare_by_test_accuracy():
    (duel,) = duels([learner(9, 10, "ops"), learner(1, 10)], "ops", "none")
    assert values(duel, "standard") == {"test": (0.1, 0.9)}


def test_models_and_threats_are_compared_apart():
    other = Threat("l2", 0.5, "scores", 100)
    found = duels([row(A, "a"), row(B, "b"), row(A, "a", threat=other), row(B, "b", threat=other)], "a", "b")
    assert [duel.setting for duel in found] == ["digits · cnn · l2 0.5", "digits · cnn · linf 8/255"]


@pytest.mark.parametrize(
    ("rows", "names", "budgets", "complaint"),
    [
        ([row(A, "aaa"), row(B, "rnd")], ("aab", "rnd"), None, "'aab'; did you mean 'aaa'? present: aaa, rnd"),
        ([row(A, "aaa"), row(B, "rnd")], ("rnd", "rnd"), None, "both defenses are rnd; name two of aaa, rnd"),
        ([row(A, "a"), row(B, "b", quantise=True)], ("a", "b"), None, "a and b share no setting: a has run on digits"),
        ([row(A, "a"), row(B, "b", weights_hash="1")], ("a", "b"), None, "share no setting"),
        ([row(A, "a"), row(B, "b", "pgd")], ("a", "b"), None, "share no finished attack on digits"),
        ([row(A, "a"), row([], "b", asked=8, error="boom")], ("a", "b"), None, "share no finished attack"),
        ([row(A, "a"), row(B, "b")], ("a", "b"), [10, 500], "budget is 500, but rows on digits"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_told_with_its_remedy(rows: list[Row], names: Any, budgets: Any, complaint: str):
    with pytest.raises(ConfigError) as caught:
        duels(rows, *names, budgets)
    assert complaint in str(caught.value)


def test_no_samples_in_common_is_an_error():
    b = row(B, "b")
    apart = Row(b.cell, b.records.assign(sample_id=b.records["sample_id"] + 100), b.shards)
    with pytest.raises(ConfigError, match=r"no samples in common on digits.*same n"):
        only([row(A, "a"), apart])


def test_markdown_fits_its_numbers_into_one_line_each():
    text = render_duels([only([row(A, "a"), row(B, "b")], [60])], "md")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    (line,) = [line for line in lines if line[1] == "@60"]
    assert line == ["", "@60", "75.0", "25.0", "+50.0 [+12, +88]", "4 : 0", "0.3750", ""]
    assert "8 samples in common" in text


def test_latex_has_the_better_one_in_bold_where_chance_does_not_explain_it():
    text = render_duels([only([row([NEVER] * 20 + [0], "a"), row([50] * 20 + [0], "b")], [10, 60])], "latex")
    assert r"\toprule" in text
    shown = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert [r"\textbf{95.2} & 0.0" in line for line in shown] == [False, False, False, True, True]
    assert text.count(r"\textbf") == 2
    assert r"5 \%" in text
    assert "−" not in text
    hostile = render_duels([only([row(A, "a"), row(B, "b"), row(A, "a", "x_y{"), row(B, "b", "x_y{")])], "latex")
    assert r"x\_y\{" in hostile


def test_the_better_protection_is_the_one_that_leaves_less():
    (duel,) = duels([learner(20, 20, "ops"), learner(1, 20)], "ops", "none")
    assert duel.better == ["a"]


def test_csv_and_json_hold_the_same_records():
    found = [only([row(A, "a"), row(B, "b")], [60])]
    from_json = json.loads(render_duels(found, "json"))
    from_csv = list(csv.DictReader(io.StringIO(render_duels(found, "csv"))))
    assert [record["at"] for record in from_json] == [record["at"] for record in from_csv] == ["clean", "@60", "final"]
    assert from_json[1]["difference"] == 0.5
    assert float(from_csv[1]["difference"]) == 0.5
    assert (from_json[1]["a alone"], from_json[1]["b alone"], from_json[1]["p"]) == (4, 0, 0.125)
    clean, at_60, final = (record["p holm"] for record in from_json)
    assert (at_60, final, clean) == (3 * 0.125, 3 * 0.125, 1.0), "three tests, of which the first differs nowhere"


def test_both_count_with_the_queries_that_both_had():
    duel = only([row([NEVER] * 4 + [100] * 4, "a", budget=150), row([NEVER] * 8, "b", budget=2)])
    assert values(duel) == {"clean": (1, 1), "@2": (1, 1)}, "what an attack ended with after more queries does not"
    with pytest.raises(ConfigError, match="budget is 150"):
        only([row(A, "a", budget=150), row(B, "b", budget=2)], [150])
    uneven = [row([9] * 8, "a", budget=150), row([NEVER] * 8, "b", budget=2)]
    uneven += [row([NEVER] * 8, name, "pgd", budget=150) for name in "ab"]
    assert values(only(uneven), "worst of 2") == {"clean": (1, 1), "@2": (1, 1), "@100": (1, 1), "@150": (1, 1)}


def test_numbers_and_seeds_that_differ_do_not_compare():
    with pytest.raises(ConfigError, match="share no setting"):
        only([row(A, "a"), row(B, "b", numerics="plain")])
    with pytest.raises(ConfigError, match="share no finished attack"):
        only([row(A, "a"), row(B, "b", seed=1)])


def test_networks_of_several_seeds_are_averaged():
    half = [NEVER] * 4 + [5] * 4
    rows = [row(hits, name, seed=seed) for name in "ab" for seed, hits in enumerate((half, half[::-1]))]
    assert values(only(rows), "square · 2 networks")["@100"] == (0.5, 0.5)
    given = [Row(replace(each.cell, weights_hash="w"), each.records, each.shards) for each in rows]
    assert values(only(given), "worst of 2")["@100"] == (0, 0)


def test_the_newest_version_is_compared_and_a_failure_is_told():
    old, new = row([5] * 8, "a"), row(A, "a")
    for each, version, day in ((old, "1+aaaa", "01"), (new, "1+bbbb", "02")):
        cell = replace(each.cell, defense=(Component("a", version=version),))
        facts = {"finished": f"2026-01-{day}T00:00:00+00:00"}
        shards = tuple(replace(shard, provenance=facts) for shard in each.shards)
        old, new = new, Row(cell, each.records, shards)
    failed = row([], "b", "nes", asked=8, error="Traceback\nRuntimeError: boom")
    duel = only([old, new, row(B, "b"), failed])
    assert values(duel)["@100"] == (6 / 8, 2 / 8)
    assert "b × nes failed: RuntimeError: boom" in render_duels([duel], "md")


def stepwise(a: list[Row], b: list[Row], queries: int) -> Crossing:
    """As :func:`crossing`, one number of queries after the other."""
    found, leader = Crossing(), ""
    for q in range(queries + 1):
        of_a, of_b = (
            sum(all(hits[i] == NEVER or hits[i] > q for hits in falls) for i in range(len(falls[0])))
            for falls in ([each.columns["first_hit"] for each in side] for side in (a, b))
        )
        ahead = "a" if of_a > of_b else "b" if of_b > of_a else leader
        if leader and ahead != leader:
            found = Crossing(found.times + 1, found.at if found.times else q, found.ahead or ahead)
        leader = ahead
    return found


def test_the_queries_at_which_curves_cross_are_those_of_a_loop_over_all_queries():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(30):
        sides = [
            [row([NEVER if hit > 40 else int(hit) for hit in rng.integers(0, 60, 12)], name, attack, budget=40)
             for attack in ("square", "pgd")]
            for name in "ab"
        ]  # fmt: skip
        duel = only([each for side in sides for each in side])
        met = [each.columns["first_hit"] for each in (sides[0][0], sides[1][0])]
        by_attack = {line.attack: line.crossing for line in duel.lines}
        assert by_attack["worst of 2"] == stepwise(*sides, 40)
        assert by_attack["square"] == stepwise([sides[0][0]], [sides[1][0]], 40), met
        seen |= {by_attack["square"].times}
    assert {0, 1, 2} <= seen


def test_ties_are_no_crossing_and_networks_count_by_their_mean():
    never = np.iinfo(np.int64).max
    a, b = np.array([[2, 9, 9, never]]), np.array([[3, 5, never, never]])
    assert crossing(a, b) == Crossing(2, 5, "a"), "B leads from 2, equal from 3, A from 5, equal, B from 9"
    assert crossing(a, a) == Crossing()
    assert crossing(np.array([[5, 9]]), np.array([[5, never]])) == Crossing(), "equal, then B alone"
    assert crossing(np.array([[0, 9]]), np.array([[4, 4]])) == Crossing(1, 4, "a")
    assert crossing(a, np.vstack([a, a])) == Crossing(), "thrice the networks, the same mean"


def test_a_crossing_stands_once_for_each_attack():
    (duel,) = duels([row([0, 9, 9, NEVER], "a"), row([3, 3, 4, NEVER], "b")], "a", "b", [5])
    cells = [line.split("|")[-2].strip() for line in render_duels([duel], "md").splitlines() if line.startswith("| ")]
    assert cells == ["cross at", "A 3", "", ""]
    records = json.loads(render_duels([duel], "json"))
    assert {(each["crossings"], each["cross at"], each["ahead from there"]) for each in records} == {(1, 3, "a")}
    assert "cross at" not in render_duels(duels([learner(9, 10, "ops"), learner(1, 10)], "ops", "none"), "md")


def test_nobody_knows_where_curves_cross_of_an_attack_that_met_what_others_had_left():
    thin = row([NEVER] * 4, "a", "pgd")
    kept = {name: values[2:] for name, values in thin.columns.items()}
    thin = Row(thin.cell, {}, thin.shards, kept)
    rows = [row([3, 3, NEVER, NEVER], "a"), thin, row([3] * 4, "b"), row([3] * 4, "b", "pgd")]
    crossings = {line.attack: line.crossing for line in only(rows).lines}
    assert crossings == {"worst of 2": None, "square": Crossing()}
    assert "| ?" in render_duels([only(rows)], "md")


def beside(a: list[Row], b: list[Row], defense: str | None = None) -> Duel:
    (duel,) = duels_of_runs(Run("first", a), Run("second", b), defense)
    return duel


def preset(before: Row, **params: Any) -> Row:
    cell = replace(before.cell, attack=replace(before.cell.attack, params=params))
    return Row(cell, before.columns, before.shards)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (preset(row(A, "a"), p=0.1), preset(row(B, "b"), p=0.8), "p is 0.1 in the first and 0.8 in the second"),
        (row(A, "a", traits=("rescaled",)), row(B, "b", traits=("rescaled",), budget=50), "made for is 100"),
    ],
)  # fmt: skip
def test_attacks_that_share_a_name_alone_do_not_compare_in_one_run_either(a: Row, b: Row, said: str):
    with pytest.raises(ConfigError, match=f"a and b do not compare on digits.*square is not the same attack.*{said}"):
        only([a, b])


def test_undefended_models_under_other_attacks_are_not_called_other_models():
    plain, other = preset(row([0] * 8), p=0.1), preset(row([9] * 8), p=0.8)
    with pytest.raises(ConfigError, match=r"square is not the same attack: p is 0\.1"):
        beside([row(A, "a", "pgd"), plain], [row(B, "b", "pgd"), other])


def test_the_defenses_of_two_runs_stand_beside_each_other_as_those_of_one():
    plain, other = row([5] * 8), row([5] * 8)
    duel = beside([plain, row(A, "a")], [other, row(B, "b")])
    assert (duel.a, duel.b) == ("a", "b")
    assert values(duel) == values(only([row(A, "a"), row(B, "b")]))


def test_one_defense_of_two_runs_is_called_by_its_run():
    duel = beside([row(A, "a")], [row(B, "a")])
    assert (duel.a, duel.b) == ("a (first)", "a (second)")
    assert values(duel)["@100"] == (6 / 8, 2 / 8)
    assert values(beside([row(A)], [row(A)])) == values(beside([row(A, "a")], [row(A)]))


def test_a_run_of_several_defenses_asks_which():
    with pytest.raises(ConfigError, match="first holds 2 defenses, a, c; name one with --defense"):
        beside([row(A, "a"), row(A, "c")], [row(B, "b")])
    duel = beside([row(A, "a"), row(A, "c")], [row(B, "b")], "c")
    assert (duel.a, duel.b) == ("c", "b")
    with pytest.raises(ConfigError, match="no rows of defense 'x'"):
        beside([row(A, "a"), row(A, "c")], [row(B, "b")], "x")


@pytest.mark.parametrize(
    ("a", "b", "complaint"),
    [
        ([row(A, "a")], [row(B[:6], "b")], "square ran on 8 samples in the first and 6 in the second, 6 of them"),
        ([row(A, "a", data_hash="1")], [row(B, "b", data_hash="2")], "content of the data set is 1 in the first and 2"),
        ([row(A, "a", weights_hash="1")], [row(B, "b")], "weights is 1 in the first and none in the second"),
        ([row(A, "a")], [row(B, "b", threat=Threat("l2", 0.5, "scores", 100))], "and l2 0.5 in the second"),
        ([row(A, "a")], [row(B, "b", threat=Threat("linf", 8.001 / 255, "scores", 100))], "threat is linf 0.0313725"),
        ([row(A, "a")], [row(B, "b", numerics="plain")], "precision is fast in the first and plain in the second"),
        ([row(A, "a")], [row(B, "b", quantise=True)], "input is float in the first and 8-bit in the second"),
        (
            [row(A, "a", "square(p_init=0.1)"), row(A, "a", "pgd")], [row(B, "b", "square"), row(B, "b", "pgd")],
            "attack square(p_init=0.1) and attack square have other parameters",
        ),
        ([preset(row(A, "a"), p=0.1)], [preset(row(B, "b"), p=0.8)], "not the same attack: p is 0.1 in the first"),
        (
            [row(A, "a", traits=("rescaled",))], [row(B, "b", traits=("rescaled",), budget=50)],
            "budget that its schedule is made for is 100 in the first and 50",
        ),
        ([row(A, "a"), row([0] * 8)], [row(B, "b"), row([9] * 8)], "undefended models differ: 8 of 8 clean images"),
        ([row(A, "a"), row([9] * 12)], [row(B, "b"), row([NEVER] * 12)], "square leaves 0.0 % in the first and 100.0"),
    ],
)  # fmt: skip
def test_runs_that_differ_in_more_than_the_defense_are_refused_with_the_reason(a: Any, b: Any, complaint: str):
    with pytest.raises(ConfigError) as caught:
        beside(a, b)
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("first and second do not compare")
