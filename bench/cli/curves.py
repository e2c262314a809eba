"""``bench curves``: how the networks in a results folder were trained, epoch by epoch."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from bench.cli.console import complain, path
from bench.errors import ConfigError
from bench.report.curves import Style, plot, render_curves, trainings
from bench.results.store import Store
from bench.system.files import keep_file


def curves(
    folder: Annotated[Path, typer.Argument(parser=path, help="A results folder.")],
    style: Annotated[
        str, typer.Option("--format", help="md (a line for each network), csv or json (a record for each epoch).")
    ] = "md",
    drawn: Annotated[Path | None, typer.Option("--plot", parser=path, help="Draw them into this SVG, too.")] = None,
) -> None:
    """Show what adversarial trainings withstood after each epoch, and where one collapsed."""
    if style not in get_args(Style):
        raise ConfigError(f"format is {style!r}; use one of {', '.join(get_args(Style))}")
    if drawn is not None and drawn.suffix != ".svg":
        raise ConfigError(f"--plot is {drawn.name!r}; name a file that ends with .svg")
    rows, damaged = Store(folder).rows()
    found = trainings(rows)
    if not found and not damaged:
        raise ConfigError(f"{folder} holds no curves; run a suite with adversarial training, with --out {folder}")
    print(render_curves(found, style))  # type: ignore[arg-type]
    if drawn is not None:
        keep_file(drawn, plot(found).encode())
    for error in damaged:
        complain(error)
    if damaged:
        raise typer.Exit(2)
