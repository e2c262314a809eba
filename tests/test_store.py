"""Results on disk: what is saved comes back, and what is broken costs itself alone."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bench.errors import StoreError
from bench.plan.cell import Cell, Component
from bench.results.shards import Shard
from bench.results.store import Store
from bench.threat import Threat


def cell(attack: str = "square", n: int = 10) -> Cell:
    return Cell(
        dataset=Component("digits"),
        model=Component("cnn", params={"width": 32}),
        defense=(Component("rnd(sigma=0.1)", traits=("random",), stage="output"),),
        attack=Component(attack, version="1+abc"),
        threat=Threat("linf", 8 / 255, "scores", 100),
        ids=tuple(range(100, 100 + n)),
        seed=0,
    )


def records(start: int, stop: int, hit: int = -1) -> pd.DataFrame:
    ids = range(100 + start, 100 + stop)
    return pd.DataFrame(
        {
            "sample_id": ids, "y": 0, "first_hit": hit, "final_pred": 0, "final_margin": [0.1 * i for i in ids],
            "invalid": False, "seed": 0,
        }
    )  # fmt: skip


def save(store: Store, start: int, stop: int, hit: int = -1, **fields: Any) -> None:
    store.save(Shard(fields.pop("cell", cell()), start, stop, **fields), records(start, stop, hit))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results").open()


def files(store: Store, pattern: str) -> list[Path]:
    return sorted(store.root.rglob(pattern))


def test_a_row_comes_back_as_it_was_saved(store):
    save(store, 0, 4, seconds=1.25, figures={"train_accuracy": 0.5}, provenance={"python": "3.11"})
    save(store, 4, 10)
    row = Store(store.root).row(cell())
    assert row.cell == cell()
    assert row.complete
    assert row.errors == []
    assert row.figures == {"train_accuracy": 0.5}
    assert row.shards == (Shard(cell(), 0, 4, 1.25, {"train_accuracy": 0.5}, {"python": "3.11"}), Shard(cell(), 4, 10))
    pd.testing.assert_frame_equal(row.records, records(0, 10))


def test_missing_counts_shards_of_any_size(store):
    assert store.missing(cell()) == list(range(10))
    save(store, 2, 4)
    save(store, 7, 8)
    assert store.missing(cell()) == [0, 1, 4, 5, 6, 8, 9]
    save(store, 0, 8)
    assert store.missing(cell()) == [8, 9]
    assert store.missing(cell("pgd")) == list(range(10)), "another cell has its own shards"


def test_shards_that_overlap_give_each_sample_once(store):
    save(store, 0, 6)
    save(store, 4, 10)
    assert store.row(cell()).records["sample_id"].tolist() == list(range(100, 110))


def test_folders_that_contradict_each_other_are_named(store):
    """Results of two machines, copied together: one that was read alone would pass for the truth."""
    save(store, 0, 6)
    save(Store(store.root / "theirs"), 3, 10)
    rows, damaged = store.rows()
    assert [len(row.records) for row in rows] == [10]
    assert damaged == [], "where they agree, they add up"
    save(Store(store.root / "others"), 5, 10, hit=7)
    rows, damaged = store.rows()
    assert [len(row.records) for row in rows] == [10]
    assert ["1 samples differ" in str(damaged[0]), "5 samples differ" in str(damaged[1])] == [True, True]
    assert all("others" in str(error) for error in damaged)


def test_a_cell_is_one_whose_shards_lie_in_two_folders(store):
    """As two machines leave it; whoever reads sees it whole, so nobody may run it again."""
    save(store, 0, 6)
    save(Store(store.root / "theirs"), 6, 10)
    again = Store(store.root)
    assert again.missing(cell()) == []
    assert again.row(cell()).complete
    save(Store(store.root / "others"), 5, 10, hit=7)
    with pytest.raises(StoreError, match="1 samples differ"):
        Store(store.root).missing(cell())


@pytest.mark.parametrize("name", ["square-{} (copy)", "square{}", "square"])
def test_a_folder_that_nobody_reads_is_named_before_a_run_does_it_again(store, name):
    save(store, 0, 10)
    home = files(store, "*.json")[0].parent
    home.rename(home.with_name(name.format(cell().key[:8])))
    assert len(store.rows()[1]) == 1
    with pytest.raises(StoreError, match="of another cell than its folder"):
        Store(store.root).missing(cell())


def test_a_failure_is_kept_and_forgotten_when_the_shard_succeeds(store):
    save(store, 0, 5)
    store.fail(Shard(cell(), 5, 10, error="Traceback\nRuntimeError: boom"))
    assert store.row(cell()).errors == ["Traceback\nRuntimeError: boom"]
    assert not store.row(cell()).complete
    assert store.missing(cell()) == [5, 6, 7, 8, 9]
    save(store, 5, 10)
    assert store.row(cell()).errors == []
    assert store.row(cell()).complete


def test_a_failure_is_over_when_shards_of_another_size_have_covered_it(store):
    store.fail(Shard(cell(), 0, 10, error="boom"))
    save(store, 0, 5)
    assert store.row(cell()).errors == ["boom"], "half of its samples are still missing"
    save(store, 5, 10)
    assert store.row(cell()).errors == []


def alter_text(path: Path) -> None:
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def alter_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def age(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 0}))


DAMAGES = {
    "altered JSON": ("*.json", alter_text, "was altered"),
    "truncated JSON": ("*.json", truncate, "cannot be read"),
    "other schema": ("*.json", age, "schema 0"),
    "no JSON": ("*.json", lambda path: path.write_text("hello"), "cannot be read"),
    "JSON of something else": ("*.json", lambda path: path.write_text("[1, 2]"), "cannot be read"),
    "binary": ("*.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "empty": ("*.json", lambda path: path.write_bytes(b""), "cannot be read"),
    "altered records": ("*.parquet", alter_byte, "was altered"),
    "truncated records": ("*.parquet", truncate, "was altered or cut short"),
    "no records": ("*.parquet", Path.unlink, "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_by_file_and_costs_no_other_row(store, damage):
    pattern, break_it, complaint = DAMAGES[damage]
    save(store, 0, 10)
    (broken,) = files(store, pattern)
    save(store, 0, 10, cell=cell("pgd"))
    break_it(broken)

    rows, damaged = store.rows()
    assert [row.cell.attack.spec for row in rows] == ["pgd"]
    (error,) = damaged
    assert str(broken) in str(error)
    assert complaint in str(error)
    assert "\n" not in str(error)
    for ask in (store.row, store.missing):
        with pytest.raises(StoreError, match=r"restore it, or delete it|use the version"):
            ask(cell())
    assert store.missing(cell("pgd")) == []


def test_what_a_kill_leaves_behind_is_no_shard(store):
    save(store, 0, 5)
    folder = files(store, "*.json")[0].parent
    (folder / ".000005-000010.json.1a2b3c4d.tmp").write_text('{"schema"')
    (folder / "000005-000010-0123456789ab.parquet").write_bytes(b"half a table, its JSON never came")
    assert store.missing(cell()) == [5, 6, 7, 8, 9]
    rows, damaged = store.rows()
    assert (len(rows), damaged) == (1, [])
    save(store, 5, 10)
    assert store.row(cell()).complete


def test_nothing_but_shards_is_read(store):
    save(store, 0, 10)
    (store.root / "some-notes.json").write_text("{}")
    (store.root / "node-modules").mkdir()
    (store.root / "node-modules" / "lock-file.json").write_text("{}")
    rows, damaged = store.rows()
    assert (len(rows), damaged) == (1, [])


def test_two_writers_of_one_shard_leave_one_whole_shard(store):
    """Even when their records differ, as rounding differs between two kinds of machines."""
    start = threading.Barrier(2)

    def write(hit: int) -> None:
        start.wait()
        for _ in range(20):
            save(Store(store.root), 0, 10, hit)

    writers = [threading.Thread(target=write, args=(hit,)) for hit in (3, 7)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    row = store.row(cell())
    assert row.complete
    assert row.records["first_hit"].nunique() == 1
    assert files(store, "*.tmp") == files(store, ".*.tmp") == []


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write to .*file.*choose another --out"):
        Store(tmp_path / "file" / "results").open()


def test_a_folder_that_is_not_there_holds_no_rows(tmp_path):
    with pytest.raises(StoreError, match="no results folder"):
        Store(tmp_path / "nothing").rows()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from bench.errors import StoreError
from bench.results.store import Store
from tests.test_store import records, save
store = Store(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an OSError then
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save(store, 5, 10)
except StoreError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits")
def test_a_full_disk_costs_the_shard_in_work_and_nothing_else(store):
    save(store, 0, 5)
    before = {path: path.read_bytes() for path in files(store, "*") if path.is_file()}
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(store.root)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert "free some space" in run.stdout
    assert "what was finished is kept" in run.stdout
    assert {path: path.read_bytes() for path in files(store, "*") if path.is_file()} == before
    save(store, 5, 10)
    assert store.row(cell()).complete


def test_hostile_names_stay_inside_the_folder(store):
    evil = cell("../../etc/passwd.py:x" + "y" * 300)
    save(store, 0, 10, cell=evil)
    (path,) = files(store, "*.json")
    assert path.resolve().parents[3] == store.root.resolve()
    assert ".." not in str(path.relative_to(store.root))
    assert store.row(evil).cell == evil
