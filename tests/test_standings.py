"""Standings: a figure belongs to one network, a rank to equal conditions, and a name to its newest version."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.oracle import NEVER
from bench.plan.cell import Cell, Component
from bench.report.leaderboard import render, summary
from bench.report.outcomes import Share
from bench.report.ranking import TIERS
from bench.report.standings import Line, tables
from bench.report.stats import mcnemar, paired_bootstrap
from bench.results.shards import Shard
from bench.results.store import Row
from bench.threat import Threat
from tests.rows import learner, row

STANDS, FALLS = [NEVER] * 20, [1] * 20  # 20 to 0 discordant: exact p = 2 / 2^20


def fixed(hits: Sequence[int], defense: str = "none", attack: str = "square", **fields: Any) -> Row:
    """A row of a network whose weights are given."""
    return row(hits, defense, attack, weights_hash="w", **fields)


def pinned(before: Row, **fields: Any) -> Row:
    """``before`` in a cell with other fields."""
    cell: Cell = replace(before.cell, **fields)
    return Row(cell, before.records, tuple(replace(shard, cell=cell) for shard in before.shards))


def ids(before: Row, numbers: Sequence[int]) -> Row:
    """``before`` of other samples."""
    renamed = pinned(before, ids=tuple(numbers))
    return Row(renamed.cell, before.records.assign(sample_id=list(numbers)), renamed.shards)


def finished(before: Row, day: int) -> Row:
    facts = {"finished": f"2026-01-{day:02d}T00:00:00+00:00"}
    return Row(before.cell, before.records, tuple(replace(shard, provenance=facts) for shard in before.shards))


def edited(before: Row, version: str, day: int) -> Row:
    """``before`` with a defense of a user's own, whose file had this hash when the row finished on that day."""
    (part,) = before.cell.defense
    return finished(pinned(before, defense=(replace(part, version=version),)), day)


def heads(rows: list[Row], **how: Any) -> dict[str, Line]:
    """The first line of each defense in the only table."""
    (table,) = tables(rows, **how)
    found: dict[str, Line] = {}
    for line in table.lines:
        found.setdefault(line.defense, line)
    return found


def ranks(rows: list[Row]) -> dict[str, int | None]:
    return {name: line.rank for name, line in heads(rows).items()}


class TestRanksAreTiers:
    """Nested outcomes of 40 images: 9 that stand with one alone are clear among six pairs, 5 are not."""

    def rows(self, names: Sequence[str]) -> list[Row]:
        standing = {"none": 0, "b": 5, "c": 9, "d": 14}
        return [fixed([NEVER] * standing[name] + [1] * (40 - standing[name]), name) for name in names]

    def test_a_rank_is_one_more_than_the_number_of_those_that_are_significantly_better(self):
        assert ranks(self.rows(["none", "b", "c", "d"])) == {"d": 1, "c": 1, "b": 2, "none": 3}

    def test_what_no_test_tells_apart_shares_a_rank_whoever_has_the_larger_figure(self):
        assert ranks(self.rows(["none", "b"])) == {"none": 1, "b": 1}
        assert list(heads(self.rows(["none", "b"]))) == ["b", "none"]

    @pytest.mark.parametrize("rows", [
        [fixed(STANDS), fixed(FALLS, "b")], [learner(0, 20), learner(20, 20, "b")],
        [fixed(each, name, threat=Threat("linf", 8 / 255, "gradients", 100))
         for each, name in ((STANDS, "none"), (FALLS, "b"))],
    ])  # fmt: skip
    def test_every_track_says_below_its_table_how_ranks_come_about(self, rows):
        (table,) = tables(rows)
        assert sum(TIERS in note for note in table.notes) == 1
        (alone,) = tables(rows[:1])
        assert not any(TIERS in note for note in alone.notes)


class TestRanksAreOfEqualConditions:
    def test_fewer_queries_than_the_undefended_model_met_are_no_rank(self):
        rows = [fixed([NEVER] * 5 + [100] * 15, budget=150), fixed(STANDS, "rounding", budget=2)]
        assert ranks(rows) == {"none": 1, "rounding": None}
        assert "short" in heads(rows)["rounding"].marks
        assert "< fewer queries" in render(tables(rows), "md")

    def test_more_queries_are_cut_to_those_that_the_undefended_model_met(self):
        rows = [fixed(STANDS, budget=2), fixed([100] * 20, "rounding", budget=150)]
        assert ranks(rows) == {"none": 1, "rounding": 1}
        assert "cut" in heads(rows)["rounding"].marks
        assert "cut" not in heads(rows)["none"].marks

    def test_without_the_undefended_model_the_most_that_anyone_met_is_asked_of_all(self):
        rows = [fixed(FALLS, "a", budget=150), fixed(STANDS, "b", budget=2), fixed(FALLS, "b", "nes", budget=2)]
        assert ranks(rows) == {"a": None, "b": None}
        assert ranks([fixed(FALLS, "a"), fixed(STANDS, "b")]) == {"a": 2, "b": 1}

    def test_so_are_seeds(self):
        seeds = [fixed(STANDS), fixed(FALLS, seed=1)]
        assert ranks([*seeds, fixed(STANDS, "d")]) == {"none": 1, "d": None}
        assert ranks([fixed(STANDS), fixed(STANDS, "d"), fixed(FALLS, "d", seed=1)]) == {"none": 1, "d": 1}

    def test_so_are_samples(self):
        more = [fixed([NEVER] * 40), fixed(STANDS, "d")]
        assert ranks(more) == {"none": 1, "d": None}
        assert "short" in heads(more)["d"].marks
        fewer = [fixed(STANDS), fixed([NEVER] * 20 + [1] * 40, "d")]
        assert ranks(fewer) == {"none": 1, "d": 1}
        assert "cut" in heads(fewer)["d"].marks
        other = [fixed(STANDS), ids(fixed(FALLS, "d"), range(50, 70))]
        assert ranks(other) == {"none": 1, "d": None}

    def test_samples_pair_by_their_numbers(self):
        half = [NEVER] * 10 + [1] * 10
        backwards = ids(fixed(half[::-1], "d"), range(19, -1, -1))  # the same outcome on each sample
        assert ranks([fixed(half), backwards]) == {"none": 1, "d": 1}
        worst = heads([fixed(half, "d"), pinned(backwards, attack=Component("nes"))])["d"]
        assert worst.shares["@100"].value == 1 / 2

    def test_a_try_with_fewer_samples_spoils_no_board(self):
        tries = [fixed([NEVER] * 2, limited=True), fixed([NEVER] * 2, "d", limited=True)]
        assert ranks([*tries, fixed(FALLS), fixed(STANDS, "d")]) == {"d": 1, "none": 2}

    def test_an_attack_that_no_one_else_met_counts_against_its_defense(self):
        assert ranks([fixed(STANDS), fixed(STANDS, "d"), fixed(FALLS, "d", "eot-square")]) == {"none": 1, "d": 2}

    @pytest.mark.parametrize(
        ("fields", "told"),
        [
            ({"numerics": "plain"}, ["", " · plain precision"]),
            ({"weights_hash": "0123456789"}, [" · weights 01234567", " · weights w"]),
            ({"data_hash": "d" * 64}, [" · data dddddddd", " · data none"]),
            ({"threat": Threat("linf", 8 / 255 + 1e-9, "scores", 100)}, [" · eps 0.0313725", " · eps 0.0313725"]),
        ],
    )
    def test_what_differs_otherwise_has_a_table_of_its_own_that_says_so(self, fields, told):
        found = tables([fixed(STANDS), pinned(fixed(FALLS), **fields)])
        titles = sorted(table.title for table in found)
        assert len(set(titles)) == 2
        for title, more in zip(titles, told, strict=True):
            assert title.startswith("digits · cnn · linf 8/255" + more)


class TestWhoKnowsTheDefense:
    """One that names attacks that know it is ranked where it has met them."""

    def aware(self, hits: Sequence[int], attack: str = "square", *knows: str, **fields: Any) -> Row:
        before = fixed(hits, "d", attack, **fields)
        return pinned(before, defense=(replace(before.cell.defense[0], knows=knows or ("decode-square",)),))

    def test_without_them_it_has_no_rank_a_sign_and_a_note(self):
        rows = [fixed(FALLS), self.aware(STANDS)]
        assert ranks(rows) == {"none": 1, "d": None}
        assert "untried" in heads(rows)["d"].marks
        shown = render(tables(rows), "md")
        assert "∌ not met by an attack that knows it" in shown
        assert "∌ d has not met decode-square" in shown

    def test_with_them_it_has(self):
        rows = [fixed(FALLS), self.aware(STANDS), self.aware(STANDS, "decode-square")]
        assert ranks(rows) == {"d": 1, "none": 2}
        assert "∌" not in render(tables(rows), "md")

    @pytest.mark.parametrize(
        ("attack", "rank"),
        [("square(loss=dlr)", 1), ("square(p_init=0.3, loss=dlr)", 1), ("square", None), ("square(loss=ce)", None)],
    )
    def test_the_arguments_that_it_names_matter_and_no_others(self, attack, rank):
        rows = [fixed(FALLS), self.aware(STANDS, "square", "square(loss=dlr)"),
                self.aware(STANDS, attack, "square(loss=dlr)")]  # fmt: skip
        assert ranks(rows)["d"] == rank

    def test_a_few_samples_or_queries_are_no_trial(self):
        for few in ({"budget": 2}, {}):
            met = self.aware(STANDS if few else STANDS[:1], "decode-square", **few)
            assert ranks([fixed(FALLS), self.aware(STANDS), met])["d"] is None

    def test_what_a_row_says_of_a_defense_of_ours_does_not_count_and_a_foreign_name_is_no_crash(self):
        cell = self.aware(STANDS).cell
        assert Cell.from_json(json.loads(json.dumps(cell.as_json()))).defense[0].knows == ("decode-square",)
        ours = replace(cell, defense=(Component("rls", stage="output"),))
        assert Cell.from_json(ours.as_json()).defense[0].knows == ("square(loss=dlr)",)
        assert replace(cell, defense=(replace(cell.defense[0], knows=()),)).key == cell.key
        assert not Component("square").is_called("((")

    def test_gradients_pass_by_what_a_defense_does_to_scores(self):
        white = Threat("linf", 8 / 255, "gradients", 100)
        assert ranks([fixed(FALLS, threat=white), self.aware(STANDS, threat=white)])["d"] == 1


class TestAFigureBelongsToOneNetwork:
    halves = ([1] * 10 + [NEVER] * 10, [NEVER] * 10 + [1] * 10)

    def test_networks_that_seeds_train_are_averaged_and_not_pooled(self):
        trained = [row(hits, seed=seed) for seed, hits in enumerate([*self.halves, [1] * 5 + [NEVER] * 15])]
        worst = heads(trained)["none"]
        share = worst.shares["@100"]
        assert worst.attack == "square · 3 networks"
        assert share.value == pytest.approx((0.5 + 0.5 + 0.75) / 3)  # pooled, it would be 0
        assert share.spread == pytest.approx(np.std([0.5, 0.5, 0.75], ddof=1))
        assert str(share) == "58.3 ± 14.4 [39, 78]"
        first = json.loads(render(tables(trained), "json"))[0]
        assert (first["networks"], first["@100 SD"]) == (3, pytest.approx(0.1443, abs=1e-4))

    def test_the_worst_attack_is_taken_within_a_network(self):
        trained = [row(hits, attack=attack, seed=seed)
                   for seed, attacks in enumerate([self.halves, (STANDS, STANDS)])
                   for attack, hits in zip(("nes", "square"), attacks, strict=True)]  # fmt: skip
        worst = heads(trained)["none"]
        assert (worst.attack, worst.shares["@100"].value) == ("worst of 2 · 2 networks", 0.5)  # 0 and 1

    def test_seeds_of_given_weights_are_tries_on_one_network(self):
        worst = heads([fixed(hits, seed=seed) for seed, hits in enumerate(self.halves)])["none"]
        assert (worst.attack, worst.shares["@100"].value) == ("worst of 2", 0)

    def test_a_training_defense_trains_whatever_the_model_came_with(self):
        rows = [pinned(fixed(hits, "x", seed=seed), defense=(Component("x", stage="training"),))
                for seed, hits in enumerate(self.halves)]  # fmt: skip
        assert heads(rows)["x"].shares["@100"].value == 0.5

    def test_averages_rank_by_samples(self):
        good = [row(STANDS, "d", seed=seed) for seed in range(3)]
        rows = [row(hits, seed=seed) for seed, hits in enumerate([*self.halves, STANDS])]
        assert ranks([*rows, *good]) == {"d": 1, "none": 2}  # 20 samples to 0
        assert ranks([*rows, *good[:1]]) == {"none": 1, "d": None}

    def test_learners_average_over_the_networks_they_trained(self):
        rows = [learner(wrong, 20, "em", seed=seed) for seed, wrong in enumerate((4, 8, 12))]
        line = heads(rows)["em"]
        assert (line.attack, line.shares["test"].value) == ("standard · 3 networks", pytest.approx(0.6))
        assert line.extra["SD"] == pytest.approx(0.2)

    def test_the_paired_test_over_networks_is_a_sign_test_over_samples(self):
        a, b = np.array([1.0, 1, 1, 2 / 3, 0]), np.array([1 / 3, 2 / 3, 0, 0, 0])
        assert mcnemar(a, b) == 2 / 2**4
        low, high = paired_bootstrap(a, b)
        assert low < (a - b).mean() < high
        right = np.array([[True, True], [False, True]])
        assert Share(right).by_sample.tolist() == [0.5, 1.0]


class TestTheLowerOfTwo:
    def test_a_defense_that_acts_in_the_search_alone_does_not_rank_above_what_holds(self):
        blind = fixed([0] + [NEVER] * 39, "d", final_wrong=range(40))
        shares = heads([blind])["d"].shares
        assert (shares["@100"].value, shares["final"].value) == (0.975, 0)
        assert ranks([fixed([1] * 20 + [NEVER] * 20), blind]) == {"none": 1, "d": 2}
        (table,) = tables([fixed([1] * 20 + [NEVER] * 20), blind])
        assert [(flag.defense, flag.flag) for flag in table.flags] == [("d", "search-is-blind")]
        assert "final example is right when re-evaluated" in render([table], "md")

    def test_a_lucky_hit_is_not_taken_back(self):
        lucky = fixed(FALLS, "d")
        held = Row(lucky.cell, lucky.records.assign(final_pred=0), lucky.shards)
        assert ranks([fixed(STANDS), held]) == {"none": 1, "d": 2}


class TestVersions:
    old = edited(fixed(FALLS, "d.py:D"), "1+aaaaaaaaaaaa", 1)
    new = edited(fixed(STANDS, "d.py:D"), "1+bbbbbbbbbbbb", 2)

    def test_the_version_that_ran_last_is_shown_and_pooled_with_no_other(self):
        (table,) = tables([self.new, self.old])
        (line,) = table.lines
        assert (line.defense, line.shares["@100"].value) == ("d.py:D #bbbbbb", 1)
        assert "Left out: rows of older versions of a component (1)" in render([table], "md")

    def test_all_are_shown_on_request_each_with_its_hash(self):
        found = heads([self.old, self.new], all_versions=True)
        assert {name: line.shares["@100"].value for name, line in found.items()} == {
            "d.py:D #bbbbbb": 1, "d.py:D #aaaaaa": 0,
        }  # fmt: skip
        assert (found["d.py:D #aaaaaa"].rank, "older" in found["d.py:D #aaaaaa"].marks) == (None, True)

    def test_a_former_version_that_failed_spoils_nothing(self):
        failed = edited(fixed([], "d.py:D", asked=20, error="boom"), "1+aaaaaaaaaaaa", 1)
        assert ranks([fixed(STANDS), failed, self.new]) == {"none": 1, "d.py:D #bbbbbb": 1}

    def test_attacks_that_only_a_former_version_met_are_not_counted_for_it(self):
        rows = [fixed(STANDS), fixed(FALLS, attack="nes"), self.new, edited(fixed(FALLS, "d.py:D", "nes"), "1+a", 1)]
        assert ranks(rows) == {"none": 1, "d.py:D #bbbbbb": None}

    def test_a_higher_version_of_ours_outdates_a_later_run_of_a_lower(self):
        first, second = (pinned(fixed(hits), attack=Component("simba", version=version))
                         for version, hits in ((1, STANDS), (2, FALLS)))  # fmt: skip
        (line,) = tables([finished(second, 1), finished(first, 2)])[0].lines
        assert line.shares["@100"].value == 0
        shown = [line.attack for line in tables([second, first], all_versions=True)[0].lines]
        assert shown == ["simba", "simba (version 1)"]

    def test_a_model_that_was_edited_has_one_table(self):
        first, second = (
            finished(pinned(fixed(STANDS), model=Component("m.py:build", version=f"1+{code}"), weights_hash=code), day)
            for day, code in ((1, "aaaaaaaa"), (2, "bbbbbbbb"))
        )
        assert len(tables([first, second])) == 1
        assert len(tables([first, second], all_versions=True)) == 2


class TestNothingVanishes:
    def test_a_failed_row_is_shown_with_the_last_line_of_its_error(self):
        failed = fixed([], "d", "nes", asked=20, error="Traceback\n  deep\nRuntimeError: boom\n")
        (table,) = tables([fixed(STANDS), fixed(FALLS, attack="nes"), fixed(STANDS, "d"), failed])
        text = render([table], "md")
        assert "- d × nes: RuntimeError: boom" in text
        head = next(line for line in table.lines if line.defense == "d")
        assert (head.shares["@100"].value, head.rank, "failed" in head.marks) == (1, None, True)
        assert [line.get("error") for line in json.loads(render([table], "json"))].count("RuntimeError: boom") == 1

    @pytest.mark.parametrize("error", ["", " \n "])
    def test_an_error_without_a_message_is_shown_too(self, error):
        failed = fixed([], "d", asked=20, error="x")
        empty = Row(failed.cell, failed.records, (Shard(failed.cell, 0, 20, error=error),))
        assert summary(empty) == "failed: an error without a message"
        assert "an error without a message" in render(tables([empty]), "md")

    def test_seeds_all_of_which_failed_are_lines_all_the_same(self):
        rows = [row([], "d", asked=4, error="boom", seed=seed) for seed in range(2)]
        (table,) = tables(rows)
        assert len(table.lines) == 3
        learners = [replace_records(learner(1, 4, seed=seed)) for seed in range(2)]
        assert len(tables(learners)[0].lines) == 3


def replace_records(before: Row) -> Row:
    return Row(before.cell, before.records[:0], before.shards)
