"""Boards that are read together stay apart: nothing of one changes a figure, a rank or a mark of another."""

import json
import shutil
from pathlib import Path

import pytest

from bench.entries.boards import boards_in, standings
from bench.oracle import NEVER
from bench.results.store import Store
from tests.rows import row
from tests.test_cli import ROOT, bench

N = 40


def fill(folder: Path, attack: str, **fell: int) -> Path:
    """A results folder of one setting: of each defense so many samples fell at the fifth query."""
    store = Store(folder).open()
    for name, count in fell.items():
        made = row([5] * count + [NEVER] * (N - count), name.replace("_", "-"), attack)
        store.save(made.shards[0], made.records)
    return folder


@pytest.fixture
def boards(tmp_path):
    """Two boards of one data set, model and threat, on which `rnd` stands otherwise."""
    fill(tmp_path / "all" / "first", "square", none=38, rnd=2, unig=20)
    fill(tmp_path / "all" / "second", "rays", none=38, rnd=36)
    return tmp_path / "all"


def shown(*arguments: object) -> dict[str, list[dict[str, object]]]:
    """The lines of `bench leaderboard` by the titles of their tables."""
    found: dict[str, list[dict[str, object]]] = {}
    for line in json.loads(bench("leaderboard", *arguments, "--format", "json").out):
        found.setdefault(line.pop("table"), []).append(line)
    return found


def test_each_board_has_its_own_table_with_the_ranks_that_it_has_alone(boards):
    together = shown(boards)
    title = "digits · cnn · linf 8/255"
    assert list(together) == [f"first · {title}", f"second · {title}"]
    for name in ("first", "second"):
        assert shown(boards / name) == {title: together[f"{name} · {title}"]}
    rank = {line["defense"]: line["rank"] for line in reversed(together[f"first · {title}"])}
    assert rank == {"rnd": 1, "unig": 2, "none": 3}


def test_a_board_is_the_folder_above_its_cells_wherever_it_lies(boards):
    shutil.move(boards / "second", boards / "of" / "others" / "second")
    assert [board.name for board in boards_in([boards])[0]] == ["first", "second"]
    (alone,), _ = boards_in([boards / "first" / "digits-cnn"])
    assert (alone.name, len(alone.rows)) == ("digits-cnn", 3)
    (again,), _ = boards_in([boards / "first", boards / ".." / "all" / "first"])
    assert len(again.rows) == 3


def test_folders_of_one_name_are_told_apart_by_their_paths(boards):
    shutil.copytree(boards / "first", boards / "more" / "first")
    assert [board.name for board in boards_in([boards])[0]] == ["all/first", "more/first", "second"]
    assert len(standings(boards_in([boards])[0])) == 3


def test_pictures_and_pages_keep_them_apart(boards, tmp_path):
    assert bench("plot", boards, "--out", tmp_path / "plots", "--format", "svg", "--defense", "rnd").code == 0
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "first-digits-cnn-linf-8-255", "second-digits-cnn-linf-8-255",
    }  # fmt: skip
    assert bench("site", boards, "--out", tmp_path / "site").code == 0
    assert len(list((tmp_path / "site" / "entry").glob("rnd-*"))) == 2
    page = (tmp_path / "site" / "index.html").read_text()
    assert page.count('class="board"') == 2


def test_boards_whose_names_are_alike_in_files_have_pictures_of_their_own(boards, tmp_path):
    (boards / "first").rename(boards / "a b")
    (boards / "second").rename(boards / "a-b")
    said = bench("plot", boards, "--out", tmp_path / "plots", "--format", "svg")
    pictures = list((tmp_path / "plots").rglob("*.svg"))
    assert len({picture.parent for picture in pictures}) == 2
    assert said.out.startswith(f"{len(pictures)} pictures")


@pytest.mark.parametrize("command", [("leaderboard",), ("plot", "--out", "plots"), ("site", "--out", "site")])
def test_what_lies_behind_a_link_is_not_read_and_that_is_said(boards, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    bench(command[0], boards, *command[1:])  # which may be remembered
    (boards / "third").symlink_to(boards / "first")
    linked = bench(command[0], boards, *command[1:])
    assert linked.code == 2
    assert f"{boards / 'third'} is a link, behind which nothing is read" in " ".join(linked.err.split())
    shutil.rmtree(boards / "second")
    shutil.move(boards / "first", tmp_path / "first")
    (boards / "third").unlink()
    (boards / "third").symlink_to(tmp_path / "first")
    alone = bench(command[0], boards, *command[1:])
    assert alone.code == 2
    assert "is a link, behind which nothing is read" in " ".join(alone.err.split())


def test_boards_of_several_folders_stand_one_after_the_other():
    ended = bench("leaderboard", *(ROOT / "leaderboards" / name for name in ("data-digits", "certified-digits")))
    assert (ended.code, ended.err) == (0, "")
    assert "### certified-digits · digits" in ended.out
    assert "### data-digits · digits" in ended.out
