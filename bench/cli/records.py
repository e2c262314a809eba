"""``bench records``: the per-sample facts of a results folder as one table."""

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from bench.cli.console import complain, console, path, warn
from bench.errors import ConfigError
from bench.report.tidy_records import as_csv, tidy_records
from bench.results.store import Store
from bench.system.files import keep_file

FORMATS = ("csv", "parquet")


def records(
    folder: Annotated[Path, typer.Argument(parser=path, help="A results folder.")],
    style: Annotated[str | None, typer.Option("--format", help="csv or parquet; else what --out ends in.")] = None,
    out: Annotated[Path | None, typer.Option(parser=path, help="The file; without one, CSV is printed.")] = None,
) -> None:
    """Write every sample of every cell as one line of one table."""
    style = style or (out.suffix.removeprefix(".").lower() if out else "csv")
    if style not in FORMATS:
        raise ConfigError(f"format is {style!r}; use one of {', '.join(FORMATS)}")
    if style == "parquet" and out is None:
        raise ConfigError("Parquet is not printed; add --out records.parquet")
    rows, damaged = Store(folder).rows()
    partial = sum(bool(row.partial) for row in rows)
    if not rows and not damaged:
        raise ConfigError(f"{folder} holds no rows; run a suite with --out {folder} first")
    rows = [row for row in rows if row.n]
    table = tidy_records(rows)
    if out is None:
        sys.stdout.write(as_csv(table))
    else:
        buffer = io.BytesIO()
        if style == "parquet":
            table.to_parquet(buffer, index=False)
        keep_file(out, buffer.getvalue() or as_csv(table).encode())
        console.print(f"{len(table):,} samples of {len(rows)} cells written to {out}", soft_wrap=True)
    if partial:
        warn(
            f"left out: {partial} cells that were run only on what other attacks had left, or stopped early; "
            "a full run completes them"
        )
    for error in damaged:
        complain(error)
    if damaged:
        raise typer.Exit(2)
