"""Tasks in, shards out: the same figures however the work is cut, and nothing twice."""

import pytest
import torch

from bench.measure.pipeline import Pipeline
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, expand
from bench.results.store import Store
from bench.run.runner import run
from bench.run.units import stretches
from tests.runs import Quiet
from tests.test_cli import MODEL


class Silent(Quiet):
    """Holds what it is told to its word."""

    def plan(self, samples):
        self.left = samples

    def start(self, task, unit):
        self.work_done = []

    def work(self, unit, done, total, what):
        if what == "queries settled":
            self.work_done.append((done, total))

    def end(self, unit, samples):
        self.left -= samples
        if self.work_done:
            done, total = self.work_done[-1]
            assert done == total
            assert all(now <= whole for now, whole in self.work_done)

    def finish(self, task, row, seconds):
        assert self.left >= 0


def grid(**settings):
    base = {"dataset": "digits", "model": ["cnn(width=8)"], "n": 100, "eps": 0.15, "queries": 60}
    return expand(load_suite(None, base | settings), Loader(None, None))


def run_in(folder, tasks, shard_size=256, batch_size=256, networks=None):
    store = Store(folder).open()
    pipeline = Pipeline(networks or folder / "networks", torch.device("cpu"), batch_size)
    return run(tasks, store, pipeline, shard_size, batch_size, Silent()), store


def test_stretches_cover_what_is_missing_and_nothing_else():
    assert list(stretches([0, 1, 2, 3, 4], 2)) == [(0, 2), (2, 4), (4, 5)]
    assert list(stretches([0, 1, 5, 6, 9], 10)) == [(0, 2), (5, 7), (9, 10)]


def test_batches_and_shards_change_nothing(tmp_path, trained):
    tasks = grid(attack=["square"], defense=["none", "rnd(sigma=0.1)", "aaa-linear"], numerics="plain")
    _, whole = run_in(tmp_path / "whole", tasks, networks=trained)
    _, cut = run_in(tmp_path / "cut", tasks, shard_size=20, batch_size=16, networks=trained)
    for task in tasks:
        a, b = whole.row(task.cell), cut.row(task.cell)
        assert len(a.shards) == 1
        assert len(b.shards) == 5
        assert a.complete
        assert b.complete
        assert list(a.records["sample_id"]) == list(b.records["sample_id"])
        assert {shard.provenance["numerics"]["used"] for shard in b.shards} == {"float32"}
        assert (a.records["first_hit"] == b.records["first_hit"]).mean() >= 0.99  # kernels round by batch size
        assert (a.records["first_hit"] > 0).sum() > 0  # somebody fell to a query


def test_the_same_again_runs_nothing_and_more_runs_only_the_new(tmp_path, trained):
    first = grid(attack=["square"], defense=["none"])
    outcome, _ = run_in(tmp_path, first, networks=trained)
    assert (outcome.ran, outcome.kept, outcome.failed) == (1, 0, 0)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*-*.*")}
    outcome, _ = run_in(tmp_path, first, networks=trained)
    assert (outcome.ran, outcome.kept, outcome.failed) == (0, 1, 0)
    outcome, _ = run_in(tmp_path, grid(attack=["square", "pgd"], defense=["none"]), networks=trained)
    assert (outcome.ran, outcome.kept, outcome.failed) == (1, 1, 0)
    assert {path: path.read_bytes() for path in files} == files


def test_three_stages_run_in_one_chain(tmp_path):
    tasks = grid(attack=["pgd(steps=3)"], defense=["ops + pgd-at(epochs=1) + aaa-linear"], n=30)
    outcome, store = run_in(tmp_path, tasks)
    assert outcome.failed == 0
    row = store.row(tasks[0].cell)
    assert [component.spec for component in row.cell.defense] == ["ops", "pgd-at(epochs=1)", "aaa-linear"]
    assert row.complete


def test_records_hold_what_the_ledger_knows(tmp_path, trained):
    tasks = grid(attack=["square"], defense=["rnd(sigma=0.3)"], n=60)
    _, store = run_in(tmp_path, tasks, networks=trained)
    records = store.row(tasks[0].cell).records
    wrong = records["clean_pred"] != records["y"]
    assert wrong.any()  # at this noise
    assert (records["first_hit"][wrong] == 0).all()
    assert (records["forwards"][wrong] == 0).all()
    assert (records["first_hit"][~wrong] != 0).all()
    assert (records["norm_linf"] <= 0.15 + 1e-6).all()
    assert (records["norm_linf"][wrong] == 0).all()
    assert records["clean_share"].between(0, 1).all()
    assert (records["clean_share"] % (1 / 16) == 0).all()


def test_a_minimum_norm_attack_records_how_near_it_came(tmp_path, trained):
    tasks = grid(attack=["rays", "square"], defense=["none"], n=60)
    _, store = run_in(tmp_path, tasks, networks=trained)
    records, others = (store.row(task.cell).records for task in tasks)
    assert others["best_distance"].isna().all()
    wrong, found = records["first_hit"] == 0, records["best_distance"].notna()
    assert (records["best_distance"][wrong] == 0).all()
    assert ((records["best_distance"] <= 0.15 + 1e-6) == (records["first_hit"] != -1))[found].all()
    assert (found & (records["first_hit"] == -1)).any()  # a distance beyond the ball


def test_a_network_is_trained_once_and_found_again(tmp_path):
    tasks = grid(attack=["square"], defense=["none"], n=10, model=["cnn(width=2)"])
    run_in(tmp_path / "a", tasks, networks=tmp_path / "networks")
    (file,) = (tmp_path / "networks").iterdir()
    before = file.stat().st_mtime_ns
    _, store = run_in(tmp_path / "b", tasks, networks=tmp_path / "networks")
    assert file.stat().st_mtime_ns == before
    again = store.row(tasks[0].cell).records
    assert again.equals(Store(tmp_path / "a").row(tasks[0].cell).records)


def test_the_twin_of_a_defended_network_is_the_network_without_its_output_defense(tmp_path, trained):
    tasks = grid(attack=["transfer"], defense=["none", "aaa-linear"], numerics="plain")
    _, store = run_in(tmp_path, tasks, networks=trained)
    none, aaa = (store.row(task.cell).records["first_hit"] for task in tasks)
    assert list(none) == list(aaa)  # AAA keeps decisions
    assert 0 < (none == 1).sum() < len(none)


def test_fast_numbers_leave_a_defense_the_batch_norms_that_it_needs(tmp_path, trained):
    tasks = grid(attack=["noise"], defense=["dent"], queries=3, numerics="fast", n=10)
    outcome, _ = run_in(tmp_path, tasks, networks=trained)
    assert outcome.ran == 1


ROGUES = """
import os, random, sys
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
import pytest
import torch

@dataclass(frozen=True, kw_only=True)
class Rogue:
    do: str
    access: ClassVar = "scores"
    norms: ClassVar = frozenset({"linf"})
    version: ClassVar = 1
    paper: ClassVar = ""
    def __call__(self, oracle, x, y, threat, rng):
        if self.do == "exit":
            sys.exit(0)
        if self.do == "interrupt":
            raise KeyboardInterrupt
        if self.do == "close":
            raise GeneratorExit
        if self.do == "disturb":
            os.chdir("/")
            torch.set_default_dtype(torch.float64)
            torch.set_grad_enabled(False)
            torch.set_num_threads(2)
            torch.manual_seed(0); np.random.seed(0); random.seed(0)
            print("x" * 1_000_000)
        if self.do == "draw":
            return (x + 0.1 * (2 * torch.rand(x.shape) - 1) * np.random.rand() * random.random()).clamp(0, 1)
        return x
"""


def rogues(folder, *doing, **settings):
    """Cells of components that do such things, on a network that needs no training."""
    file = folder / "rogues.py"
    file.write_text(MODEL + ROGUES)
    return grid(model=[f"{file}:Means"], attack=[f"{file}:Rogue(do={what})" for what in doing], n=10, **settings)


@pytest.mark.parametrize("way", ["exit", "interrupt", "close"])
def test_whatever_way_a_component_takes_out_is_a_failed_shard(tmp_path, way):
    tasks = rogues(tmp_path, way, "nothing")
    outcome, store = run_in(tmp_path, tasks)
    assert (outcome.ran, outcome.failed) == (1, 1)
    (error,) = store.row(tasks[0].cell).errors
    assert {"exit": "SystemExit: 0", "interrupt": "KeyboardInterrupt", "close": "GeneratorExit"}[way] in error
    assert store.row(tasks[1].cell).complete


def test_a_component_that_changes_the_process_changes_no_other_cell(tmp_path, capsys):
    quiet, loud = rogues(tmp_path, "draw"), rogues(tmp_path, "disturb", "draw")
    _, alone = run_in(tmp_path / "alone", quiet)
    torch.rand(5)  # what was drawn before is not to matter either
    _, after = run_in(tmp_path / "after", loud)
    assert alone.row(quiet[0].cell).records.equals(after.row(quiet[0].cell).records)
    assert torch.get_default_dtype() == torch.float32
    assert len(capsys.readouterr().err) < 20_000
