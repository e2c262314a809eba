"""Attacks that met only what others had left: their worst case is that of full runs, and no more is said of them."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from bench.cli.records import records as bench_records
from bench.oracle import NEVER
from bench.plan.cell import Component
from bench.report.compare import duels
from bench.report.compare_table import render_duels
from bench.report.flags import flags
from bench.report.leaderboard import records, render, summary
from bench.report.line import Line
from bench.report.standings import tables
from bench.results.shards import Shard, read_shard
from bench.results.store import Row, Store
from bench.site.boards import boards
from bench.threat import Threat
from bench.tracks import track_of
from tests.rows import row
from tests.test_shards import sign
from tests.test_standings import fixed

A = [5, 50, NEVER, NEVER, 0, NEVER]
B = [NEVER, 3, 70, NEVER, 0, NEVER]


def chosen(whole: Row, positions: Sequence[int]) -> Row:
    """``whole`` as if its attack had been run on these samples alone, which others had left."""
    shard = replace(whole.shards[0], start=positions[0], stop=positions[-1] + 1, chosen=tuple(positions))
    return Row.of(whole.cell, whole.records.iloc[list(positions)].reset_index(drop=True), (shard,))


def lines(rows: list[Row]) -> list[Line]:
    return track_of(rows[0].cell).lines(rows, (10,))


def test_the_worst_case_at_the_whole_budget_is_that_of_full_runs_and_smaller_budgets_are_left_open():
    whole = [fixed(A, attack="square"), fixed(B, attack="simba")]
    head, simba, square = lines([whole[0], chosen(whole[1], [2, 3, 5])])
    full, *_ = lines(whole)
    for name in ("clean", "@100", "final"):
        assert (head.shares[name].right == full.shares[name].right).all()
        assert head.shares[name].n == 6
    assert full.shares["@10"].n == 6
    assert not head.shares["@10"].n  # simba may have beaten sample 1 in 3 queries: nobody has looked
    assert head.rank == 1
    assert not head.marks
    assert square.shares["@100"].n == 6
    assert simba.marks == {"worst-only"}
    assert not any(share.n for share in simba.shares.values())
    assert not simba.figures
    assert simba.samples == "3 of 6"


def test_a_sample_that_nobody_has_beaten_and_one_attack_has_not_met_leaves_the_worst_case_open():
    head, *_ = lines([fixed(A, attack="square"), chosen(fixed(B, attack="simba"), [2, 3])])
    assert head.marks == {"incomplete"}
    assert head.rank is None
    assert not head.shares["@100"].n
    assert head.shares["clean"].n == 6
    assert head.left is None


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_passed_by_because_it_fell_changes_no_worst_case_and_no_rank(seed):
    rng = np.random.default_rng(seed)
    defenses, attacks, n = ("none", "aaa-linear", "rnd"), ("square", "simba", "rays"), 40
    start = rng.random(n) < 0.1

    def hits(strength: float) -> list[int]:
        fell = np.where(rng.random(n) < strength, rng.integers(1, 101, n), NEVER)
        return [int(hit) for hit in np.where(start, 0, fell)]

    whole = [fixed(hits(0.3 + 0.3 * (d == "none")), d, a) for d in defenses for a in attacks]
    thin: list[Row] = []
    down: dict[str, set[int]] = {}
    for each in whole:
        out = down.setdefault(each.cell.defense_name, set())
        left = [position for position in range(n) if position not in out]
        thin.append(chosen(each, left) if len(left) < n else each)
        out.update(np.flatnonzero(each.records["first_hit"] != NEVER).tolist())
    heads = {line.defense: line for line in lines(thin) if line.attack.startswith("worst of")}
    for line in lines(whole):
        if line.attack.startswith("worst of"):
            assert heads[line.defense].rank == line.rank
            for name in ("clean", "@100", "final"):
                assert (heads[line.defense].shares[name].right == line.shares[name].right).all()


def test_each_network_is_asked_by_itself():
    first, second = row(A, "pgd-at", "square"), row(A, "pgd-at", "square", seed=1)
    more = chosen(row(B, "pgd-at", "simba"), [2, 3, 5])
    head, *_ = lines([first, second, more, chosen(row(B, "pgd-at", "simba", seed=1), [2, 3, 5])])
    assert head.shares["@100"].networks == 2
    head, *_ = lines([first, second, more, chosen(row(B, "pgd-at", "simba", seed=1), [5])])
    assert not head.shares["@100"].n  # what the first network lost says nothing of the second


def test_a_rank_on_fewer_queries_than_a_sample_stood_is_not_given():
    rows = [fixed(A, attack="square", budget=40), fixed(B, attack="simba", budget=40)]
    rows += [fixed(A, "rnd", "square"), chosen(fixed(B, "rnd", "simba"), [2, 3, 5])]  # sample 1 fell at query 50
    heads = {line.defense: line for line in lines(rows) if line.attack.startswith("worst of")}
    assert heads["rnd"].marks == {"incomplete"}
    assert heads["rnd"].rank is None


def test_the_final_examples_of_a_lucky_hit_are_left_open():
    random = {"defense": (Component("rnd", stage="output", traits=("random",)),)}
    a, b = (replace(each, cell=replace(each.cell, **random)) for each in (fixed(A, "rnd"), fixed(B, "rnd", "simba")))
    lucky = Row(a.cell, a.records.assign(final_pred=0), a.shards)
    head, *_ = lines([lucky, chosen(b, [2, 3, 5])])
    assert head.shares["@100"].n == 6
    assert not head.shares["final"].n
    assert not head.lasting["@100"].n


def test_no_reader_of_rows_finds_a_figure_in_what_others_have_left():
    whole, part = fixed(A, attack="square"), chosen(fixed(B, attack="simba"), [2, 3, 5])
    assert not len(part.records)
    assert not part.complete
    assert "3 of 6" in summary(part)
    text = render(tables([whole, part]), "md")
    assert "÷ run only on the samples that other attacks had left" in text
    assert "| 3 of 6" in text
    head, simba, _ = records(tables([whole, part]))
    assert simba["n"], simba["n of"] == (3, 6)
    assert {simba[name] for name in ("clean", "@100", "final")} == {None}
    assert "n of" not in head
    (board,) = boards(tables([whole, part]))
    (entry,) = board.entries
    assert entry.decisive == ""
    assert entry.portrait.graphs == []
    assert [bar.name for bar in entry.portrait.bars] == ["worst of 2", "square"]
    shares = track_of(part.cell).shares([part], (100,))
    assert not any(share.n for share in shares.values())


def test_two_worst_cases_are_compared_and_no_attack_by_itself_that_met_what_others_left():
    whole = [fixed(A, "none"), fixed(B, "none", "simba"), fixed(B, "rnd"), fixed(A, "rnd", "simba")]
    thin = [whole[0], chosen(whole[1], [2, 3, 5]), whole[2], chosen(whole[3], [0, 3, 5])]
    (full,), (cut,) = (duels(rows, "none", "rnd", [10, 100]) for rows in (whole, thin))
    assert {(line.attack, line.at) for line in cut.lines if "worst" in line.attack} == {
        ("worst of 2", "clean"), ("worst of 2", "@100"), ("worst of 2", "final")
    }  # fmt: skip
    assert {line.attack for line in cut.lines} == {"worst of 2", "square"}
    of_full = {(line.attack, line.at): line for line in full.lines}
    for line in cut.lines:
        same = of_full[line.attack, line.at]
        assert line.p_value == same.p_value
        assert (line.a.right == same.a.right).all()
    assert "÷ run only on" in render_duels([cut], "md")
    alone = duels([chosen(whole[1], [2, 3]), chosen(whole[3], [0, 3])], "none", "rnd", [100])
    assert not any("simba" in line.attack for duel in alone for line in duel.lines)


def test_facts_of_single_samples_are_flagged_all_the_same():
    invalid = chosen(fixed(B, "rnd", "simba", invalid=True), [2, 3, 5])
    finding = {"flag": "answers-differently", "fired": True, "evidence": "seen"}
    told = replace(invalid, shards=(replace(invalid.shards[0], findings=(finding,)),))
    assert {flag.flag for flag in flags([fixed(A, "rnd"), told])} == {"invalid-answers", "answers-differently"}
    assert {flag.flag for flag in flags([told])} == {"invalid-answers", "answers-differently"}
    head, *_ = lines([fixed(A, "rnd"), told])
    assert "invalid" in head.marks


def test_no_flag_speaks_of_all_attacks_where_some_met_what_others_left():
    stands = fixed([NEVER] * 40, "rnd", "square")
    transfer = fixed([1] * 40, "rnd", "transfer")
    more = fixed([50] * 38 + [NEVER] * 2, "rnd", "simba")
    assert "transfer-beats-queries" in {flag.flag for flag in flags([stands, transfer])}
    part = chosen(more, list(range(39)))
    assert "transfer-beats-queries" not in {flag.flag for flag in flags([stands, transfer, part])}
    survives = Threat("linf", 0.5, "scores", 100)
    rows = [fixed([NEVER] * 40, "rnd", attack, threat=survives) for attack in ("square", "simba")]
    assert "survives-any-radius" in {flag.flag for flag in flags(rows)}
    assert flags([rows[0], chosen(rows[1], list(range(39)))]) == []


def stored(folder, whole: Row, *stretches) -> Store:
    """``whole`` in a store, by stretches (start, stop) or chosen positions."""
    store = Store(folder).open()
    for each in stretches:
        pick = each if isinstance(each, list) else []
        start, stop = (pick[0], pick[-1] + 1) if pick else each
        shard = Shard(whole.cell, start, stop, chosen=tuple(pick))
        store.save(shard, whole.records.iloc[list(shard.positions)].reset_index(drop=True))
    return store


def test_the_store_keeps_chosen_samples_as_gaps_that_a_later_run_fills(tmp_path):
    whole = row(B, attack="simba")
    store = stored(tmp_path, whole, [0, 2, 5])
    assert store.missing(whole.cell) == [1, 3, 4]
    (part,), damaged = store.rows()
    assert not damaged
    assert part.partial["sample_id"].tolist() == [0, 2, 5]
    assert not len(part.records)
    (path,) = tmp_path.rglob("*.json")
    assert json.loads(path.read_text())["schema"] == 2  # which versions that read the first alone refuse
    assert read_shard(path).shard.chosen == (0, 2, 5)
    stored(tmp_path, whole, (1, 2), [3, 4])
    (full,), _ = store.rows()
    assert full.complete
    assert not full.partial
    assert full.records["first_hit"].tolist() == B
    assert store.missing(whole.cell) == []


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"chosen": [0, 5, 2]}, "do not ascend"),
        ({"chosen": [0, 2, 2, 5]}, "do not ascend"),
        ({"chosen": [1, 2, 5]}, "do not ascend from 0 to 6"),
        ({"chosen": []}, "schema 2"),
        ({"chosen": [0, 3, 5]}, "belongs into"),
        ({"schema": 1}, "schema 1"),
    ],
)
def test_a_shard_that_lies_about_its_samples_is_damage(tmp_path, said, message):
    stored(tmp_path, row(B), [0, 2, 5])
    (path,) = tmp_path.rglob("*.json")
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_bytes(sign({**content, **said}))
    _, (error,) = Store(tmp_path).rows()
    assert message in str(error)


def test_records_leave_them_out_and_say_so(tmp_path, capsys):
    stored(tmp_path, row(A), (0, 6))
    stored(tmp_path, row(B, attack="simba"), [0, 2, 5])
    bench_records(tmp_path, None, tmp_path / "out.csv")
    assert "left out: 1 cells" in capsys.readouterr().err
    assert set(pd.read_csv(tmp_path / "out.csv")["attack"]) == {"square"}
