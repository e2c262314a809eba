"""``bench plot``: accuracy against queries and radius, what attacks leave, and calibration, as files for a paper."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

from bench.cli.console import complain, console, path
from bench.entries.boards import boards_in, standings
from bench.errors import ConfigError, did_you_mean
from bench.registry import defenses
from bench.report.plots import Style, draw
from bench.report.portrait import overview, portrait
from bench.results.spelling import is_spelt
from bench.results.store import Row
from bench.system.files import slugs
from bench.tracks import track_of


def plot(
    folder: Annotated[Path, typer.Argument(parser=path, help="A results folder, or a folder of several boards.")],
    out: Annotated[Path, typer.Option(parser=path, help="The folder of the pictures.")] = Path("plots"),
    styles: Annotated[
        list[str] | None, typer.Option("--format", help="svg, png or pdf; may be repeated. All three by default.")
    ] = None,
    defense: Annotated[
        list[str] | None, typer.Option(help="Draw this chain alone, as tables write it; may be repeated.")
    ] = None,
) -> None:
    """Draw each defense in a folder: accuracy against queries with its band, a bar for each attack, calibration."""
    for style in styles or ():
        if style not in get_args(Style):
            raise ConfigError(f"format is {style!r}; use one of {', '.join(get_args(Style))}")
    boards, damaged = boards_in([folder])
    rows = [row for board in boards for row in board.rows]
    if not rows and not damaged:
        raise ConfigError(f"{folder} holds no rows; run a suite with --out {folder} first")
    chosen = {label for name in defense or () for label in _labels(name, rows)}
    count, shown = 0, standings(boards)
    places = slugs(table.title for table in shown)
    for table in shown:
        within, names = out / places[table.title], dict.fromkeys(line.defense for line in table.lines)
        stems = slugs(names)
        for name in names:
            own = [row for row in table.rows if row.cell.defense_label == name]
            if own and (not defense or name in chosen):
                lines = [line for line in table.lines if line.defense == name]
                stem = within / stems[name]
                measures = track_of(own[0].cell).measures
                found = draw(portrait(own, lines), name, measures, stem, styles or get_args(Style))  # type: ignore[arg-type]
                count += len(found)
        if table.rows and not defense and (whole := overview(table.rows)):
            track = track_of(table.rows[0].cell)
            found = draw(whole, table.title, track.measures, within / "all", styles or get_args(Style))  # type: ignore[arg-type]
            count += len(found)
    console.print(f"{count} pictures in {out}", soft_wrap=True)
    for error in damaged:
        complain(error)
    if damaged:
        raise typer.Exit(2)


def _labels(name: str, rows: Sequence[Row]) -> set[str]:
    """What tables call the chain that somebody has named, as they write it or in other words."""
    chains = {row.cell.defense_label: row.cell.defense for row in rows}
    if name in chains:
        return {name}
    if found := {label for label, chain in chains.items() if is_spelt(chain, name, defenses)}:
        return found
    hint = did_you_mean(name, sorted(chains), otherwise="")
    raise ConfigError(f"no rows of defense {name!r}; {hint and hint + ' '}present: {', '.join(sorted(chains))}")
