"""``bench merge``: the parts of a run, or the runs of several machines, as one results folder."""

from pathlib import Path
from typing import Annotated

import typer

from bench.cli.console import console, path
from bench.report.flags import write_flags
from bench.report.standings import tables
from bench.results.merge import merge as merge_folders
from bench.results.store import Store


def merge(
    folders: Annotated[list[Path], typer.Argument(parser=path, help="Results folders.")],
    out: Annotated[Path, typer.Option(parser=path, help="The folder that gets them all; it may hold results.")],
) -> None:
    """Copy results into one folder: the parts of a run, or the runs of several machines.

    Folders that give the same samples other results are refused, and nothing is copied.
    """
    copied = merge_folders(folders, out)
    rows, _ = Store(out).rows()
    write_flags(out / "flags.json", [flag for table in tables(rows) for flag in table.flags])
    whole = sum(row.complete for row in rows)
    console.print(f"{copied} shards copied to {out}; {len(rows)} cells, {whole} of them complete", soft_wrap=True)
