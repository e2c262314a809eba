"""Tables: every figure worked out by hand from records of a few samples."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from bench.oracle import NEVER
from bench.plan.cell import Component
from bench.report.leaderboard import render, summary
from bench.report.outcomes import failure
from bench.report.standings import Line, Table, tables
from bench.results.store import Row
from bench.threat import Threat
from tests.rows import learner, row


def only(rows: list[Row], budgets: Sequence[int] = ()) -> list[Line]:
    (table,) = tables(rows, budgets)
    return table.lines


def values(line: Line) -> dict[str, float]:
    return {name: share.value for name, share in line.shares.items()}


def test_robust_accuracy_at_every_budget_follows_from_the_first_hits():
    (line,) = only([row([0, 1, 10, 11, 100, NEVER, NEVER, NEVER], final_wrong=[5])], [10, 50, 500])
    assert values(line) == {
        "clean": 7 / 8,  # the sample that fell at query 0 was wrong when clean
        "@10": 5 / 8,
        "@50": 4 / 8,
        "@100": 3 / 8,  # the largest budget that was run; 500 was not
        "final": 2 / 8,  # sample 5 is wrong in plain float32
    }
    assert line.n == 8


def draws(before: Row, *lucky: int) -> Row:
    """``before``, of a random defense, whose hits on the samples ``lucky`` fail when re-evaluated."""
    part = Component("rnd", traits=("random",))
    again = before.records["final_pred"].where(~before.records["sample_id"].isin(lucky), 0)
    return Row(replace(before.cell, defense=(part,)), before.records.assign(final_pred=again), before.shards)


def test_hits_on_random_defenses_count_again_where_they_hold():
    hits = [0, 5, 20, 60, NEVER, NEVER]
    (line,) = only([draws(row(hits, final_wrong=[5]), 1, 3)], [10, 50])
    assert values(line)["@100"] == 2 / 6
    # Sample 0 was wrong when clean; 2 is beaten for good at query 20; no query of the search has beaten 5.
    assert {name: share.value for name, share in line.lasting.items()} == {"@10": 5 / 6, "@50": 4 / 6, "@100": 4 / 6}
    assert not only([row(hits)])[0].lasting


def test_the_worst_case_of_a_random_defense_takes_hits_that_hold_under_any_attack():
    lines = [draws(row([5, 5, 5, NEVER]), 0, 1), draws(row([7, 7, NEVER, NEVER], attack="pgd"), 1, 2)]
    worst, *_ = only(lines)
    assert worst.lasting["@100"].value == 2 / 4
    text = render(tables(lines), "md")
    assert "re-evaluated" in text
    assert json.loads(render(tables(lines), "json"))[0]["@100 re-evaluated"] == 2 / 4
    assert "re-evaluated:" not in render(tables([row([5])]), "md")


def test_each_sample_counts_under_the_attack_that_beats_it_soonest():
    a, b = row([5, NEVER, 50, NEVER], attack="pgd"), row([NEVER, 7, 20, NEVER], attack="square")
    worst, *columns = only([a, b], [30])
    assert worst.attack == "worst of 2"
    assert values(worst) == {"clean": 1, "@30": 1 / 4, "@100": 1 / 4, "final": 1 / 4}
    assert [values(line)["@30"] for line in columns] == [3 / 4, 2 / 4]


def test_the_worst_case_is_over_the_samples_that_all_attacks_have_met():
    worst, *_ = only([row([5, NEVER, NEVER]), row([NEVER, NEVER], attack="pgd", asked=3)])
    assert worst.n == 2
    assert values(worst)["@100"] == 1 / 2
    assert worst.rank is None
    assert "incomplete" in worst.marks


def test_an_attack_with_a_smaller_budget_counts_with_what_it_had():
    worst, *columns = only([row([5, NEVER], budget=10, attack="a"), row([NEVER, 300], budget=500, attack="b")])
    assert values(worst)["@500"] == 0
    assert columns[0].shares["@500"].n == 0, "by itself it says nothing about 500 queries"


@pytest.mark.parametrize(
    ("bad", "mark", "sign"),
    [
        (row([NEVER] * 4, "bad", limited=True), "limited", "†"),
        (row([NEVER] * 4, "bad", asked=9), "incomplete", "…"),
        (row([], "bad", asked=4, error="Traceback\nRuntimeError: boom"), "failed", "✗"),
        (row([NEVER] * 4, "bad", invalid=True), "invalid", "!"),
    ],
)
def test_what_is_not_whole_is_marked_explained_and_unranked(bad, mark, sign):
    lines = {line.defense: line for line in only([row([1, 1, 1, NEVER]), bad])}
    assert lines["none"].rank == 1
    assert lines["bad"].rank is None
    assert mark in lines["bad"].marks
    text = render(tables([row([1, 1, 1, NEVER]), bad]), "md")
    shown = [line for line in text.splitlines() if "| bad" in line]
    assert sign in shown[0]
    assert any(line.startswith(sign) for line in text.splitlines()), "the legend explains the sign"


def test_traits_of_an_attack_are_marked_and_ranked_all_the_same():
    (line,) = only([row([1, NEVER], traits=("rescaled", "batch-dependent"))])
    assert line.marks == {"rescaled", "batch-dependent"}
    assert line.rank == 1


def test_who_was_spared_an_attack_is_not_ranked():
    rows = [row([5, NEVER]), row([5, 5], attack="nes"), row([NEVER, NEVER], "unig")]
    both, (alone,) = only(rows)[:1], [line for line in only(rows) if line.defense == "unig"]
    assert (both[0].defense, both[0].rank) == ("none", 1)
    assert (alone.rank, "spared" in alone.marks) == (None, True)
    assert "⊂ not met by every attack" in render(tables(rows), "md")
    learners = [learner(1, 4), learner(1, 4, attack="jpeg"), learner(4, 4, "ops"), learner(4, 4, "lsp", "jpeg")]
    learners.append(learner(3, 4, "lsp"))
    ranks = {line.defense: line.rank for line in only(learners) if line.rank or line.defense == "ops"}
    assert ranks == {"ops": None, "lsp": 1, "none": 1}


def test_differences_inside_the_noise_share_a_rank():
    lines = only([row([1] * 10 + [NEVER] * 10, "a"), row([1] * 8 + [NEVER] * 12, "b")])
    assert {line.defense: line.rank for line in lines} == {"a": 1, "b": 1}
    assert lines[0].defense == "b", "the higher figure still comes first"


def test_significant_differences_do_not():
    # 20 of 20 against 10 of 20 on the same samples: exact p = 2 / 2^10, also three times that (Holm).
    good, poor, poorer = [NEVER] * 20, [NEVER] * 10 + [1] * 10, [NEVER] * 9 + [1] * 11
    lines = only([row(poorer, "poorer"), row(poor, "poor"), row(good, "good")])
    assert [(line.defense, line.rank) for line in lines] == [("good", 1), ("poor", 2), ("poorer", 2)]


def test_models_threats_and_kinds_of_attack_have_tables_of_their_own():
    rows = [
        row([1, NEVER]),
        row([1, NEVER], threat=Threat("l2", 0.5, "scores", 100)),
        row([1, NEVER], quantise=True),
        learner(1, 4),
    ]
    titles = [table.title for table in tables(rows)]
    assert len(set(titles)) == 4
    assert sum("8-bit" in title for title in titles) == 1
    assert "released training data" in titles[-1]


def test_learners_show_test_accuracy_and_what_was_changed():
    ops, none = only([learner(1, 10), learner(9, 10, "ops")])
    assert (values(none), values(ops)) == ({"test": 0.9}, {"test": 0.1})
    assert ops.extra == {"clean": 0.9, "peak": 0.925, "train": 0.975, "changed pixels": 1.0}
    assert (ops.rank, none.rank) == (1, 2), "the defender wants it low; 8 of 8 discordant samples, p = 2 / 2^8"
    text = render(tables([learner(9, 10, "ops")]), "md")
    assert "92.5" in text
    assert "97.5" in text
    assert "1.00" in text


def test_a_protection_is_as_good_as_the_best_learner_against_it():
    rows = [learner(1, 20), learner(2, 20, attack="jpeg"), learner(20, 20, "em"), learner(4, 20, "em", "jpeg")]
    lines = only([*rows, learner(18, 20, "ops"), learner(17, 20, "ops", "jpeg")])
    best = [line for line in lines if line.attack.startswith("best of 2")]
    assert [(line.defense, line.attack, values(line)["test"]) for line in best] == [
        ("ops", "best of 2: jpeg", 0.15), ("em", "best of 2: jpeg", 0.8), ("none", "best of 2: standard", 0.95),
    ]  # fmt: skip
    assert [line.extra["clean"] for line in best] == [0.9, 0.9, 0.95]
    assert [line.rank for line in best] == [1, 2, 2]
    assert "| best" in render(tables(rows), "md")


def test_seeds_show_their_mean_and_spread():
    rows = [learner(wrong, 10, "em", seed=seed) for seed, wrong in enumerate((2, 4, 6))]
    (first, *_) = only(rows)
    assert first.extra["mean"] == pytest.approx(0.6)
    assert first.extra["SD"] == pytest.approx(0.2)


ROWS = [
    row([5, 20, NEVER, NEVER], attack="pgd"),
    row([NEVER, 7, NEVER, 0], attack="square(p_init=0.3)", traits=("rescaled",)),
    row([1, 1, NEVER, NEVER], "50%_&_more", limited=True),
    row([], "broken", asked=4, error="boom"),
    learner(1, 4, "ops"),
]


def test_csv_and_json_hold_the_same_numbers():
    from_json = json.loads(render(tables(ROWS, [10]), "json"))
    from_csv = list(csv.DictReader(io.StringIO(render(tables(ROWS, [10]), "csv"))))
    assert len(from_json) == len(from_csv) == 6
    for one, other in zip(from_json, from_csv, strict=True):
        assert set(one) <= set(other)
        for name, text in other.items():
            value = one.get(name)
            if value is None:
                assert text == ""
            elif isinstance(value, str):
                assert text == value
            else:
                assert float(text) == value


def test_records_hold_shares_and_their_intervals_between_0_and_1():
    first = json.loads(render(tables([row([5, 20, NEVER, NEVER])], [10]), "json"))[0]
    assert (first["rank"], first["n"], first["clean"], first["@10"], first["@100"]) == (1, 4, 1.0, 0.75, 0.5)
    assert first["@100 low"] == pytest.approx(0.15004, abs=1e-5)  # Wilson, 2 of 4
    assert first["@100 high"] == pytest.approx(0.84996, abs=1e-5)


def test_markdown_prints_percent_with_intervals():
    text = render(tables([row([5, 20, NEVER, NEVER])]), "md")
    assert "50.0 [15, 85]" in text
    assert text.startswith("### digits · cnn · linf 8/255")


def glance(defenses: Sequence[str], attacks: Sequence[str]) -> list[str]:
    rows = [row([5, 20, NEVER, NEVER], defense, attack) for defense in defenses for attack in attacks]
    text = render(tables(rows), "md").partition("At a glance")[2]
    return text.partition("\n\n")[2].partition("\n\n")[0].splitlines()


def test_the_longer_list_goes_down_the_glance():
    down, across = glance(["none", "aaa-linear"], ["square"]), glance(["none"], ["square", "nes"])
    assert down == []  # one attack is all there is
    assert across[0].split() == ["|", "attack", "|", "none", "|"]
    assert [line.split()[1:3] for line in across[2:]] == [["worst", "@100"], ["nes", "@100"], ["square", "@100"]]
    tall = glance(["none", "aaa-linear", "rnd", "unig"], ["square", "nes"])
    assert tall[0].split() == ["|", "defense", "|", "worst", "@100", "|", "nes", "@100", "|", "square", "@100", "|"]


def test_what_is_not_whole_is_marked_at_a_glance_too():
    rows = [row([1, NEVER], "mine", attack, limited=True) for attack in ("square", "nes")]
    text = render(tables(rows), "md").partition("At a glance")[2].partition("\n\nWhat")[0]
    assert text.count("50.0 †") >= 2
    assert "50.0 |" not in text


def test_a_control_is_marked_at_a_glance_where_it_leaves_less_than_the_worst_case():
    rows = [row([9, NEVER], attack=attack) for attack in ("square", "nes")]
    alone = row([1, 1])
    control = replace(alone, cell=replace(alone.cell, attack=Component("transfer", control=True)))
    text = render(tables([*rows, control]), "md").partition("At a glance")[2].partition("\n\nWhat")[0]
    told = {line.split("|")[1].split()[0]: line.split("|")[2].strip() for line in text.splitlines() if "|" in line}
    assert (told["worst"], told["transfer"]) == ("50.0", "0.0 ⇄")


def test_latex_escapes_what_it_would_read_as_its_own():
    text = render(tables(ROWS, [10]), "latex")
    assert r"50\%\_\&\_more" in text
    assert r"square(p\_init=0.3)" in text
    for sign in "†✗…↔·":
        assert sign not in text
    body = text.replace(r"\_", "").replace(r"\%", "").replace(r"\&", "").replace(r"\$", "")
    assert "_" not in body
    assert "%" not in body
    lines = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len({line.count("&") for line in lines[:6]}) == 1, "all lines of a table have the same columns"
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 4  # a glance, and what queries achieved


def test_details_say_what_queries_achieved():
    (table,) = tables([row([0, 5, 20, NEVER, NEVER])], [10])
    assert "success" not in render([table], "md", details=False)
    text = render([table], "md")
    (line,) = [line for line in text.splitlines() if "50.0%" in line]  # two of the four that were right when clean
    assert [cell.strip() for cell in line.split("|")][3:10] == ["0.450", "0.610", "50.0%", "12", "12", "56", "20"]


@pytest.mark.parametrize("style", ["md", "csv", "latex", "json"])
def test_no_tables_are_no_error(style):
    assert render([Table("empty", [])][:0], style).strip() in ("", "[]")


def test_a_failure_names_the_line_of_the_users_file_and_not_our_own_classes():
    trace = (
        'Traceback (most recent call last):\n'
        '  File "bench/oracle/served.py", line 41, in _forward\n    self.module(x)\n'
        '  File "some where/mine.py", line 27, in forward\n    self.one(x)\n  File "torch/module.py", line 3, in f\n'
    )
    mine = row([], "mine.py:Rounded", asked=2, error=f"{trace}RuntimeError: boom\n")
    assert failure(mine) == "RuntimeError: boom (mine.py, line 27)"
    assert failure(row([], asked=2, error=f"{trace}RuntimeError: boom\n")) == "RuntimeError: boom"
    assert failure(row([], asked=2, error="bench.errors.RefereeError: no scores")) == "no scores"


def test_a_summary_says_in_one_phrase_how_a_cell_went():
    assert summary(row([5, NEVER])) == "clean 100.0 [34, 100] %, robust @100 50.0 [9, 91] %"
    assert summary(row([], asked=2, error="Traceback (most recent call last)\nRuntimeError: boom\n")) == (
        "failed: RuntimeError: boom"
    )
    assert summary(learner(2, 4)).startswith("test accuracy 50.0 [")
