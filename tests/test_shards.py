"""The reader of shards: whatever a file holds ends in its row, unchanged, or among the damaged, by name."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bench.errors import StoreError
from bench.plan.cell import Cell, Component
from bench.report.figures import figures
from bench.report.leaderboard import render
from bench.report.standings import tables
from bench.results.shards import Shard, read_shard, write_json
from bench.results.store import Row, Store, united
from bench.system.files import slug
from bench.threat import Threat
from tests.test_store import cell as small
from tests.test_store import records as small_records

COMMITTED = Path(__file__).parents[1] / "leaderboards" / "query-cifar10" / "cifar10-robust-resnet18"
(ROW,) = (COMMITTED / "none").iterdir()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one committed cell, of one shard."""
    shutil.copytree(ROW, tmp_path / "results" / ROW.name)
    return tmp_path / "results"


def json_of(folder: Path) -> Path:
    return next(folder.rglob("*.json"))


def sign(content: dict[str, Any]) -> bytes:
    """``content`` as a file whose checksum agrees with it, as someone would write it who means harm."""
    stated = {name: value for name, value in content.items() if name != "sha256"}
    digest = sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
    return json.dumps({**stated, "sha256": digest}).encode()


def put(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value of a shard's JSON, ``place`` as in ``cell.threat.eps``."""

    def change(content: dict[str, Any]) -> None:
        *path, last = place.split(".")
        for name in path:
            content = content[name]
        content[last] = value

    return change


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "text as start": put("start", "0"),
    "a share as stop": put("stop", 2.5),
    "truth as start": put("start", False),
    "start below zero": put("start", -1),
    "stop beyond the cell": put("stop", 10**9),
    "stop before start": put("stop", 0),
    "stop of hundreds of digits": put("stop", 10**300),
    "no figures": put("figures", None),
    "figures as a list": put("figures", [1]),
    "a figure as text": put("figures.cost", "cheap"),
    "a figure that is no number": put("figures.cost", float("nan")),
    "an infinite figure": put("figures.cost", float("inf")),
    "an empty finding": put("findings", [{}]),
    "findings as text": put("findings", "none"),
    "a finding that fired as text": put("findings", [{"flag": "x", "fired": "yes", "evidence": ""}]),
    "no checksum of the records": lambda content: content.pop("records_sha256"),
    "an empty checksum of the records": put("records_sha256", None),
    "a path as checksum": put("records_sha256", "../../../../etc/passwd"),
    "a number as checksum": put("records_sha256", 7),
    "an error beside records": put("error", "Traceback"),
    "no cell": lambda content: content.pop("cell"),
    "a cell as text": put("cell", "square"),
    "another key": put("key", "0" * 64),
    "another seed": put("cell.seed", 1),
    "another budget": put("cell.threat.query_budget", 5000),
    "no radius": lambda content: content["cell"]["threat"].pop("eps"),
    "another radius": put("cell.threat.eps", 0.5),
    "an unknown norm": put("cell.threat.norm", "l7"),
    "text as budget": put("cell.threat.query_budget", "2500"),
    "samples as text": put("cell.ids", ["one", "two"]),
    "no defense": put("cell.defense", None),
    "a component as a name": put("cell.attack", "square"),
    "traits as a number": put("cell.attack.traits", 3),
    "provenance as a list": put("provenance", ["me"]),
    "hardware as a number": put("provenance.hardware", 5),
    "a day that is none": put("provenance.finished", "yesterday"),
    "schema as text": put("schema", "1"),
    "schema as a list": put("schema", [1]),
    "negative time": put("seconds", -1.0),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_shard_that_is_none_is_damage_and_costs_no_other_row(folder, lie):
    path = json_of(folder)
    content = json.loads(path.read_text())
    LIES[lie](content)
    path.write_bytes(sign(content))
    other = Store(folder)
    other.save(Shard(small(), 0, 10), small_records(0, 10))

    rows, damaged = other.rows()

    assert [row.cell.dataset.spec for row in rows] == ["digits"]
    (error,) = damaged
    assert str(path) in str(error)
    assert "\n" not in str(error)


def table_lie(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    """A change of the records, with the checksums of both files made to agree."""

    def write(path: Path) -> None:
        content = json.loads(path.read_text())
        (old,) = path.parent.glob("*.parquet")
        table = change(pd.read_parquet(old)).to_parquet(index=False)
        old.unlink()
        content["records_sha256"] = sha256(table).hexdigest()
        path.with_name(f"{path.stem}-{content['records_sha256'][:12]}.parquet").write_bytes(table)
        path.write_bytes(sign(content))

    return write


def first(name: str, value: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """``value`` in the first line of a column, whatever type that gives it."""
    return lambda table: table.assign(**{name: [value, *table[name].tolist()[1:]]})


TABLES: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "a hit beyond the budget": (first("first_hit", 101), "first_hit beyond the budget of 100"),
    "more queries than the budget": (first("forwards", 101), "forwards beyond the budget"),
    "a hit that nobody made": (first("first_hit", -2), "first_hit outside"),
    "text in first_hit": (lambda table: table.assign(first_hit="never"), "first_hit, where whole values belong"),
    "no class": (lambda table: table.drop(columns="y"), "has no column y"),
    "a class that is missing": (first("y", None), "y, where whole values belong"),
    "a class below zero": (first("y", -1), "y outside"),
    "no samples": (lambda table: table.drop(columns="sample_id"), "has no column sample_id"),
    "a confidence above 1": (first("final_confidence", 1.5), "final_confidence outside 0 to 1"),
    "a share below 0": (first("final_share", -0.5), "final_share outside 0 to 1"),
    "no size of a change": (first("norm_linf", float("nan")), "has no value of norm_linf"),
    "invalid as a number": (lambda table: table.assign(invalid=0), "invalid, where truth values belong"),
    "other samples": (first("sample_id", 0), "holds other samples"),
    "samples in another order": (lambda table: table[::-1], "holds other samples"),
    "one line less": (lambda table: table[:-1], "lines for 200 samples"),
    "two seeds": (first("seed", 1), "another seed than 0"),
    "another version of the attack": (lambda table: table.assign(attack_version="9"), "another version of the attack"),
    "a fall before any query of a sample that was right": (
        lambda table: table.assign(first_hit=0), "right when clean, or the reverse"),
    "a fall after the last query": (
        lambda table: table.assign(forwards=0), "fell later than their last query"),
}  # fmt: skip


@pytest.mark.parametrize("lie", TABLES)
def test_records_that_cannot_be_those_of_the_cell_are_damage(folder, lie):
    change, complaint = TABLES[lie]
    table_lie(change)(json_of(folder))
    rows, (error,) = Store(folder).rows()
    assert rows == []
    assert complaint in str(error)
    assert ".parquet" in str(error)


def replace_by(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def grow(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # a hole, which takes no room


PLACES: dict[str, Callable[[Path], None]] = {
    "a fifo": replace_by(os.mkfifo),
    "a folder": replace_by(Path.mkdir),
    "a link to nothing": replace_by(lambda path: path.symlink_to("gone")),
    "a link to a device": replace_by(lambda path: path.symlink_to("/dev/zero")),
    "a terabyte": grow,
    "deep JSON": lambda path: path.write_text("[" * 100_000 + "]" * 100_000),
    "deep JSON inside": lambda path: path.write_text('{"sha256": ' + '{"a":' * 50_000 + "1" + "}" * 50_001),
}


@pytest.mark.parametrize("which", ["*.json", "*.parquet"])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_plain_file_of_a_size_that_can_be_meant_is_damage(folder, place, which):
    PLACES[place](next(folder.rglob(which)))
    rows, (error,) = Store(folder).rows()
    assert rows == []
    assert "\n" not in str(error)


def test_a_shard_in_the_folder_of_another_cell_is_damage(folder):
    (other,) = (COMMITTED / "unig").iterdir()
    moved = json_of(folder).parent
    for path in other.iterdir():  # the JSON takes the place of the one there
        shutil.copy(path, moved / path.name)
    rows, damaged = Store(folder).rows()
    assert rows == []
    assert ["of another cell than its folder" in str(error) for error in damaged] == [True]
    assert "unig" in str(damaged[0])


def test_only_the_key_in_a_folders_name_counts(folder):
    (stored,) = Store(folder).rows()[0]
    (folder / "old").mkdir()
    renamed = json_of(folder).parent.rename(folder / "old" / f"our-best-{stored.cell.key[:8]}")
    assert Store(folder).missing(stored.cell) == [], "a run finds it there"
    assert Store(folder).rows()[1] == []
    renamed.rename(folder / "our-best")
    rows, (error,) = Store(folder).rows()
    assert rows == []
    assert "of another cell than its folder" in str(error)


def test_folders_as_version_0_1_named_them_are_read_and_gone_on_with(folder):
    (stored,) = Store(folder).rows()[0]
    flat = json_of(folder).parent.rename(folder / f"{slug(str(stored.cell))}-{stored.cell.key[:16]}")
    path = json_of(folder)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))  # every sample on a line of its own
    assert [row.cell for row in Store(folder).rows()[0]] == [stored.cell]
    store = Store(folder)
    assert store.missing(stored.cell) == []
    store.fail(Shard(stored.cell, 0, 1, error="boom"))
    assert (flat / "000000-000001.failed.json").exists(), "beside what is there, not in a second folder"


def test_two_cells_whose_keys_start_alike_are_told_apart(folder):
    """Their folders have one name, and what one has would count as the other's."""
    (stored,) = Store(folder).rows()[0]
    other = replace(stored.cell, seed=1)
    home = json_of(folder).parent.rename(folder / f"square-{other.key[:8]}")
    (home / "000000-000001.failed.json").write_bytes(write_json(Shard(other, 0, 1, error="boom"), None))
    with pytest.raises(StoreError, match="of another cell"):
        Store(folder).missing(other)


def test_a_json_has_its_samples_on_one_line():
    ids = tuple(range(0, 900, 3))
    text = write_json(Shard(replace(small(), ids=ids), 0, 10, findings=[{"evidence": "[\n 1,\n 2\n]"}]), None).decode()
    assert f'"ids": {json.dumps(ids)}' in text
    content = json.loads(text)
    assert content["cell"]["ids"] == list(ids)
    assert content["findings"] == [{"evidence": "[\n 1,\n 2\n]"}]


def test_a_shard_under_the_name_of_another_stretch_is_damage(folder):
    path = json_of(folder)
    shutil.copy(path, path.with_name("000200-000400.json"))
    rows, (error,) = Store(folder).rows()
    assert len(rows) == 1
    assert "belongs into 000000-000200.json" in str(error)


def test_the_other_shards_of_a_cell_are_shown_when_one_is_damaged(tmp_path):
    store = Store(tmp_path)
    store.save(Shard(small(), 0, 5), small_records(0, 5))
    store.save(Shard(small(), 5, 10), small_records(5, 10))
    next(tmp_path.rglob("000005*.json")).write_text("{}")
    (row,), (error,) = store.rows()
    assert len(row.records) == 5
    assert "000005-000010.json" in str(error)
    assert tables([row])[0].lines[0].marks == {"incomplete", "random"}


def test_a_cell_in_two_folders_comes_once_and_whole(tmp_path):
    for name, start, stop in (("mine", 0, 6), ("yours", 4, 10)):
        Store(tmp_path / name).save(Shard(small(), start, stop), small_records(start, stop))
    (row,), damaged = Store(tmp_path).rows()
    assert damaged == []
    assert row.complete
    both = [rows for name in ("mine", "yours") for rows in Store(tmp_path / name).rows()[0]]
    assert [each.complete for each in united(both)] == [True]


def test_a_figure_that_was_not_measured_is_left_out(tmp_path):
    shard = Shard(small(), 0, 10, figures={"cost": float("nan"), "psnr": float("inf"), "rmse": 0.5})
    Store(tmp_path).save(shard, small_records(0, 10))
    assert Store(tmp_path).row(small()).figures == {"rmse": 0.5}


def test_an_error_that_no_encoding_holds_can_be_read(tmp_path):
    Store(tmp_path).fail(Shard(small(), 0, 10, error="ValueError: \udcff"))
    (row,), damaged = Store(tmp_path).rows()
    assert damaged == []
    assert row.errors == ["ValueError: \udcff"]


def facts(row: Row) -> tuple[str, dict[str, float], dict[str, float]]:
    return row.cell.key, figures(row), dict(row.figures)


SPICE = [None, True, False, 0, -1, 10**9, 1e308, "", "\x1b[2J", "<script>", "..", [], {}, [[]], {"a": None}, "0" * 64]


def mutate(content: Any, dice: random.Random) -> Any:
    """``content`` with one of its values, somewhere, replaced, taken out or doubled."""
    if isinstance(content, dict) and content and dice.random() < 0.9:
        name = dice.choice(list(content))
        match dice.randrange(8):
            case 0:
                return {key: value for key, value in content.items() if key != name}
            case 1:
                return {**content, f"{name}2": content[name]}
        return {**content, name: mutate(content[name], dice)}
    if isinstance(content, list) and content and dice.random() < 0.7:
        at = dice.randrange(len(content))
        return [*content[:at], mutate(content[at], dice), *content[at + dice.randrange(2) :]]
    return dice.choice(SPICE)


def read_and_print(folder: Path) -> list[Row]:
    """The rows of a folder, after a look at everything that is made of them."""
    rows, damaged = Store(folder).rows()
    assert rows or damaged
    assert all(str(folder) in str(error) and "\n" not in str(error) for error in damaged)
    render(tables(rows, [100]), "md")
    return rows


def test_no_change_of_the_bytes_changes_a_figure(folder):
    path = json_of(folder)
    (table,) = path.parent.glob("*.parquet")
    (before,) = map(facts, read_and_print(folder))
    dice = random.Random(0)
    for file in [path] * 60 + [table] * 60:
        content = bytearray(original := file.read_bytes())
        at = dice.randrange(len(content))
        match dice.randrange(3):
            case 0:
                content[at] = dice.randrange(256)
            case 1:
                del content[at : at + dice.randrange(1, 100)]
            case 2:
                content[at:at] = dice.randbytes(dice.randrange(1, 10))
        file.write_bytes(content)
        assert [facts(row) for row in Store(folder).rows()[0]] in ([], [before])
        file.write_bytes(original)


def test_no_signed_change_of_the_json_is_more_than_damage(tmp_path):
    """Even with a checksum that agrees; figures and findings that are of the right type are beyond a reader."""
    store = Store(tmp_path)
    store.save(
        Shard(
            small(), 0, 10, 1.0, {"cost": 1.0}, {"hardware": "x", "device": "cpu", "libraries": {"torch": "2"}},
            [{"flag": "f", "fired": True, "statistic": 1.0, "threshold": 0.5, "n": 10, "evidence": "e"}],
        ),
        small_records(0, 10),
    )  # fmt: skip
    path = json_of(tmp_path)
    content = json.loads(path.read_text())
    (before,) = read_and_print(tmp_path)
    dice = random.Random(1)
    accepted = 0
    for _ in range(150):
        changed = mutate(content, dice)
        path.write_bytes(sign(changed) if isinstance(changed, dict) else json.dumps(changed).encode())
        for row in read_and_print(tmp_path):
            accepted += 1
            assert row.cell.key == before.cell.key
            pd.testing.assert_frame_equal(row.records, before.records)
    assert 0 < accepted < 150


def test_no_signed_change_of_the_records_breaks_a_table(tmp_path):
    store, table = Store(tmp_path), small_records(0, 10)
    dice = np.random.default_rng(2)
    spice = [None, -1, 0, 10**12, 0.5, float("nan"), float("inf"), "x", b"x", True, [1], {"a": 1}]
    for _ in range(40):
        name, value = dice.choice(list(table)), spice[dice.integers(len(spice))]
        whole = [value] * 10 if dice.integers(2) else [value, *table[name].tolist()[1:]]
        try:
            changed = table.assign(**{name: whole})
            changed.to_parquet(index=False)
        except Exception:  # no such table can be written
            continue
        store.save(Shard(small(), 0, 10), changed)
        read_and_print(tmp_path)


def test_what_is_written_reads_back(tmp_path):
    cell = Cell(
        Component("digits"), Component("cnn"), (), Component("square"), Threat("l2", 1.0, "scores", 5), (3, 7), 1
    )
    for shard in (Shard(cell, 0, 1, error="boom"), Shard(replace(cell, ids=(1, 2)), 1, 2, error="boom")):
        folder = tmp_path / shard.cell.key[:16]
        folder.mkdir()
        (folder / shard.file_name).write_bytes(write_json(shard, None))
        assert read_shard(folder / shard.file_name)[0] == shard
    with pytest.raises(StoreError, match="cannot be read"):
        read_shard(tmp_path / "000000-000001.json")
