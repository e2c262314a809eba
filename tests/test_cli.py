"""The command line, from the outside: what it prints, stores and exits with."""

import contextlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from bench.cli import main
from bench.results.store import Store

ROOT = Path(__file__).parents[1]
BOARD = str(ROOT / "leaderboards" / "data-digits")

MODEL = '''
"""Nearest class mean: a real classifier of digits without any training."""
import torch
from sklearn.datasets import load_digits

class Means(torch.nn.Module):
    def __init__(self):
        super().__init__()
        bunch = load_digits()
        images, labels = torch.tensor(bunch.images / 16, dtype=torch.float32).flatten(1), torch.tensor(bunch.target)
        self.means = torch.nn.Parameter(torch.stack([images[labels == label].mean(0) for label in range(10)]))

    def forward(self, x):
        return 2 * x.flatten(1) @ self.means.T - self.means.square().sum(1)
'''

ATTACKS = """
from dataclasses import dataclass

class Base:
    access, norms, version, paper = "scores", frozenset({"linf"}), 1, ""

class Raises(Base):
    def __call__(self, oracle, x, y, threat, rng):
        raise RuntimeError("this attack is broken")

class Leaves(Base):
    def __call__(self, oracle, x, y, threat, rng):
        oracle.scores(1 - x)
        return 1 - x
"""


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def bench(*arguments: object) -> Ended:
    """Run the command line in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Ended(code, out.getvalue(), err.getvalue())


def run(*arguments: object, model: object = "cnn", attack: str = "square") -> Ended:
    return bench(
        "run", "--dataset", "digits", "--n", 20, "--queries", 20, "--model", model, "--attack", attack, *arguments
    )


def complaint(ended: Ended) -> str:
    """The one line that a mistake earns, after those that say whose code has run."""
    assert ended.code == 2
    (line,) = (line for line in ended.err.splitlines() if not line.startswith("running code from"))
    assert line.startswith("error: ")
    assert ended.out == ""
    return line


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "model.py").write_text(MODEL)
    (folder / "attacks.py").write_text(ATTACKS)
    return folder


@pytest.fixture(scope="module")
def means(user: Path) -> str:
    return f"{user / 'model.py'}:Means"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A results folder after a real run, training and all."""
    folder = tmp_path_factory.mktemp("trained") / "results"
    return folder, run("--out", folder, "--eps", "0.1", model="cnn(width=4)", attack="square")


@pytest.mark.parametrize(
    ("arguments", "naming", "remedy"),
    [
        (["run", "qick"], "'qick'", "did you mean 'quick'?"),
        (["run"], "dataset is missing", "--dataset"),
        (["run", "quick", "--attack", "sqare"], "no attack is named 'sqare'", "did you mean 'square'?"),
        (["run", "quick", "--defense", "aaa-liner"], "no defense is named 'aaa-liner'", "did you mean 'aaa-linear'?"),
        (["run", "quick", "--model", "ccn"], "no model is named 'ccn'", "did you mean 'cnn'?"),
        (["run", "quick", "--dataset", "digit"], "no data set is named 'digit'", "did you mean 'digits'?"),
        (["run", "quick", "--attack", "square(p_int=0.3)"], "no parameter 'p_int'", "did you mean 'p_init'?"),
        (["run", "quick", "--attack", "square(p_init=3)"], "p_init is 3", "at most 1"),
        (["run", "quick", "--attack", "missing.py:x:"], "no file 'missing.py'", "check the path"),
        (["run", "quick", "--eps", "8"], "linf eps is 8", "write 8/255 for levels"),
        (["run", "quick", "--eps", "eight"], "eps is 'eight'", "such as 0.5 or 8/255"),
        (["run", "quick", "--eps", "inf"], "eps is 'inf'", "finite"),
        (["run", "quick", "--norm", "l3"], "norm is 'l3'", "'linf'"),
        (["run", "quick", "--norm", "l1"], "not in l1", "change norm or attack"),
        (["run", "quick", "--n", "5000"], "digits has 500 test images", "lower n"),
        (["run", "quick", "--seed", "-1"], "seed is -1", "greater than or equal to 0"),
        (
            ["run", "quick", "--defense", "aaa-linear + rnd"],
            "aaa-linear and rnd both act",
            "one defense for each stage",
        ),
        (["run", "quick", "--defense", "rnd", "--attack", "standard"], "rnd has no say", "use data defenses or none"),
        (["run", "quick", "--dataset", "cifar10"], "cifar10", "BENCH_DATA_DIR"),
        (["run", "quick", "--dataset", "cifar10", "--data-dir", "nowhere"], "nowhere is not a folder", "--data-dir"),
        (["run", "quick", "--device", "tpu"], "device 'tpu' is not there", "use cpu"),
        (["run", "quick", "--device", "meta"], "device 'meta' is not there", "use cpu"),
        (["leaderboard", BOARD, "nowhere"], "no results folder nowhere", "run a suite"),
        (["leaderboard", BOARD, str(ROOT / "docs")], "docs holds no rows", "run a suite"),
        (["leaderboard", "nowhere"], "no results folder nowhere", "run a suite with --out nowhere first"),
        (["leaderboard", ".", "--format", "html"], "format is 'html'", "md, csv, latex, json"),
        (["compare"], "neither of --published and --defense", "give one of the two, or name two runs"),
        (["compare", "a", "b", "c"], "3 folder(s) and no --defense", "name two runs, or give --defense twice"),
        (["compare", "--published", "--defense", "rnd"], "both of --published and --defense", "give one of the two"),
        (["compare", "--published", "--budget", "9"], "--budget with --published", "leave it out"),
        (["compare", ".", "--defense", "rnd"], "--defense is given 1 time(s)", "once for each chain"),
        (["compare", "--defense", "rnd", "--defense", "none"], "no results folder", "bench compare FOLDER"),
        (["compare", "--published", "--figures", "nowhere"], "no published figures in nowhere", "with --figures"),
        (["compare", "nowhere", "--published"], "no results folder nowhere", "run a suite with --out nowhere first"),
        (["compare", ".", "--published", "--format", "html"], "format is 'html'", "md, csv, latex, json"),
        (["ls", "attack"], "cannot list 'attack'", "attacks, defenses, models, datasets, suites"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_earns_one_line_with_its_name_and_its_remedy(arguments, naming, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BENCH_DATA_DIR", raising=False)
    line = complaint(bench(*arguments))
    assert naming in line
    assert remedy in line
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


def arrays(images: np.ndarray, labels: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.savez(path, x_test=images, y_test=labels)


GREY = np.full((20, 8, 8, 1), 0.5, dtype=np.float32)
LABELS = np.arange(20) % 10


@pytest.mark.parametrize(
    ("save", "naming"),
    [
        (arrays(GREY * 400, LABELS), "expected [0, 1] (divide grey levels by 255)"),
        (arrays(GREY - 1, LABELS), "expected [0, 1] (undo what normalises them"),
        (arrays(np.where(LABELS[:, None, None, None] == 3, np.nan, GREY), LABELS), "2 of 20 images hold NaN or inf"),
        (arrays(np.where(LABELS[:, None, None, None] == 3, np.inf, GREY), LABELS), "2 of 20 images hold NaN or inf"),
        (arrays(GREY[:, :, 0, 0], LABELS), "(20, 8)"),
        (arrays(GREY, LABELS[:7]), "one label for each"),
        (lambda path: path.write_bytes(b"no arrays"), "data.npz"),
    ],
)
def test_data_that_cannot_be_meant_are_refused(save, naming, means, tmp_path):
    save(tmp_path / "data.npz")
    line = complaint(run("--dataset", f"npz(path={tmp_path / 'data.npz'})", "--out", tmp_path / "out", model=means))
    assert naming in line
    assert not (tmp_path / "out").exists()


def test_a_model_for_another_number_of_classes_is_refused(means, tmp_path):
    np.savez(tmp_path / "data.npz", x_test=GREY, y_test=LABELS % 3)
    line = complaint(run("--dataset", f"npz(path={tmp_path / 'data.npz'})", model=means))
    assert "expected logits (2, 3)" in line


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_weights_with_code_in_them_are_refused_and_not_run(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"conv1.weight": Bomb(tmp_path / "ran")}))
    line = complaint(run(model=f"resnet20(weights={tmp_path / 'evil.pt'})"))
    assert "evil.pt" in line
    assert "convert it to safetensors" in line
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pt")
    line = complaint(run(model=f"resnet20(weights={tmp_path / 'other.pt'})"))
    assert "other.pt does not fit ResNet20" in line


def test_a_folder_that_cannot_be_written_is_told_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    line = complaint(run("--out", tmp_path / "file" / "out"))
    assert str(tmp_path / "file") in line
    assert "choose another --out" in line


def test_a_real_run_prints_its_table_and_stores_its_rows(trained):
    folder, ended = trained
    assert ended.code == 0
    assert "### digits · cnn(width=4) · linf 0.1" in ended.out
    assert "| none" in ended.out
    assert "1 cells run, 0 were done before, 0 failed" in ended.out
    (row,), damaged = Store(folder).rows()
    assert damaged == []
    assert row.complete
    assert (row.records["first_hit"] != 0).mean() > 0.6, "the network was trained"
    assert row.records["forwards"].max() <= 20


def test_the_same_run_again_runs_nothing(trained):
    folder, first = trained
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = run("--out", folder, "--eps", "0.1", model="cnn(width=4)", attack="square")
    assert again.code == 0
    assert "0 cells run, 1 were done before, 0 failed" in again.out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    table = [line for line in first.out.splitlines() if line.startswith("|")]
    assert [line for line in again.out.splitlines() if line.startswith("|")] == table


@pytest.mark.parametrize("style", ["md", "csv", "latex", "json"])
def test_the_leaderboard_shows_the_folder_in_every_format(trained, style):
    ended = bench("leaderboard", trained[0], "--format", style, "--budget", 10)
    assert (ended.code, ended.err) == (0, "")
    assert "square" in ended.out
    assert "@10" in ended.out
    if style == "json":
        (record,) = json.loads(ended.out)
        assert record["n"] == 20


@pytest.mark.parametrize("style", ["md", "csv", "json"])
def test_committed_rows_stand_beside_published_figures(style):
    ended = bench("compare", "--published", ROOT / "leaderboards" / "query-cifar10", "--format", style)
    assert (ended.code, ended.err) == (0, "")
    assert "38.79" in ended.out, "the undefended network of UniG's README"
    assert "80.59" in ended.out, "AAA's abstract"
    assert "53.42" not in ended.out, "AutoAttack has not run"
    if style == "json":
        assert all("JPEG-coded copy" in record["differs"] for record in json.loads(ended.out))


def test_two_runs_are_compared_where_they_differ_in_the_defense_alone():
    digits, cifar = (ROOT / "leaderboards" / name for name in ("data-digits", "data-cifar10-small"))
    refused = bench("compare", digits, cifar, "--defense", "none")
    assert refused.code != 0
    assert "do not compare: data set is digits in the first and cifar10" in refused.err
    ended = bench("compare", digits, digits, "--defense", "none", "--format", "json")
    assert {record["difference"] for record in json.loads(ended.out)} == {0.0}


def test_two_defenses_are_compared_on_committed_rows():
    folder = ROOT / "leaderboards" / "query-cifar10"
    name = "unig(variant=stateless)"
    chains = ("--defense", name, "--defense", "rnd( sigma=0.02 )")  # both met the same attacks
    ended = bench("compare", folder, *chains, "--budget", 2500, "--format", "json")
    assert (ended.code, ended.err) == (0, "")
    worst = next(record for record in json.loads(ended.out) if record["at"] == "@2500")
    board = json.loads(bench("leaderboard", folder, "--format", "json").out)
    # The first line of a defense is its worst case.
    of = {line["defense"]: line["@2500"] for line in reversed(board) if line.get("@2500")}
    assert (worst["a accuracy"], worst["b accuracy"]) == (of[name], of["rnd(sigma=0.02)"])
    assert worst["difference low"] < worst["difference"] < worst["difference high"]
    assert max(map(len, bench("compare", folder, *chains).out.splitlines()[:20])) <= 100
    today = bench("compare", folder, "--defense", "unig", "--defense", "none")
    assert "A = unig(variant=batch-of-one), B = none" in today.out, "what the name alone means"
    line = complaint(bench("compare", folder, "--defense", "aaa-linear", "--defense", "none"))
    assert "no rows of defense 'aaa-linear'" in line
    assert "aaa-linear(temperature=tuned)" in line


def test_a_broken_cell_is_a_failed_row_and_costs_no_other(user, means, tmp_path):
    mine = user / "attacks.py"
    arguments = ("--attack", f"{mine}:Leaves", "--attack", "pgd(steps=3)", "--out", tmp_path / "out")
    ended = run(*arguments, model=means, attack=f"{mine}:Raises")
    assert ended.code == 1
    assert "1 cells run, 0 were done before, 2 failed" in ended.out
    assert "RuntimeError: this attack is broken" in ended.out
    assert "Leaves left the linf 8/255 ball" in ended.out
    assert "Traceback" not in ended.out + ended.err
    assert f"running code from {mine}" in ended.err

    rows, damaged = Store(tmp_path / "out").rows()
    assert damaged == []
    by_attack = {row.cell.attack.spec.rpartition(":")[2]: row for row in rows}
    assert by_attack["pgd(steps=3)"].complete
    for name in ("Raises", "Leaves"):
        assert len(by_attack[name].records) == 0, "never a row with clean inputs"
        assert by_attack[name].errors[0].startswith("Traceback")
    tables = [line for line in ended.out.splitlines() if "Raises" in line and line.startswith("|")]
    assert ["✗" in line for line in tables] == [True, True], "with queries, and beside gradients"
    again = run(*arguments, model=means, attack=f"{mine}:Raises")
    assert again.code == 1
    assert "0 cells run, 1 were done before, 2 failed" in again.out, "failed cells are tried again, done ones are not"


def test_a_truncated_row_is_named_and_the_others_are_shown(means, tmp_path):
    arguments = ("--attack", "pgd(steps=3)", "--out", tmp_path)
    assert run(*arguments, model=means).code == 0
    (broken,) = tmp_path.glob("*/*/square*/*.parquet")
    broken.write_bytes(broken.read_bytes()[:-100])
    shown = bench("leaderboard", tmp_path)
    assert shown.code == 2
    assert "pgd(steps=3)" in shown.out
    (line,) = shown.err.splitlines()
    assert line.startswith(f"error: {broken} was altered or cut short")
    again = run(*arguments, model=means)
    assert again.code == 2
    assert f"error: {broken}" in again.err
    assert "restore it, or delete it" in again.err


def test_a_dry_run_counts_and_writes_nothing(means, tmp_path):
    ended = run("--out", tmp_path / "out", "--dry-run", "--limit", 5, model=means)
    assert ended.code == 0
    assert "custom: 1 cell, 100 queries at most" in ended.out
    assert "aside" not in ended.out
    for attack, aside in (("transfer", True), ("universal-noise", False)):  # whose fits are timed
        ended = run("--out", tmp_path / "out", "--dry-run", "--limit", 5, model=means, attack=attack)
        assert ("what attacks do on networks of their own aside" in ended.out) == aside
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["attacks", "defenses", "models", "datasets", "suites"])
def test_everything_that_can_be_named_is_listed(kind):
    entries = json.loads(bench("ls", kind, "--json").out)
    table = bench("ls", kind).out
    assert {"attacks": "square", "defenses": "rnd", "models": "cnn", "datasets": "digits", "suites": "quick"}[
        kind
    ] in table
    for entry in entries:
        assert entry["name"] in table


def test_a_killed_run_resumes_where_it_was(user, means, tmp_path):
    """Finished shards stay as they are, and the end is that of a run that nobody disturbed."""
    arguments = ("--n", "40", "--queries", "200", "--eps", "0.01", "--shard-size", "5")
    command = [
        sys.executable, "-m", "bench.cli", "run", "--dataset", "digits", "--model", means, "--attack", "square",
        *arguments, "--out", str(tmp_path / "killed"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("killed/*/*/*/*.json")):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.glob("killed/*/*/*/*.json")}
    assert 1 <= len(finished) < 8, "the kill came in the middle"

    assert run(*arguments, "--out", tmp_path / "killed", model=means).code == 0
    assert run(*arguments, "--out", tmp_path / "whole", model=means).code == 0
    for path, (content, modified) in finished.items():
        assert path.read_bytes() == content
        assert path.stat().st_mtime_ns == modified
    (killed,), _ = Store(tmp_path / "killed").rows()
    (whole,), _ = Store(tmp_path / "whole").rows()
    assert killed.complete
    pd.testing.assert_frame_equal(killed.records, whole.records)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_run_and_says_what_is_kept(user, means, tmp_path, name, code):
    sent = f"__import__('os').kill({os.getpid()}, {int(signal.Signals[name])})"
    (user / f"{name}.py").write_text(ATTACKS.replace('raise RuntimeError("this attack is broken")', sent))
    ended = run("--out", tmp_path / "out", model=means, attack=f"{user / name}.py:Raises")
    assert ended.code == code
    assert "finished shards are kept" in ended.err
    assert "Traceback" not in ended.err
