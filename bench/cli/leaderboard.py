"""``bench leaderboard``: the tables of a results folder."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from bench.cli.console import complain, console, path
from bench.cli.remembered import Said, remembered
from bench.errors import ConfigError

FORMATS = ("md", "csv", "latex", "json")


def leaderboard(
    folders: Annotated[
        list[Path], typer.Argument(parser=path, help="Results folders, each a board, or a folder of such.")
    ],
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
    """Print the tables of the rows in a folder, of each board in it by itself.

    --defense, --attack and --track show fewer lines and change no figure: ranks, worst cases and flags are of all rows.
    """
    if style is not None and style not in FORMATS:
        raise ConfigError(f"format is {style!r}; use one of {', '.join(FORMATS)}")
    narrow = style is None and not wide and sys.stdout.isatty()
    named = _Names(*(tuple(names or ()) for names in (defense, attack, track)))
    asked = _Asked(style, tuple(budget or (100, 1000)), all_versions, named, narrow)
    terminal = (console.width, console.color_system, console.no_color, console.encoding) if narrow else ()
    if len(folders) == 1:
        text, damaged = remembered(folders[0], (asked, terminal), lambda: _told(folders, asked))
    else:
        text, damaged = _told(folders, asked)
    sys.stdout.write(text)
    for error in damaged:
        complain(error)
    if damaged:
        raise typer.Exit(2)


class _Names(NamedTuple):
    defenses: tuple[str, ...]
    attacks: tuple[str, ...]
    tracks: tuple[str, ...]


class _Asked(NamedTuple):
    """What somebody wants to see; ``narrow`` where tables that are wider than the terminal are made to fit it."""

    style: str | None
    budgets: tuple[int, ...]
    all_versions: bool
    names: _Names
    narrow: bool


def _told(folders: Sequence[Path], asked: _Asked) -> Said:
    """The tables as text, and what is damaged."""
    from bench.cli.narrow_board import fits, print_narrow  # not before it is needed: what is remembered needs none
    from bench.entries.boards import boards_in, standings
    from bench.report.escape import in_markdown
    from bench.report.leaderboard import render
    from bench.report.selection import Selection
    from bench.results.store import cell_folders, links_in

    for folder in folders:
        if not cell_folders(folder) and not links_in(folder):
            raise ConfigError(f"{folder} holds no rows; run a suite with --out {folder} first")
    boards, damaged = boards_in(folders)
    shown = Selection(*asked.names).of(standings(boards, asked.budgets, asked.all_versions))
    text = render(shown, asked.style or "md") + "\n"  # type: ignore[arg-type]
    if asked.narrow and not fits(text, console.width):
        with console.capture() as captured:
            for table in shown:
                print_narrow(table, console)
        text = captured.get()
    known = [each for board in boards for each in board.entries]
    if known and asked.style in (None, "md"):
        text += "\n".join(["Entries:\n", *(f"- {in_markdown(str(each))}" for each in known)]) + "\n"
    return text, damaged
