"""Text of others, made harmless for each format, and left as it is where it is harmless."""

import csv
import io
import json
import re
from dataclasses import replace

import pytest
from rich.table import Table

from bench.cli.terminal import Terminal
from bench.oracle import NEVER
from bench.report.escape import in_csv, in_latex, in_markdown, in_terminal, latex_table, markdown_table, tidy
from bench.report.leaderboard import render
from bench.report.standings import tables
from bench.results.store import Row
from tests.rows import row

ESCAPE, OVERRIDE, SURROGATE = "\x1b[2Jgone", "right\u202etfel", "half\ud800"
HOSTILE = [
    "a | b", "two\n\n# lines", "<script>alert(1)</script>", "![x](http://evil.example/x.png)",
    "[x](javascript:alert(1))", "<http://evil.example>", "www.evil.example", "**bold** `code` ~~gone~~ $x$",
    "=cmd|' /C calc'!A0", "\\end{table}\n\n\\x", "%$#&_{}~^", "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1",
    ESCAPE, OVERRIDE, SURROGATE,
]  # fmt: skip
HARMLESS = ["square(p_init=0.3)", "aaa-linear(temperature=tuned) + rnd", "87.2 [83, 91]", "torchattacks:PGD", "p < 1"]


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_harmless_stays(text):
    assert in_terminal(text) == in_markdown(text) == in_csv(text) == text


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("shown", [in_terminal, in_markdown, in_latex, in_csv])
def test_no_format_lets_a_text_move_the_cursor_or_end_its_line(shown, text):
    assert shown(text).isprintable()
    shown(text).encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a | b", r"a \| b"),
        ("a \\| b", r"a \\\| b"),
        ("<b>", r"\<b>"),
        ("<!-- x", r"\<!-- x"),
        ("![x](y)", r"![x]\(y)"),
        ("[x](y)", r"[x]\(y)"),
        ("http://x.y", "http&#58;//x.y"),
        ("www.x.y", "www&#46;x.y"),
        ("a@b.c", "a&#64;b.c"),
        ("&lt;b&gt;", "&#38;lt;b&#38;gt;"),
        ("_x_ *y* `z`", r"\_x\_ \*y\* \`z\`"),
        ("# x", r"\# x"),
        ("- x", r"\- x"),
        ("> x", r"\> x"),
        ("1. x", r"1\. x"),
    ],
)
def test_markdown_shows_the_text_and_makes_nothing_of_it(text, shown):
    assert in_markdown(text) == shown


def test_latex_prints_every_special_and_starts_no_argument():
    assert in_latex("50 % & {x}_y^z ~ \\ $ #") == (
        r"50 \% \& \{x\}\_y\textasciicircum{}z \textasciitilde{} \textbackslash{} \$ \#"
    )
    assert in_latex("[x]") == "{[}x]"
    assert in_latex("*x") == "{*}x"


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_of_a_csv_is_a_formula(text):
    ((cell,),) = list(csv.reader(io.StringIO(tidy([{"@100": text}], "csv"))))[1:]
    assert cell.lstrip()[0] not in "=+-@"
    assert in_csv(text) == cell
    assert tidy([{"@100": -0.5}], "csv").split() == ["@100", "-0.5"], "numbers and our own columns are what they were"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_board_of_hostile_rows_has_the_shape_of_any_other(text):
    found = {"flag": text, "fired": True, "evidence": text}
    facts = {"hardware": text, "device": text, "parry": text, "commit": text, "libraries": {"torch": text}}

    def named(text: str, found: dict[str, object], facts: dict[str, object]) -> Row:
        plain = row([1, NEVER], "mine", "square")
        shard = replace(plain.shards[0], findings=(found,), provenance={**facts, "finished": "2026-01-01"})
        (defense,) = plain.cell.defense
        cell = replace(
            plain.cell, defense=(replace(defense, spec=text),), attack=replace(plain.cell.attack, spec=text),
            dataset=replace(plain.cell.dataset, spec=text), model=replace(plain.cell.model, spec=text),
        )  # fmt: skip
        return Row(cell, plain.records, (shard,))

    usual = dict.fromkeys(facts, "x") | {"libraries": {"torch": "x"}}
    boards = (
        tables([named(text, found, facts)], (100,)),
        tables([named("x", {"flag": "x", "fired": True, "evidence": "x"}, usual)], (100,)),
    )
    hostile, plain = (render(board, "md") for board in boards)
    assert hostile.count("\n") == plain.count("\n")
    for theirs, ours in zip(hostile.splitlines(), plain.splitlines(), strict=True):
        assert theirs.isprintable()
        assert len(re.findall(r"(?<!\\)\|", theirs)) == len(re.findall(r"(?<!\\)\|", ours))
        assert not re.search(r"(?<!\\)<[a-z]|\]\(|https?://", theirs)
    assert all(line.isprintable() for line in render(boards[0], "csv").splitlines())
    assert json.loads(render(boards[0], "json"))[0]["attack"] == text
    latex = render(boards[0], "latex")
    caption = latex[latex.index("\\caption{") :].split("\n\\begin")[0]
    assert "\n\n" not in caption
    assert not re.search(r"(?<!\\)[%&#](?![^\n]*\\\\)", caption)


def test_tables_escape_the_names_of_their_columns():
    assert r"a\|b" in markdown_table([{"a|b": "x"}])
    assert r"50\%" in latex_table([{"50%": "x"}], "c")


def test_the_terminal_shows_escapes_as_text():
    out = io.StringIO()
    terminal = Terminal(file=out, width=100)
    table = Table("name", title=ESCAPE)
    table.add_row(ESCAPE + OVERRIDE)
    terminal.print(ESCAPE, SURROGATE)
    terminal.print(table)
    assert "\x1b" not in out.getvalue()
    assert "\u202e" not in out.getvalue()
    assert out.getvalue().count(r"\x1b[2Jgone") == 3
    out.getvalue().encode()
