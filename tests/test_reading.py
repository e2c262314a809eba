"""Reading results runs nothing: a folder full of rows that name code is shown, and none of that code runs."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from bench.entries.about import About
from bench.entries.folder import contents, hashed
from bench.entries.statement import sealed, statement
from bench.oracle import NEVER
from bench.plan.cell import Cell, Component
from bench.results.shards import Shard
from bench.results.store import Store
from bench.threat import Threat
from tests.test_cli import bench

EVIL = """
from pathlib import Path

Path("ran").write_text("")

class Defense:
    stage = "output"

def build():
    raise SystemExit("built")
"""
SERVED = Threat("linf", 0.1, "scores", 10)
RELEASED = Threat("linf", 0.1, "training-data")


def cell(
    defense: str = "", attack: str = "square", model: str = "cnn", dataset: str = "digits", **fields: object
) -> Cell:
    chain = tuple(Component(part) for part in defense.split(" + ") if part)
    made = Cell(Component(dataset), Component(model), chain, Component(attack), SERVED, ids=tuple(range(20)), seed=0)
    return replace(made, **fields)  # type: ignore[arg-type]


def store_rows(folder: Path, cells: list[Cell]) -> None:
    store = Store(folder).open()
    for each in cells:
        n = len(each.ids)
        hits = [3] * (n // 2) + [NEVER] * (n - n // 2)
        records = pd.DataFrame({"sample_id": each.ids, "y": 0, "first_hit": hits, "final_pred": 0, "invalid": False})
        store.save(Shard(each, 0, n), records)


def test_a_stored_row_is_called_what_has_to_be_written_today():
    """A default of its component has changed since: under its old name the figure would pass for another one's."""
    old = Component("unig", params={"variant": "stateless", "delta": 0.5})
    stored = replace(cell("unig"), defense=(old,))
    read = Cell.from_json(stored.as_json())
    assert read.defense_label == "unig(variant=stateless)"
    assert read.key == stored.key
    given = replace(stored, defense=(replace(old, spec="unig(delta=0.5)"),))
    assert Cell.from_json(given.as_json()).defense_label == "unig(delta=0.5, variant=stateless)"
    today = replace(stored, defense=(Component("unig", params={"variant": "batch-of-one", "delta": 0.5}),))
    assert Cell.from_json(today.as_json()).defense_label == "unig"


TRAPS = [
    cell(),
    cell(attack="rays"),
    cell(defense="theirs/evil.py:Defense"),
    cell(defense="theirs/evil.py:Defense", attack="rays"),
    cell(defense="pgd-at(epochs=1) + theirs/evil.py:Defense(a=1)"),
    cell(defense="rnd", attack="theirs/evil.py:Attack"),
    cell(model="theirs/evil.py:build"),
    cell(dataset="theirs/evil.py:build"),
    cell(dataset="npz(path=theirs/evil.py:build)"),
    cell(threat=RELEASED, attack="standard"),
    cell(defense="tap(network='theirs/evil.py:build')", threat=RELEASED, attack="standard"),
    cell(defense="tap(network='theirs/evil.py:build') + theirs/evil.py:Defense"),
    cell(defense="sep(network='theirs/evil.py:build')"),
    cell(defense="((((", attack="theirs/evil.py:"),
    cell(defense="theirs.evil:build", model="theirs.evil"),
]


@pytest.fixture
def trapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder ``theirs`` in the working directory, with the code that its rows name beside them."""
    monkeypatch.chdir(tmp_path)
    store_rows(tmp_path / "theirs", TRAPS)
    (tmp_path / "theirs" / "evil.py").write_text(EVIL)
    return tmp_path


READING = [
    *[["leaderboard", "theirs", "--format", style] for style in ("md", "csv", "latex", "json")],
    ["records", "theirs"],
    ["records", "theirs", "--out", "all.parquet"],
    ["merge", "theirs", "--out", "merged"],
    ["site", "theirs", "--out", "pages"],
    ["plot", "theirs", "--out", "pictures", "--format", "svg"],
    *[["compare", "theirs", "--published", "--all", "--format", style] for style in ("md", "csv", "json")],
    ["compare", "theirs", "--defense", "none", "--defense", "theirs/evil.py:Defense"],
    ["compare", "theirs", "--defense", "none", "--defense", "sep(network='theirs/evil.py:build')"],
    ["run", "--dataset", "digits", "--n", "2", "--queries", "2", "--model", "cnn(width=2)", "--attack", "noise",
     "--out", "theirs", "--dry-run"],
]  # fmt: skip


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_no_reading_command_runs_what_a_row_names(command, trapped):
    ended = bench(*command)
    assert not (trapped / "ran").exists()
    assert ended.code == 0, ended.err
    assert ended.err == ""


ENTERED = [
    cell(),
    cell(defense="theirs/evil.py:Defense"),
    cell(defense="theirs/evil.py:Defense", attack="theirs/evil.py:Attack"),
    cell(defense="theirs/evil.py:Defense", model="theirs/evil.py:build"),
    cell(defense="theirs/evil.py:Defense", dataset="npz(path=theirs/evil.py:build)"),
    cell(defense="theirs/evil.py:Defense", attack="transfer(from='theirs/evil.py:build')"),
]


@pytest.mark.parametrize("command", ["validate", "verify", "leaderboard"])
def test_no_command_runs_code_that_lies_in_an_entry_or_that_it_names(command, trapped):
    entry = trapped / "entry"
    store_rows(entry / "rows", ENTERED)
    (entry / "code").mkdir()
    (entry / "code" / "evil.py").write_text(EVIL)
    rows, _ = Store(entry / "rows").rows()
    sizes = contents(entry)
    files = {name: {"bytes": sizes[name], "sha256": digest} for name, digest in hashed(entry, sizes).items()}
    said = statement(rows, About(name="evil", authors=["evil"]), "query-digits", "query-digits v1", ())
    (entry / "entry.json").write_bytes(sealed({**said, "files": files}))
    for folder in (trapped, entry / "code"):  # wherever their paths lead from
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            ended = bench(command, entry)
        assert not (folder / "ran").exists()
        if command == "verify":  # which is refused before anything is looked at
            assert ended.code == 2
            assert "--code" in ended.err
        else:
            assert (ended.code, ended.err) == (int(command == "validate"), "")


def test_running_another_suite_into_the_folder_runs_its_own_code_alone(trapped):
    arguments = ["--dataset", "digits", "--n", 2, "--queries", 2, "--model", "cnn(width=2)", "--attack", "noise"]
    ended = bench("run", *arguments, "--out", "theirs")
    assert (ended.code, ended.err) == (0, "")
    assert not (trapped / "ran").exists()


def test_old_rows_get_stage_and_control_from_registered_names_alone():
    old = cell(defense="pgd-at + theirs/evil.py:Defense + rnd(sigma=0.1)", attack="transfer(steps=3)").as_json()
    for part in (old["attack"], old["model"], old["dataset"], *old["defense"]):
        del part["stage"], part["control"]
    read = Cell.from_json(old)
    assert [part.stage for part in read.defense] == ["training", "", "output"]
    assert read.attack.control
    assert not Cell.from_json(cell(attack="theirs/evil.py:transfer").as_json()).attack.control


def test_no_row_can_say_of_a_registered_name_what_it_is_not():
    written = cell(defense="rnd(sigma=0.1)", attack="square")
    lie = replace(
        written, attack=replace(written.attack, control=True), defense=(replace(written.defense[0], stage="data"),)
    )
    read = Cell.from_json(lie.as_json())
    assert not read.attack.control, "or the worst case would be without it"
    assert read.defense[0].stage == "output"


def test_stage_and_control_of_a_row_are_its_own_and_stay_out_of_the_key():
    plain = cell(defense="theirs/evil.py:Defense", attack="theirs/evil.py:Attack")
    (defense,) = plain.defense
    attack = replace(plain.attack, control=True, asks=7812)
    told = replace(plain, defense=(replace(defense, stage="training"),), attack=attack)
    assert told.key == plain.key
    assert Cell.from_json(told.as_json()) == told
    before_they_were = "0745cb4146d2293322f3b93811989acf3e985fc7c5af716902bdec7194d10ffe"
    assert cell().key == before_they_were
