"""Boards in a narrow terminal: nothing is wider than it, no figure differs, and what is missing is named."""

import io
import re
import sys
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from bench.cli import main
from bench.cli.narrow_board import print_narrow, short_names
from bench.cli.narrow_duel import print_narrow_duel
from bench.cli.terminal import Terminal
from bench.oracle import NEVER
from bench.report.compare import duels
from bench.report.compare_table import lines_of
from bench.report.standings import Table, tables
from tests.rows import row
from tests.test_reading import cell, store_rows

CHAIN = "aaa-linear(offset=secret, temperature=tuned)"
ATTACK = "square(p_init=0.05, schedule=constant, restarts=3)"


@pytest.fixture(scope="module")
def board() -> Table:
    hits = {"none": [1] * 40, CHAIN: [NEVER] * 39 + [400], "aaa-linear(temperature=tuned)": [30] * 20 + [NEVER] * 20}
    rows = [row(found, name, attack, budget=500) for name, found in hits.items() for attack in (ATTACK, "nes")]
    (table,) = tables(rows, [10, 20, 50, 100, 250])
    return table


def printed(board: Table, width: int) -> str:
    out = io.StringIO()
    print_narrow(board, Terminal(file=out, width=width))
    return out.getvalue()


def body(text: str) -> list[str]:
    """The lines of the first table."""
    return [line for line in text.split("\n\n")[1].splitlines() if line.strip() and not line.startswith("No room")]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_no_line_is_wider_than_the_terminal_and_none_breaks(board, width):
    text = printed(board, width)
    assert max(map(len, text.splitlines())) <= width
    assert len([line for line in text.split("At a glance")[0].splitlines() if " 97.5" in line and "nes" in line]) == 1


def test_short_names_have_their_whole_form_in_a_legend(board):
    text = printed(board, 80)
    names = dict(re.findall(r"^(\[\d+\]) = (.*)$", text, re.MULTILINE))
    assert {CHAIN, "aaa-linear(temperature=tuned)", ATTACK} == set(names.values())
    line = next(line for line in body(text) if "aaa-linear…" in line and names[re.search(r"\[\d+\]", line)[0]] == CHAIN)
    assert line.split()[0] == "1", "the best rank"
    assert "square…[" in text
    assert names.keys() >= set(re.findall(r"\[\d+\]", text)), "no number without its name"


def test_the_figures_are_those_of_the_wide_table(board):
    text = printed(board, 80)
    head, *lines = body(text)
    for line, shown in zip(board.lines, lines, strict=True):
        values = re.findall(r"\d+\.\d(?=\s|$)", shown)
        there = [share for name, share in line.shares.items() if f" {name} " in f"{head} "]
        assert values == [f"{100 * share.value:.1f}" for share in there]


def test_what_had_no_room_is_named(board):
    text = printed(board, 80)
    head = body(text)[0]
    assert {"clean", "@500", "final", "n", "rank"} <= set(head.split()), "what a ranking needs stays"
    missing = {name for name in board.lines[0].shares if name not in head.split()}
    assert missing
    (told,) = re.findall(r"^No room for (@.*); --wide shows all columns\.$", text.split("At a glance")[0], re.MULTILINE)
    assert set(told.split(", ")) == missing
    assert "No room for 95 % intervals, which reach up to " in text
    assert "No room for" not in printed(board, 250)
    assert "97.5 [87, 100]" in printed(board, 250)


def test_defenses_of_one_rank_stand_together(board):
    heads = [line for line in board.lines if line.rank]
    lines = [replace(line, rank=rank) for line, rank in zip(heads, (1, 1, 3), strict=True)]
    shown = printed(replace(board, lines=lines), 80).split("No room")[0].split("rank")[1].splitlines()[1:]
    assert [line.split()[0] if line.strip() else "" for line in shown] == ["1", "1", "", "3"]


def test_two_long_names_never_become_the_same():
    names = short_names(["very-long-name-of-a-defense-a", "very-long-name-of-a-defense-b", "a(x=1)", "a(x=2)", "nes"])
    assert len(set(names.values())) == 4
    assert "nes" not in names


class Screen(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def said(
    monkeypatch: pytest.MonkeyPatch, out: io.TextIOWrapper, width: int, *arguments: object, command: str = "leaderboard"
) -> str:
    monkeypatch.setattr(import_module(f"bench.cli.{command}"), "console", Terminal(width=width))
    monkeypatch.setattr(sys, "argv", ["bench", command, *map(str, arguments)])
    monkeypatch.setattr(sys, "stdout", out)
    with suppress(SystemExit):
        main()
    out.flush()
    return out.buffer.getvalue().decode()  # type: ignore[attr-defined]


def test_only_a_narrow_terminal_without_other_wishes_gets_the_narrow_table(tmp_path: Path, monkeypatch):
    store_rows(tmp_path / "rows", [cell(), cell(defense="rnd")])
    screen, pipe = (lambda: Screen(io.BytesIO(), "utf-8")), (lambda: io.TextIOWrapper(io.BytesIO(), "utf-8"))
    whole = said(monkeypatch, pipe(), 40, tmp_path / "rows")
    assert whole.startswith("### ")
    assert "### " not in said(monkeypatch, screen(), 40, tmp_path / "rows")
    assert said(monkeypatch, screen(), 40, tmp_path / "rows", "--wide") == whole
    assert said(monkeypatch, screen(), 40, tmp_path / "rows", "--format", "md") == whole
    assert said(monkeypatch, screen(), 300, tmp_path / "rows") == whole


def test_two_defenses_fit_a_terminal_of_80_columns_with_the_figures_of_the_wide_table(tmp_path: Path):
    attacks = ("square(preset=aaa, loss=margin)", "reverse-square(preset=dld)")
    rows = [row([1] * hit + [NEVER] * (40 - hit), name, attack)
            for name, hit in (("none", 30), ("rnd(sigma=0.02)", 10)) for attack in attacks]  # fmt: skip
    (found,) = duels(rows, "rnd(sigma=0.02)", "none")
    out = io.StringIO()
    print_narrow_duel(found, Terminal(width=80, file=out))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "[1] = reverse-square(preset=dld)" in lines
    for line in lines_of(found):
        shown = [text for name, text in line.items() if text and name not in ("attack", "alone", "cross at")]
        assert any(all(text in each for text in shown) for each in lines), line


def test_only_a_narrow_terminal_gets_the_narrow_comparison(tmp_path: Path, monkeypatch):
    store_rows(tmp_path / "rows", [cell(), cell(defense="rnd")])
    asked = (tmp_path / "rows", "--defense", "none", "--defense", "rnd")
    narrow = said(monkeypatch, Screen(io.BytesIO(), "utf-8"), 40, *asked, command="compare")
    assert narrow.startswith("A = none, B = rnd")
    whole = said(monkeypatch, io.TextIOWrapper(io.BytesIO(), "utf-8"), 40, *asked, command="compare")
    assert whole.startswith("### A = none, B = rnd")
    assert said(monkeypatch, Screen(io.BytesIO(), "utf-8"), 40, *asked, "--wide", command="compare") == whole
