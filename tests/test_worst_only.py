"""Whose turn it is where only the worst case is asked for: nobody is passed by that a figure of it needs."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.declarations import is_entangled
from bench.measure.pipeline import Pipeline
from bench.oracle import NEVER
from bench.plan.cell import Component
from bench.report.settings import by_setting
from bench.report.versions import by_version
from bench.results.records import length
from bench.results.store import Row, Store
from bench.run.runner import run
from bench.run.worst_only import WorstOnly
from bench.threat import Threat
from bench.tracks import track_of
from benchmarks.worst_only import Replay, of_suite, replay, total
from tests.rows import row
from tests.runs import Quiet
from tests.test_cli import MODEL, bench
from tests.test_runner import grid, run_in
from tests.test_standings import fixed
from tests.test_worst_case import stored

ROOT = Path(__file__).parents[1]


def costing(before: Row, queries: Sequence[int]) -> Row:
    return replace(before, columns=before.records.assign(forwards=list(queries)))


def priced(before: Row) -> Row:
    """``before`` with the queries that its samples have cost: until they fell, or all there were."""
    hits, budget = before.records["first_hit"], before.cell.threat.query_budget
    return costing(before, hits.where(hits != NEVER, budget).tolist())


def worst(rows: Sequence[Row]) -> dict[tuple[str, str, str], tuple[int | None, str]]:
    """By table, defense and column, the rank and the figure of the worst case with all queries."""
    found = {}
    for title, members in by_setting(rows).items():
        for line in track_of(members[0].cell).lines(members, ()):
            if line.attack.startswith("worst of"):
                last = line.left[0] if line.left else ""
                for name in ("clean", last, "final"):
                    found[title, line.defense, name] = line.rank, str(line.shares[name])
    return found


def some(rng: np.random.Generator, n: int, strength: float) -> list[int]:
    return np.where(rng.random(n) < strength, rng.integers(1, 101, n), NEVER).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_the_worst_case_of_every_table_is_that_of_full_runs(seed):
    """Attacks by scores, by labels and by gradients, some on more samples, under two seeds, and one lucky defense."""
    rng = np.random.default_rng(seed)
    gradients = Threat("linf", 8 / 255, "gradients", 100)
    lucky = Component("rnd", stage="output", traits=("random",))
    rows = []
    for defense in ("none", "aaa-linear", "rnd"):
        for attack, n, more in (
            ("square", 30, {}), ("rays", 20, {}), ("square", 20, {"seed": 1}), ("transfer", 20, {}),
            ("pgd", 20, {"threat": gradients}), ("apgd", 20, {"threat": gradients}),
        ):  # fmt: skip
            made = fixed(some(rng, n, 0.4), defense, attack, **more)
            if defense == "rnd":
                again = np.where(rng.random(n) < 0.5, 0, made.records["final_pred"])
                made = replace(made, cell=replace(made.cell, defense=(lucky,)),
                               columns=made.records.assign(final_pred=again))  # fmt: skip
            rows.append(priced(made))
    store, found = replay(rows)
    met = [store.row(each.cell) for each in rows]
    full, thin = worst(rows), worst(met)
    assert full.keys() == thin.keys()
    differ = {each for each in full if thin[each] != full[each]}
    assert {each[1:] for each in differ} <= {("rnd", "clean")}  # draws of a seed that have met nobody
    assert {thin[each][1] for each in differ} <= {""}
    assert total(found).saved > 0.3
    whole = {row.cell.attack.spec for row in met if row.complete}
    assert "transfer" in whole  # a control is in no worst case


def test_the_attack_that_has_taken_most_for_its_queries_comes_first():
    slow, quick = priced(fixed([90, 80, NEVER, 0], "none", "simba")), priced(fixed([1, 2, 3, 0], "none", "square"))
    store = Replay([slow, quick])
    plan = WorstOnly([slow.cell, quick.cell], store)
    assert [turn.key for turn in plan.first()] == [slow.cell.key]  # nobody knows yet: as the suite says
    other = [priced(fixed([50, NEVER, NEVER, 0], "rnd", attack)) for attack in ("simba", "square")]
    store = Replay([slow, quick, *other])
    for each in (slow, quick):
        store.met[each.cell.key] = [0, 1, 2, 3]
    (turn,) = WorstOnly([row.cell for row in (slow, quick, *other)], store).first()
    assert turn.key == other[1].cell.key
    assert turn.positions == [0, 1, 2, 3]
    assert not turn.chosen


def test_a_run_that_was_cut_off_goes_on_with_what_is_missing():
    a, b = priced(fixed([5, NEVER, 7, NEVER, 0], "none", "square")), priced(fixed([NEVER] * 5, "none", "simba"))
    store = Replay([a, b])
    store.met = {a.cell.key: [0, 1, 2, 3, 4], b.cell.key: [0, 1]}
    (turn,) = WorstOnly([a.cell, b.cell], store).first()
    assert turn == (b.cell.key, [3], True)


def test_what_a_full_run_has_begun_is_ended_though_none_of_the_rest_still_stands(tmp_path):
    a, b = priced(fixed([5, 6, 7, 8, 0], "none", "square")), priced(fixed([NEVER] * 4 + [0], "none", "simba"))
    store = stored(tmp_path, a, (0, 5))
    stored(tmp_path, b, (0, 2))
    (turn,) = WorstOnly([a.cell, b.cell], store).first()
    assert turn == (b.cell.key, [2], True)
    stored(tmp_path, b, turn.positions)
    head, *_ = track_of(a.cell).lines([store.row(each.cell) for each in (a, b)], ())
    assert head.n == 5
    assert not head.marks
    assert not WorstOnly([a.cell, b.cell], store).first()


def test_what_failed_is_tried_again_even_where_others_have_felled_its_samples_since():
    a, b = priced(fixed([5, 6, NEVER], "none", "square")), priced(fixed([NEVER] * 3, "none", "simba"))
    store = Replay([a, b])
    store.met[a.cell.key] = [0, 1, 2]
    failed = replace(b.shards[0], start=0, stop=2, error="boom")
    row_of = store.row

    def row_with_failure(cell):
        return replace(row_of(cell), shards=(failed,)) if cell.key == b.cell.key else row_of(cell)

    store.row = row_with_failure  # type: ignore[method-assign]
    (turn,) = WorstOnly([a.cell, b.cell], store).first()
    assert turn.positions == [0, 1, 2]


def test_networks_that_seeds_have_trained_do_not_wait_for_each_other():
    rows = [priced(row([5, NEVER], "pgd-at", attack, seed=seed)) for attack in ("square", "simba") for seed in (0, 1)]
    plan = WorstOnly([each.cell for each in rows], Replay(rows))
    assert [turn.key for turn in plan.first()] == [rows[0].cell.key, rows[1].cell.key]


def test_what_depends_on_the_samples_beside_it_meets_them_all():
    rows = [priced(fixed([5, 6, NEVER], "none", attack)) for attack in ("square", "simba")]
    store = Replay(rows)
    plan = WorstOnly([each.cell for each in rows], store, entangled=[rows[1].cell.key])
    (turn,) = plan.first()
    store.run(turn)
    assert plan.after(turn.key) == [(rows[1].cell.key, [0, 1, 2], False)]


def test_a_memory_of_each_sample_by_itself_entangles_nobody():
    class Defense:
        stateful = True
        by_sample = False

    assert is_entangled(object(), Defense())
    Defense.by_sample = True
    assert not is_entangled(object(), Defense())
    assert not is_entangled(None)


@pytest.mark.slow  # reads all of the committed rows
def test_the_query_suite_costs_less_than_half_of_its_queries():
    """The figure of docs/run.md."""
    rows, _ = Store(ROOT / "leaderboards" / "query-cifar10").rows()
    suite = of_suite(by_version(rows).newest, "query-cifar10")
    store, found = replay(suite)
    spent = total(found)
    assert spent.saved > 0.5
    assert f"{100 * spent.saved:.0f} % fewer queries" in (ROOT / "docs" / "run.md").read_text()
    met = [store.row(each.cell) for each in suite]
    assert worst(met) == worst(suite)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Full and worst-only runs of the same cells on digits, and what these are."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "means.py").write_text(MODEL)
    tasks = grid(
        model=[f"{folder / 'means.py'}:Means"], attack=["square", "sign-hunter", "transfer"],
        defense=["rnd(sigma=0.1)"], n=40, queries=40, eps=0.3, numerics="plain",
    )  # fmt: skip
    store = Store(folder / "worst").open()
    pipeline = Pipeline(folder / "networks", torch.device("cpu"), 256)
    ended = run(tasks, store, pipeline, 25, 256, Quiet(), worst_only=True)
    _, full = run_in(folder / "full", tasks, networks=folder / "networks")
    return tasks, full, store, ended


def test_a_run_on_digits_gives_the_worst_case_of_the_full_grid(digits):
    tasks, full, store, ended = digits
    assert (ended.ran, ended.failed) == (len(tasks), 0)
    rows = [store.row(task.cell) for task in tasks]
    assert worst(rows) == worst([full.row(task.cell) for task in tasks])
    asked, thin = (sum(length(made.row(task.cell).measured) for task in tasks) for made in (full, store))
    assert thin < asked
    assert sum(bool(each.partial) for each in rows) == 1
    for each in rows:
        assert any(shard.findings for shard in each.shards)  # every attack has met the first sample
        if each.cell.attack.control:
            assert each.complete


def test_the_same_again_runs_nothing_and_a_full_run_fills_the_gaps(digits, tmp_path):
    tasks, full, store, _ = digits
    shutil.copytree(store.root, tmp_path / "again")
    again = Store(tmp_path / "again")
    pipeline = Pipeline(tmp_path / "networks", torch.device("cpu"), 256)
    ended = run(tasks, again, pipeline, 25, 256, Quiet(), worst_only=True)
    assert (ended.ran, ended.kept) == (0, len(tasks))
    some = [task for task in tasks if not task.cell.attack.control]
    run_in(tmp_path / "again", some, networks=full.root / ".." / "networks")
    for task in some:
        filled, whole = again.row(task.cell), full.row(task.cell)
        assert filled.complete
        assert (filled.records["first_hit"] == whole.records["first_hit"]).mean() >= 0.98  # kernels round by batch size
        assert len(filled.shards) <= 6  # gaps are filled together


def test_part_of_a_run_in_turns_is_refused():
    ended = bench("run", "quick", "--worst-only", "--part", "1/2")
    assert ended.code == 2
    assert "wait for each other" in ended.err
