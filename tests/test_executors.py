"""The same rows from workers in other processes, whatever becomes of these."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.errors import ConfigError
from bench.measure.pipeline import Pipeline
from bench.results.store import Store
from bench.run.choice import choose
from bench.run.executor import Local
from bench.run.processes import Processes
from bench.run.runner import run
from bench.run.until import Ranked, Width
from bench.system.claims import CLAIMS
from tests.runs import Quiet
from tests.test_cli import MODEL
from tests.test_runner import grid

CPU = torch.device("cpu")
OWN = """
import os, resource, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import torch

@dataclass(frozen=True, kw_only=True)
class Attack:
    do: str
    access: ClassVar = "scores"
    norms: ClassVar = frozenset({"linf"})
    version: ClassVar = 1
    paper: ClassVar = ""
    def __call__(self, oracle, x, y, threat, rng):
        mark = Path(__file__).with_name("mark")
        if self.do == "end" or (self.do == "end-once" and not mark.exists()):
            mark.touch()
            if os.fork() == 0:
                time.sleep(1000)
            print("on my way out", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.do == "hang":
            mark.with_name(f"hangs-{os.getpid()}").touch()
            print("just a moment", flush=True)
            time.sleep(1000)
        if self.do == "weigh":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with mark.with_name("peaks").open("a") as file:
                file.write(f"{peak}\\n")
        if self.do == "fork":
            os.fork()
        if self.do == "fail":
            raise ValueError("no")
        x = (x + threat.eps * (2 * rng.uniform(*x.shape[1:]) - 1)).clamp(0, 1)
        oracle.scores(x)
        return x
"""


class Listening(Quiet):
    """Notes which makings and shards began."""

    def __init__(self):
        self.made, self.begun, self.settled, self.rows = [], [], 0, []

    def plan(self, samples):
        self.samples = samples

    def start(self, task, unit):
        (self.made if unit.makes else self.begun).append(unit)

    def end(self, unit, samples):
        self.settled += samples

    def finish(self, task, row, seconds):
        self.rows.append(row)


def run_in(folder, tasks, executor, shard_size=5, **more):
    store, told = Store(folder).open(), Listening()
    pipeline = Pipeline(folder / "networks", CPU, 64)
    outcome = run(tasks, store, pipeline, shard_size, 64, told, examples=True, executor=executor, **more)
    assert told.settled == told.samples
    return store, outcome, told


def files(folder):
    """What has to be equal: records, examples and networks, byte by byte, under names that have the keys."""
    kept = [*folder.rglob("*.parquet"), *folder.glob("networks/*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Seven cells by two processes, and then the same, but for one that ends its process, by this one."""
    folder = tmp_path_factory.mktemp("executors")
    file = folder / "own.py"
    file.write_text(MODEL + OWN)
    own = [f"{file}:Attack(do={what})" for what in ("fork", "ask", "end-once", "fail")]
    given = grid(model=[f"{file}:Means"], attack=own, n=10, queries=3)
    given += grid(model=[f"{file}:Means"], attack=[f"{file}:Attack(do=end)"], n=5, queries=3)
    early = "pgd-at(epochs=1, steps=1)"
    trained = grid(model=["cnn(width=4)"], attack=["noise", "square"], defense=[early], n=10, queries=3)
    tasks = [*given, *trained]
    by_two = run_in(folder / "two", tasks, Processes([CPU, CPU]))
    alone = [task for task in tasks if not task.cell.attack.spec.endswith("do=end)")]
    return tasks, by_two, run_in(folder / "one", alone, Local()), folder


def cell_of(tasks, what):
    return next(task.cell for task in tasks if what in task.cell.attack.spec)


def test_rows_are_equal_whoever_measured_them(done):
    tasks, (store, outcome, _), _, folder = done
    assert (outcome.ran, outcome.kept, outcome.failed) == (5, 0, 2)
    assert files(folder / "two") == files(folder / "one")
    assert len(files(folder / "one")) == 5 * 2 * 2 + 1
    assert store.row(cell_of(tasks, "do=ask")).complete
    assert store.row(cell_of(tasks, "do=fork")).complete  # of its two processes one goes on


@pytest.mark.parametrize("rule", [Ranked(), pytest.param(Width(40), marks=pytest.mark.slow)], ids=str)
def test_a_run_until_something_is_decided_takes_the_same_samples_whoever_measures_them(tmp_path, rule):
    (tmp_path / "means.py").write_text(MODEL)
    tasks = grid(
        model=[f"{tmp_path / 'means.py'}:Means"], attack=["square"], defense=["none", "rnd(sigma=1)"],
        n=60, queries=5, eps=0.1,
    )  # fmt: skip
    for name, executor in {"one": Local(), "two": Processes([CPU, CPU])}.items():
        store, outcome, _ = run_in(tmp_path / name, tasks, executor, shard_size=40, until=rule)
        assert (outcome.ran, outcome.failed) == (2, 0)
        rows = [store.row(task.cell) for task in tasks]
        assert any(row.stopped for row in rows)
        assert sum(len(row.shards) for row in rows) > len(rows)  # they were looked at again
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_training_that_cells_share_is_done_once(done):
    _, (_, _, told), (_, _, told_here), _ = done
    assert len(told.made) == len(told_here.made) == 1
    assert told.begun


def test_a_worker_that_is_lost_costs_a_second_try(done):
    tasks, (store, _, told), _, _ = done
    row = store.row(cell_of(tasks, "do=end-once"))
    assert row.complete
    assert not row.errors
    assert len([unit for unit in told.begun if unit.cell == row.cell.key]) in (3, 4)  # two may be lost at once


def test_a_unit_that_ends_three_workers_has_failed_with_their_last_words(done):
    tasks, (store, _, told), _, _ = done
    row = store.row(cell_of(tasks, "do=end)"))
    assert len([unit for unit in told.begun if unit.cell == row.cell.key]) == 3
    for error in row.errors:
        assert error.startswith("the last of its output:\non my way out\n3 workers were lost at it")
        assert error.endswith("was killed by SIGKILL")  # which tables show


def test_what_cannot_go_together_is_told(tmp_path):
    assert isinstance(choose(None, [CPU], None, None), Local)
    assert choose("processes", [CPU], 3, None).devices == (CPU, CPU, CPU)
    gpus = [torch.device("cuda:0"), torch.device("cuda:1")]
    assert choose(None, gpus, None, None).devices == tuple(gpus)
    assert choose(None, gpus, 3, None).devices == (*gpus, gpus[0])
    assert choose(None, [CPU], None, 60.0).devices  # this process could not end what hangs
    for wrong in [("local", gpus, None, None), ("local", [CPU], 2, None), ("local", [CPU], None, 60.0)]:
        with pytest.raises(ConfigError, match="use --executor processes"):
            choose(*wrong)
    with pytest.raises(ConfigError, match="no executor is named 'threads'"):
        choose("threads", [CPU], None, None)


def test_what_cannot_be_sent_is_told_by_name(tmp_path):
    file = tmp_path / "local.py"
    odd = "    def __post_init__(self):\n        object.__setattr__(self, 'odd', lambda: 0)\n"
    file.write_text(MODEL + OWN.replace("    def __call__", f"{odd}    def __call__"))
    tasks = grid(model=[f"{file}:Means"], attack=[f"{file}:Attack(do=ask)"], n=5, queries=3)
    with pytest.raises(ConfigError, match=r"local.py:Attack.*cannot be sent to another process .*--executor local"):
        run_in(tmp_path, tasks, Processes([CPU]))


SUITE = """
dataset = "digits"
n = 10
eps = 0.1
queries = 3
[[grid]]
model = "{file}:Means"
attack = ["{file}:Attack(do={do})"]
"""


def begun(folder, do, *more):
    """``bench run`` of one cell whose attack does that, by two workers, in shards of five."""
    folder.mkdir(exist_ok=True)
    file, suite = folder / "own.py", folder / f"{do}.toml"
    file.write_text(MODEL + OWN)
    suite.write_text(SUITE.format(file=file, do=do))
    command = [sys.executable, "-m", "bench.cli", "run", str(suite), "--out", str(folder / "out"), "--shard-size", "5",
               "--executor", "processes", "--workers", "2", *more]  # fmt: skip
    root = Path(__file__).parents[1]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hanging(folder):
    """The workers that hang, once both do."""
    deadline = time.monotonic() + 300
    while len(marks := list(folder.glob("hangs-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return [int(mark.name.partition("-")[2]) for mark in marks]


def gone(pids):
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_workers_end_with_whoever_began_them(tmp_path, number):
    process = begun(tmp_path, "hang")
    pids = hanging(tmp_path)
    began = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate()
    assert gone(pids)
    if number == signal.SIGKILL:
        return
    assert time.monotonic() - began < 30
    assert process.returncode == 128 + number
    assert "the same command resumes" in said
    assert not (tmp_path / "out" / CLAIMS).exists()


@pytest.mark.slow
def test_a_unit_that_hangs_is_ended_and_has_failed(tmp_path):
    process = begun(tmp_path, "hang", "--unit-timeout", "3")
    process.communicate()
    assert process.returncode == 1
    rows, _ = Store(tmp_path / "out").rows()
    assert len(rows[0].errors) == 2
    for error in rows[0].errors:
        assert error == "the last of its output:\njust a moment\nit took longer than 3 s, so its worker was ended"


@pytest.mark.slow
def test_two_runs_on_one_folder_share_the_work(tmp_path):
    processes = [begun(tmp_path, "ask") for _ in range(2)]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    rows, damaged = Store(tmp_path / "out").rows()
    assert not damaged
    assert rows[0].complete
    assert len(rows[0].shards) == 2
    assert not list((tmp_path / "out").rglob("*.lock"))


@pytest.mark.slow
def test_a_worker_does_not_grow_with_the_units_that_it_has_done(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(MODEL + OWN)
    tasks = grid(model=[f"{file}:Means"], attack=[f"{file}:Attack(do=weigh)"], n=200, queries=3)
    _, outcome, _ = run_in(tmp_path, tasks, Processes([CPU]), shard_size=1)
    assert outcome.ran == 1
    peaks = [int(line) for line in (tmp_path / "peaks").read_text().split()]  # in KiB
    assert len(peaks) > 150  # the others were misclassified before any attack
    assert peaks[-1] - peaks[20] < 16 * 1024, peaks[::20]
