"""``bench compare``: rows beside published figures, or one defense beside another."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

from bench.cli.console import complain, console, path
from bench.cli.narrow_board import fits
from bench.cli.narrow_duel import print_narrow_duel
from bench.entries.standing import Known, check_boards, entries_in
from bench.errors import ConfigError, StoreError
from bench.report.beside_published import match, render_matches
from bench.report.compare import Duel, duels
from bench.report.compare_table import render_duels
from bench.report.escape import Format
from bench.report.published import load_published, result_folders
from bench.report.two_runs import Run, duels_of_runs
from bench.results.store import Store, united


def compare(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(parser=path, help="Two runs or entries; or any folders, with --defense twice or --published."),
    ] = None,
    published: Annotated[bool, typer.Option("--published", help="Hold the rows against published figures.")] = False,
    defense: Annotated[
        list[str] | None,
        typer.Option(help="Twice: these two chains. Once, with two runs: the chain of each that holds several."),
    ] = None,
    budget: Annotated[
        list[int] | None, typer.Option(min=1, help="Of two defenses, query budgets; 100, 1000 and the largest.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="With --published, list what has not run, too.")] = False,
    figures: Annotated[
        Path | None,
        typer.Option(parser=path, help="Folder of published figures; leaderboards/published of the checkout."),
    ] = None,
    style: Annotated[
        str | None,
        typer.Option("--format", help="md, csv, latex, json. md by default, made to fit a narrow terminal."),
    ] = None,
    wide: Annotated[bool, typer.Option("--wide", help="Show all columns, however narrow the terminal is.")] = False,
) -> None:
    """Compare two defenses, of two runs or of one, or rows with published figures."""
    narrow = style is None and not wide and not published and sys.stdout.isatty()
    style = style or "md"
    if style not in get_args(Format):
        raise ConfigError(f"format is {style!r}; use one of {', '.join(get_args(Format))}")
    two_runs = not published and len(folders or ()) == 2 and len(defense or ()) < 2
    if folders and not published and not defense and not two_runs:
        raise ConfigError(f"{len(folders)} folder(s) and no --defense; name two runs, or give --defense twice")
    if published == bool(defense) and not two_runs:
        raise ConfigError(
            f"{'both' if published else 'neither'} of --published and --defense; give one of the two, or name two runs"
        )
    if published and budget:
        raise ConfigError("--budget with --published; leave it out, published figures have budgets of their own")
    if defense and len(defense) != 2 and not two_runs:
        raise ConfigError(
            f"--defense is given {len(defense)} time(s); give it twice, once for each chain, or name two runs"
        )
    if defense and not folders:
        raise ConfigError("no results folder; name one, as in bench compare FOLDER --defense A --defense B")
    known = load_published(figures) if published else None
    runs: list[Run] = []
    entries: list[Known] = []
    damaged: list[StoreError] = []
    for folder in folders or result_folders():
        stored, broken = Store(folder).rows()
        if not stored and not broken:
            raise ConfigError(f"{folder} holds no rows; run a suite with --out {folder} first")
        runs.append(Run(str(folder), united(stored)))
        damaged += broken
        entries = [*(() if published else entries), *(entry for _, entry in entries_in(folder)[0])]
        check_boards(entries)
    for error in damaged:
        complain(error)
    rows = united(row for run in runs for row in run.rows)
    if two_runs:
        found = duels_of_runs(runs[0], runs[1], defense[0] if defense else None, budget)
        _print(found, style, narrow)
    elif defense:
        _print(duels(rows, defense[0], defense[1], budget), style, narrow)
    elif known:
        print(render_matches(match(known, rows), known, style, everything))  # type: ignore[arg-type]
    if damaged:
        raise typer.Exit(2)


def _print(found: Sequence[Duel], style: str, narrow: bool) -> None:
    text = render_duels(found, style)  # type: ignore[arg-type]
    if not narrow or fits(text, console.width):
        print(text)
        return
    for duel in found:
        print_narrow_duel(duel, console)
