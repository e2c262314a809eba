"""Samples taken in order until a figure is decided: intervals and tests that hold whenever that is."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats as exact

from bench.cli.records import records as bench_records
from bench.errors import ConfigError, StoreError
from bench.measure.pipeline import Pipeline
from bench.oracle import NEVER
from bench.plan.order import in_order
from bench.report.compare import duels
from bench.report.leaderboard import records, render, summary
from bench.report.outcomes import clean, taken
from bench.report.ranking import Held, beaten, ranks_of
from bench.report.sequence import capital, confidence_sequence, paired_sequence, sequence_bounds
from bench.report.standings import tables
from bench.report.stats import wilson
from bench.results.records import length
from bench.results.shards import read_shard
from bench.results.store import Row, Store
from bench.run.runner import run
from bench.run.until import Ranked, Until, Width, looks, next_look, parse
from bench.site.boards import boards
from bench.tracks import track_of
from benchmarks.worst_only import Replay
from tests.runs import Quiet
from tests.test_cli import MODEL, bench
from tests.test_runner import grid, run_in
from tests.test_shards import sign
from tests.test_standings import fixed


class TestTheOrder:
    def test_is_what_stored_rows_were_taken_in(self):
        assert in_order(range(10)).tolist() == [3, 5, 7, 4, 1, 2, 8, 9, 6, 0]

    def test_of_common_samples_is_the_same_in_every_cell(self):
        rng = np.random.default_rng(0)
        a, b = (np.sort(rng.choice(1000, 600, replace=False)) for _ in range(2))
        one, other = ([each for each in ids[in_order(ids)] if each in a and each in b] for ids in (a, b))
        assert one == other

    def test_knows_nothing_of_the_order_of_the_file(self):
        first = in_order(range(10_000))[:1000]
        assert np.histogram(first, bins=10, range=(0, 10_000))[0] == pytest.approx([100] * 10, abs=30)


class TestTheSequence:
    @pytest.mark.parametrize("n", [1, 20, 200])
    def test_of_none_and_all_is_known_in_closed_form(self, n):
        end = 1 - (20 * (n + 1)) ** (-1 / n)
        assert confidence_sequence(0, n) == (0.0, pytest.approx(end, abs=1e-12))
        assert confidence_sequence(n, n) == (pytest.approx(1 - end, abs=1e-12), 1.0)

    def test_is_everything_before_the_first_sample(self):
        assert confidence_sequence(0, 0) == (0.0, 1.0)

    @pytest.mark.parametrize("share", [0.02, 0.3, 0.5])
    def test_a_bet_against_the_truth_is_fair(self, share):
        k = np.arange(31)
        mean = exact.binom.pmf(k, 30, share) @ np.exp(capital(k, 30 - k, share))
        assert mean == pytest.approx(1, abs=1e-9)

    @pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.93])
    def test_all_intervals_hold_the_truth_at_once_with_95_percent(self, share):
        """Counted out over all runs of up to 400 samples."""
        alive, lost = np.ones(1), 0.0  # by successes so far, the probability that no interval has missed
        for n in range(1, 401):
            alive = np.append(alive * (1 - share), 0) + np.append(0, alive * share)
            missed = capital(np.arange(n + 1), n - np.arange(n + 1), share) >= np.log(20)
            lost += alive[missed].sum()
            alive[missed] = 0
        assert 0.01 < lost < 0.05

    @pytest.mark.parametrize("n", [1, 7, 200])
    def test_ends_where_the_bet_against_a_share_has_grown_twentyfold(self, n):
        k = np.arange(n + 1)
        for end, inside in zip(sequence_bounds(k, np.full(n + 1, n)), (k > 0, k < n), strict=True):
            assert capital(k, n - k, end)[inside] == pytest.approx(np.log(20), abs=1e-9)

    def test_is_wider_than_an_interval_for_a_number_of_samples_that_was_fixed(self):
        for k in (0, 13, 100, 200):
            (low, high), (inner, outer) = confidence_sequence(k, 200), wilson(k, 200)
            assert low <= inner <= outer <= high

    def test_of_pairs_calls_chance_a_difference_in_at_most_5_percent_of_all_runs(self):
        alive, lost = np.ones(1), 0.0
        for n in range(1, 401):
            alive = np.append(alive, 0) / 2 + np.append(0, alive) / 2
            k = np.arange(n + 1)
            missed = np.exp(-capital(k, n - k, 0.5)) < 0.05
            lost += alive[missed].sum()
            alive[missed] = 0
        assert 0.01 < lost < 0.05

    def test_of_pairs_looks_at_every_moment_and_says_who_led_then(self):
        p, lead = paired_sequence(np.array([[0] * 5 + [1] * 12 + [-1] * 20, [0] * 37]))
        assert p.tolist() == [pytest.approx(13 / 2**12), 1]
        assert lead[0] == 12
        assert paired_sequence(np.zeros((2, 0))).p.tolist() == [1, 1]


def stopped(whole: Row, n: int) -> Row:
    """``whole`` as if it had been stopped after the first ``n`` samples in their order."""
    return of(whole, sorted(in_order(whole.cell.ids)[:n].tolist()))


def of(whole: Row, positions: list[int]) -> Row:
    shard = replace(whole.shards[0], start=positions[0], stop=positions[-1] + 1, chosen=tuple(positions), in_order=True,
                    until="width=10")  # fmt: skip
    return Row.of(whole.cell, whole.records.iloc[positions].reset_index(drop=True), (shard,))


def drawn(share: float, n: int = 200, defense: str = "none", attack: str = "square", seed: int = 0, **fields) -> Row:
    """A row of which each sample stands with the probability ``share``."""
    hits = np.where(np.random.default_rng(seed).random(n) < share, NEVER, 50)
    return fixed(hits.tolist(), defense, attack, **fields)


class TestARowThatHasStopped:
    def test_has_no_figure_for_who_does_not_ask_for_one(self):
        met = stopped(drawn(0.5), 80)
        assert met.stopped
        assert not met.n
        assert not clean(met).n
        assert length(met.prefix) == length(met.partial) == 80

    def test_stands_in_the_table_with_a_mark_its_samples_and_a_sequence(self):
        whole = drawn(0.5)
        (table,) = tables([stopped(whole, 80)], (10,))
        (line,) = table.lines
        first = np.isin(np.arange(200), in_order(whole.cell.ids)[:80])
        held = int((whole.records["first_hit"][first] == NEVER).sum())
        assert line.marks == {"sequence"}
        assert line.samples == "80 of 200"
        assert line.rank == 1
        assert line.shares["@100"].interval == confidence_sequence(held, 80)
        assert line.shares["@100"].value == held / 80
        assert "⇥ run by --until" in render([table], "md")
        record = records([table])[0]
        assert (record["n"], record["n of"], record["marks"]) == (80, 200, "sequence")
        assert record["@100 low"] == confidence_sequence(held, 80)[0]
        assert summary(stopped(whole, 80)).endswith("80 of 200 samples taken")

    def test_ends_its_prefix_where_a_sample_is_missing(self):
        order = in_order(range(200)).tolist()
        met = of(drawn(0.5), sorted([*order[:30], *order[31:60]]))
        assert length(met.prefix) == 30
        assert taken(met).n == 30

    def test_keeps_its_sequence_when_nothing_was_decided_before_the_last_sample(self):
        met = stopped(drawn(0.5), 200)
        assert not met.stopped
        (table,) = tables([met])
        assert table.lines[0].marks == {"sequence"}
        held = int((met.columns["first_hit"] < 0).sum())
        assert table.lines[0].shares["@100"].interval == confidence_sequence(held, 200)
        assert table.lines[0].samples == "200 of 200"

    def test_has_an_interval_for_a_fixed_number_again_once_a_full_run_has_done_the_rest(self):
        whole, order = drawn(0.5), in_order(range(200)).tolist()
        early, late = stopped(whole, 80), of(whole, sorted(order[80:]))
        shards = *early.shards, *(replace(shard, until="") for shard in late.shards)
        met = Row.of(whole.cell, whole.columns, shards)
        assert not met.sequential
        (table,) = tables([met])
        assert not table.lines[0].marks
        assert table.lines[0].shares["@100"].interval == wilson(int((whole.columns["first_hit"] < 0).sum()), 200)

    def test_has_it_too_where_a_full_run_of_all_samples_lies_beside_it(self):
        whole = drawn(0.5)
        (full,) = whole.shards
        assert not Row.of(whole.cell, whole.columns, (*stopped(whole, 80).shards, full)).sequential
        half = replace(full, stop=100)
        assert Row.of(whole.cell, whole.columns, (*stopped(whole, 200).shards, half)).sequential

    def test_takes_the_worst_case_on_the_samples_that_all_attacks_have_taken(self):
        a, b, c = drawn(0.6), drawn(0.7, attack="simba", seed=1), drawn(0.9, attack="rays", seed=2)
        (table,) = tables([stopped(a, 60), stopped(b, 90), c])
        head = table.lines[0]
        first = in_order(range(200))[:60]
        fell = np.any([each.records["first_hit"].to_numpy()[first] != NEVER for each in (a, b, c)], axis=0)
        assert (head.n, head.of) == (60, 200)
        assert head.shares["@100"] .value == 1 - fell.mean()
        assert head.shares["@100"].sequence
        assert "sequence" in head.marks

    def test_keeps_what_it_says_in_a_file_that_older_versions_refuse(self, tmp_path):
        met = stopped(drawn(0.5), 80)
        (shard,) = met.shards
        store = Store(tmp_path).open()
        store.save(shard, Row(met.cell, met.partial, ()).records)
        (path,) = tmp_path.rglob("*-*.json")
        assert json.loads(path.read_text())["schema"] == 3
        assert read_shard(path).shard.in_order
        assert length(store.row(met.cell).prefix) == 80
        content = json.loads(path.read_text())
        for change in (
            {"schema": 2}, {"chosen": []}, {"in_order": False}, {"in_order": "yes"}, {"until": 1},
            {"schema": 2, "in_order": False},
        ):
            path.write_bytes(sign({**content, **change}))
            with pytest.raises(StoreError):
                read_shard(path)

    def test_takes_part_in_no_test_for_a_fixed_number_of_samples(self):
        rows = [stopped(drawn(0.5), 80), drawn(0.9, defense="rnd")]
        with pytest.raises(ConfigError, match=r"stopped early, after 80 of 200 samples.*without --until completes it"):
            duels(rows, "none", "rnd")
        (board,) = boards(tables(rows))
        assert not any(entry.portrait.graphs for entry in board.entries if entry.label == "none")

    def test_is_left_out_of_records(self, tmp_path, capsys):
        met = stopped(drawn(0.5), 80)
        Store(tmp_path).open().save(met.shards[0], Row(met.cell, met.partial, ()).records)
        bench_records(tmp_path)
        assert "1 cells" in capsys.readouterr().err


class TestRanks:
    def test_are_of_common_samples_and_a_test_that_holds_at_any_time(self):
        """Of 60 common samples 20 stand with one alone: McNemar's p on all 200 has no say."""
        order = in_order(range(200))
        hits = np.full(200, NEVER)
        hits[order[:20]] = 1
        rows = [stopped(fixed(hits.tolist()), 60), stopped(fixed([NEVER] * 200, "b"), 60)]
        (table,) = tables(rows)
        assert {line.defense: line.rank for line in table.lines} == {"b": 1, "none": 2}
        hits[order] = np.where(np.arange(200) < 60, NEVER, 1)  # no difference before sample 60, and all after it
        rows = [stopped(fixed(hits.tolist()), 60), fixed([NEVER] * 200, "b")]
        (table,) = tables(rows)
        assert {line.rank for line in table.lines} == {1}

    def test_of_whole_rows_are_those_of_mcnemar(self):
        def held(wins: int) -> Held:
            return Held(np.arange(20) < wins, np.ones(20, dtype=bool), cut=False)

        assert ranks_of({"a": held(6), "b": held(0)}) == {"a": 1, "b": 2}
        thin = replace(held(6), sequential=True)
        assert paired_sequence(np.ones(6)).p > 0.05 > exact.binomtest(6, 6).pvalue
        assert ranks_of({"a": thin, "b": held(0)}) == {"a": 1, "b": 1}
        assert beaten({"a": thin, "b": held(0)})["b"] == frozenset()
        assert beaten({"a": replace(held(12), sequential=True), "b": held(0)})["b"] == {"a"}

    def test_are_not_given_where_no_sample_is_common(self):
        a, b = stopped(drawn(0.5), 10), drawn(0.5, attack="simba")
        empty = of(b, [int(in_order(range(200))[-1])])
        (table,) = tables([a, empty])
        assert table.lines[0].rank is None
        assert "incomplete" in table.lines[0].marks


class Played(Replay):
    """A store in which a cell comes to be as its turns come, of what full runs have stored."""

    def row(self, cell):
        full, met = self._full[cell.key], self.met[cell.key]
        return of(full, met) if met else Row(cell, {}, ())


def played(rows, rule, shard_size=100, entangled=()):
    """How many samples each cell has taken in the end, and the store."""
    store = Played(rows)
    plan = Until(rule, [each.cell for each in rows], store, shard_size, entangled)
    waiting = plan.first()
    while waiting:
        turn = waiting.pop(0)
        assert turn.positions
        store.run(turn)
        waiting += plan.after(turn)
        assert not plan.ended(turn.key) or turn.key not in {other.key for other in waiting}
    assert all(plan.ended(each.cell.key) for each in rows)
    return [len(store.met[each.cell.key]) for each in rows], store


class TestWhenItIsDecided:
    def test_an_interval_is_narrow_enough_at_the_first_look_that_finds_it_so(self):
        rows = [drawn(0.95, 1000), drawn(0.5, 1000, "rnd")]
        (few, many), store = played(rows, Width(15))
        assert few < many < 1000
        for each in rows:
            first = store.row(each.cell)
            held = int((taken(first).columns["first_hit"] == NEVER).sum())
            low, high = confidence_sequence(held, length(first.prefix))
            assert high - low <= 0.15
        *_, before, last = looks(length(store.row(rows[0].cell).prefix))
        assert last == next_look(before, 20)
        (line,) = tables([stopped(rows[0], before)])[0].lines
        low, high = line.shares["@100"].interval
        assert high - low > 0.15

    def test_what_is_never_narrow_enough_runs_whole(self):
        assert played([drawn(0.5)], Width(5))[0] == [200]

    def test_a_rank_is_when_every_other_has_been_told_apart(self):
        rows = [drawn(0.1, 400), drawn(0.5, 400, "rnd", seed=1), drawn(0.9, 400, "b", seed=2)]
        (none, rnd, b), store = played(rows, Ranked())
        assert max(none, rnd, b) < 200
        (table,) = tables([store.row(each.cell) for each in rows])
        assert {line.defense: line.rank for line in table.lines} == {"b": 1, "rnd": 2, "none": 3}

    def test_a_tie_goes_on_to_the_end_and_who_is_clear_of_it_stops(self):
        same = drawn(0.5, 200)
        rows = [same, fixed(same.records["first_hit"].tolist(), "rnd"), drawn(1.0, 200, "b")]
        (none, rnd, b), _ = played(rows, Ranked())
        assert none == rnd == 200
        assert b < 100

    def test_all_attacks_of_a_defense_go_on_together(self):
        rows = [drawn(share, 400, name, attack, seed) for seed, (share, name, attack) in enumerate([
            (0.2, "none", "square"), (0.9, "none", "simba"), (0.8, "b", "square"), (0.9, "b", "simba"),
            (0.5, "none", "transfer"),
        ])]  # fmt: skip
        (*attacks, control), _ = played(rows, Ranked())
        assert len(set(attacks)) == 1
        assert attacks[0] < 200
        assert control == 400  # which is in no worst case

    def test_who_cannot_be_ranked_runs_whole(self):
        rows = [drawn(0.1), drawn(0.9, defense="b"), drawn(0.5, defense="c", attack="simba")]
        assert played(rows, Ranked())[0][2] == 200

    def test_what_depends_on_the_samples_beside_it_and_learners_run_whole_at_once(self):
        rows = [drawn(0.95, 400), drawn(0.95, 400, "rnd")]
        (one, other), _ = played(rows, Width(15), entangled=[rows[1].cell.key])
        assert one < other == 400

    def test_the_first_sample_runs_first_and_what_was_done_is_not_done_again(self):
        whole = drawn(0.5, 400)
        store = Played([whole])
        (turn,) = Until(Width(15), [whole.cell], store, 100).first()
        assert turn.positions == sorted({0, *in_order(range(400))[:20].tolist()})
        store.run(turn)
        (next_,) = Until(Width(15), [whole.cell], store, 100).first()
        assert not set(next_.positions) & set(turn.positions)

    def test_a_cell_that_has_failed_has_no_further_turn(self):
        whole = drawn(0.5, 400)
        plan = Until(Width(15), [whole.cell], Played([whole]), 100)
        (turn,) = plan.first()
        assert plan.after(turn) == []
        assert plan.ended(turn.key)

    def test_a_run_that_was_decided_asks_for_nothing(self):
        rows = [drawn(0.95, 1000)]
        _, store = played(rows, Width(15))
        assert Until(Width(15), [rows[0].cell], store, 100).first() == []
        assert Until(Width(10), [rows[0].cell], store, 100).first()

    def test_is_said_in_one_of_two_ways(self):
        assert parse("width=2") == Width(2)
        assert parse("ranked") == Ranked()
        for text in ("width", "width=", "width=0", "width=nan", "rank", "width=100", "ranked=1"):
            with pytest.raises(ConfigError, match="say width=2"):
                parse(text)

    def test_more_than_the_samples_can_give_is_refused_before_anything_runs(self):
        with pytest.raises(ConfigError, match=r"200 samples of a cell, which give 4\.1 at best"):
            Width(2).check([drawn(0.5).cell])
        Width(5).check([drawn(0.5).cell])
        with pytest.raises(ConfigError, match="no two defenses"):
            Ranked().check([drawn(0.5).cell, drawn(0.5, attack="simba").cell])


def test_part_and_worst_only_are_refused():
    for flags in (("--part", "1/2"), ("--worst-only",)):
        ended = bench("run", "quick", "--until", "ranked", *flags)
        assert ended.code == 2
        assert "leave one out" in ended.err


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Cells on digits, a full run of them, and one that has stopped early."""
    folder = tmp_path_factory.mktemp("until")
    (folder / "means.py").write_text(MODEL)
    tasks = grid(model=[f"{folder / 'means.py'}:Means"], attack=["square"], defense=["rnd(sigma=0.1)"], n=80,
                 queries=10, eps=0.3, numerics="plain")  # fmt: skip
    _, full = run_in(folder / "full", tasks, networks=folder / "networks")
    pipeline = Pipeline(folder / "networks", torch.device("cpu"), 256)
    store = Store(folder / "early").open()
    ended = run(tasks, store, pipeline, 50, 256, Quiet(), until=Width(40))
    return tasks, full, store, pipeline, ended


def test_what_a_stopped_run_has_taken_is_what_a_full_run_says_of_it(digits):
    tasks, full, store, _, ended = digits
    assert (ended.ran, ended.failed) == (len(tasks), 0)
    for task in tasks:
        early, whole = store.row(task.cell), full.row(task.cell)
        assert early.stopped
        same = whole.records.set_index("sample_id").loc[early.prefix["sample_id"]]
        assert (same["first_hit"].to_numpy() == early.prefix["first_hit"]).mean() >= 0.98
        assert early.shards[0].findings  # the served model was probed


def test_the_same_again_runs_nothing_and_a_full_run_completes_it(digits):
    tasks, full, store, pipeline, _ = digits
    again = run(tasks, store, pipeline, 50, 256, Quiet(), until=Width(40))
    assert (again.ran, again.kept) == (0, len(tasks))
    run(tasks, store, pipeline, 50, 256, Quiet())
    for task in tasks:
        filled = store.row(task.cell)
        assert filled.complete
        assert not clean(filled).sequence
        assert (filled.records["first_hit"] == full.row(task.cell).records["first_hit"]).mean() >= 0.98
        assert track_of(task.cell).line(filled, ()).marks == track_of(task.cell).line(full.row(task.cell), ()).marks
