"""``bench leaderboard``: the tables of a results folder."""

import sys
from pathlib import Path
from typing import Annotated, get_args

import typer

from bench.cli.console import complain, console, path
from bench.cli.narrow_board import fits, print_narrow
from bench.entries.standing import check_boards, entries_in, marked
from bench.errors import ConfigError
from bench.report.escape import in_markdown
from bench.report.leaderboard import Format, render
from bench.report.selection import Selection
from bench.report.standings import tables
from bench.results.store import Store


def leaderboard(
    folder: Annotated[Path, typer.Argument(parser=path, help="A results folder.")],
    style: Annotated[
        str | None,
        typer.Option("--format", help="md, csv, latex or json; md by default, made to fit a narrow terminal."),
    ] = None,
    budget: Annotated[
        list[int] | None, typer.Option(min=1, help="Query budget to show; may be repeated; 100 and 1000 by default.")
    ] = None,
    all_versions: Annotated[
        bool, typer.Option("--all-versions", help="Show rows of older versions of a component, too; never ranked.")
    ] = False,
    defense: Annotated[
        list[str] | None,
        typer.Option(help="Show the lines of this defense alone; a bare name means all its variants. May be repeated."),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="Show the lines of this attack or learner alone, of worst or best: all. May be repeated."),
    ] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="Show the tables of this track: query, white-box, data. May be repeated.")
    ] = None,
    wide: Annotated[bool, typer.Option("--wide", help="Show all columns, however narrow the terminal is.")] = False,
) -> None:
    """Print the tables of the rows in a folder.

    --defense, --attack and --track show fewer lines and change no figure: ranks, worst cases and flags are of all rows.
    """
    if style is not None and style not in get_args(Format):
        raise ConfigError(f"format is {style!r}; use one of {', '.join(get_args(Format))}")
    rows, damaged = Store(folder).rows()
    if not rows and not damaged:
        raise ConfigError(f"{folder} holds no rows; run a suite with --out {folder} first")
    entries, unread = entries_in(folder)
    known = [each for _, each in entries]
    check_boards(known)
    selection = Selection(defense or (), attack or (), track or ())
    shown = selection.of(marked(tables(rows, budget or (100, 1000), all_versions), known))
    text = render(shown, style or "md")  # type: ignore[arg-type]
    if style is None and not wide and sys.stdout.isatty() and not fits(text, console.width):
        for table in shown:
            print_narrow(table, console)
    else:
        print(text)
    if known and style in (None, "md"):
        print("\n".join(["Entries:\n", *(f"- {in_markdown(str(each))}" for each in known)]))
    damaged += unread
    for error in damaged:
        complain(error)
    if damaged:
        raise typer.Exit(2)
