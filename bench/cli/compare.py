"""``bench compare``: rows beside published figures, or one defense beside another."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from bench.cli.console import complain, path
from bench.entries.standing import check_boards, entries_in
from bench.errors import ConfigError, StoreError
from bench.report.beside_published import Style as MatchStyle
from bench.report.beside_published import match, render_matches
from bench.report.compare import duels
from bench.report.compare_table import Style, render_duels
from bench.report.published import load_published, result_folders
from bench.results.store import Row, Store, united


def compare(
    folders: Annotated[
        list[Path] | None, typer.Argument(parser=path, help="Results folders; all of leaderboards/ with --published.")
    ] = None,
    published: Annotated[bool, typer.Option("--published", help="Hold the rows against published figures.")] = False,
    defense: Annotated[
        list[str] | None, typer.Option(help="Twice: compare these two chains on the same samples.")
    ] = None,
    budget: Annotated[
        list[int] | None, typer.Option(min=1, help="With --defense, query budgets; 100, 1000 and the largest.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="With --published, list what has not run, too.")] = False,
    figures: Annotated[
        Path | None,
        typer.Option(parser=path, help="Folder of published figures; leaderboards/published of the checkout."),
    ] = None,
    style: Annotated[str, typer.Option("--format", help="md, csv, json; latex without --published.")] = "md",
) -> None:
    """Compare rows with published figures, or two defenses with each other."""
    styles = get_args(MatchStyle if published else Style)
    if style not in styles:
        raise ConfigError(f"format is {style!r}; use one of {', '.join(styles)}")
    if published == bool(defense):
        raise ConfigError(f"{'both' if published else 'neither'} of --published and --defense; give one of the two")
    if published and budget:
        raise ConfigError("--budget with --published; leave it out, published figures have budgets of their own")
    if defense and len(defense) != 2:
        raise ConfigError(f"--defense is given {len(defense)} time(s); give it twice, once for each chain")
    if defense and not folders:
        raise ConfigError("no results folder; name one, as in bench compare FOLDER --defense A --defense B")
    known = load_published(figures) if published else None
    rows: list[Row] = []
    damaged: list[StoreError] = []
    for folder in folders or result_folders():
        stored, broken = Store(folder).rows()
        if not stored and not broken:
            raise ConfigError(f"{folder} holds no rows; run a suite with --out {folder} first")
        rows += stored
        damaged += broken
        check_boards(entry for _, entry in entries_in(folder)[0])
    for error in damaged:
        complain(error)
    rows = united(rows)
    if defense:
        print(render_duels(duels(rows, defense[0], defense[1], budget), style))  # type: ignore[arg-type]
    elif known:
        print(render_matches(match(known, rows), known, style, everything))  # type: ignore[arg-type]
    if damaged:
        raise typer.Exit(2)
