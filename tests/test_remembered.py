"""What a command has said of a folder before: said again of the same bytes alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from bench.cli.leaderboard import FORMATS, _Asked, _Names, _told
from bench.cli.remembered import READ, UNREAD, _files, remembered
from bench.entries.folder import ENTRY, VERIFIED
from bench.errors import StoreError
from bench.report.leaderboard import Format
from bench.results.examples import SUFFIX
from bench.results.shards import SHARDS

ROOT = Path(__file__).parents[1]
FILES = {"d/a-1/000000-000100.json": b"{}", "d/a-1/000000-000100-abc.parquet": b"PAR1", "entry.json": b"[]"}


class Reader:
    """Says what it was told to, and counts how often it was asked."""

    def __init__(self, folder: Path, said: str = "tables\n") -> None:
        self.folder, self.said, self.asked = folder, said, 0

    def __call__(self, *options: object, code: str = "code", damaged: tuple[StoreError, ...] = ()) -> str:
        def make() -> tuple[str, tuple[StoreError, ...]]:
            self.asked += 1
            return self.said, damaged

        return remembered(self.folder, options, make, code)[0]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_CACHE_DIR", str(tmp_path / "cache"))
    for name, content in FILES.items():
        path = tmp_path / "rows" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Reader(tmp_path / "rows")


def test_the_same_files_are_read_once(reader):
    assert [reader("md"), reader("md")] == ["tables\n"] * 2
    assert reader.asked == 1


@pytest.mark.parametrize("name", FILES)
def test_any_other_byte_is_read_anew(reader, name):
    reader()
    path = reader.folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    reader()
    path.rename(path.with_name(f"9{path.name}" if path.name[0] == "0" else "verified.json"))
    reader()
    path.with_name("verified.json").write_bytes(b"{}")
    reader()
    assert reader.asked == 4


def test_other_options_and_other_code_are_others(reader):
    for options, code in ((("md",), "code"), (("csv",), "code"), (("md",), "newer")):
        reader(*options, code=code)
    assert reader.asked == 3


@pytest.mark.parametrize("content", [b"", b"0" * 64 + b"other tables", b"tables", b"\xff" * 80])
def test_what_was_altered_in_the_cache_is_made_again(reader, tmp_path, content):
    reader()
    (kept,) = (tmp_path / "cache" / "tables").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(content)
    assert reader() == "tables\n"
    assert reader.asked == 2
    assert kept.read_bytes() == whole


def test_damage_and_what_cannot_be_hashed_are_never_kept(reader):
    reader(damaged=(StoreError("damaged"),))
    reader(code="")
    (reader.folder / "d" / "a-1" / "000100-000200.json").symlink_to("000000-000100.json")
    reader()
    reader()
    (reader.folder / "d" / "a-1" / "000100-000200.json").unlink()
    os.mkfifo(reader.folder / "d" / "a-1" / "000100-000200.json")
    reader()
    assert reader.asked == 5
    assert not list(reader.folder.parent.glob("cache/tables/*"))


def test_a_file_that_changes_while_it_is_read_leaves_nothing(reader):
    def make() -> tuple[str, tuple[StoreError, ...]]:
        (reader.folder / "entry.json").write_bytes(b"{}")
        return "of the older file", ()

    remembered(reader.folder, (), make, "code")
    assert reader() == "tables\n"


def test_a_cache_that_cannot_be_written_costs_time_alone(reader, tmp_path):
    (tmp_path / "cache").write_bytes(b"")
    assert [reader(), reader()] == ["tables\n"] * 2


def test_every_file_that_a_table_is_made_of_is_hashed():
    """Else a folder could change, and its table would not."""
    folder, opened = ROOT / "leaderboards" / "data-digits" / "digits-cnn-width-8" / "none", set()
    recording = True

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        if recording and event == "open" and str(arguments[0]).startswith(str(folder)):
            opened.add(str(arguments[0]))

    sys.addaudithook(hear)  # which nothing takes away again
    try:
        _told([folder], _Asked(None, (100,), False, _Names((), (), ()), False))
    finally:
        recording = False
    assert opened
    assert opened <= set(_files(str(folder)))


def test_names_of_hashed_files_are_those_that_readers_look_for():
    assert {SHARDS, ENTRY, VERIFIED} < set(READ)
    assert f"*{SUFFIX}" == UNREAD
    assert get_args(Format) == FORMATS


@pytest.mark.slow  # processes of their own, as in one that has imported components nothing is remembered
def test_a_shard_that_was_altered_after_its_table_was_remembered_is_named(tmp_path):
    rows = tmp_path / "rows"
    shutil.copytree(ROOT / "leaderboards" / "data-digits" / "digits-cnn-width-8" / "none", rows)
    environment = {**os.environ, "BENCH_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def board() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bench.cli", "leaderboard", str(rows)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    board()  # finds out what components say
    first, again = board(), board()
    assert (first.returncode, first.stdout, first.stderr) == (again.returncode, again.stdout, again.stderr)
    assert len(list((tmp_path / "cache" / "tables").iterdir())) == 1
    table = min(rows.rglob("*.parquet"))
    table.write_bytes(table.read_bytes()[:-1])
    altered = board()
    assert altered.returncode == 2
    assert f"{table} was altered" in altered.stderr
