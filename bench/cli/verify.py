"""``bench verify``: a random part of an entry run again here, and whether it agrees."""

import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from bench.cli.console import DataDir, Device, ModelDir, console, loader, path
from bench.cli.console import device as find_device
from bench.cli.validate import Code, named, show
from bench.entries.folder import ENTRY, VERIFIED
from bench.errors import ConfigError, StoreError
from bench.results.store import Store
from bench.run.progress import Screen


def verify(
    entry: Annotated[Path, typer.Argument(parser=path, help="Folder of an entry.")],
    fraction: Annotated[float, typer.Option(help="Share of the samples to run again, above 0 and at most 1.")] = 0.1,
    code: Code = None,
    by: Annotated[str | None, typer.Option(help="Who verifies; without, nothing is written.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="What draws the samples; another one each time.")] = None,
    work: Annotated[
        Path | None, typer.Option(parser=path, help="Results folder to run in; dropped where none is given.")
    ] = None,
    data_dir: DataDir = None,
    model_dir: ModelDir = None,
    device: Device = None,
) -> None:
    """Run a random part of an entry again on this machine, trainings and all, and say whether it agrees.

    Code of the entry never runs: name your own copy of it with --code, once you have read it. The exit code is 1 where
    rounding and chance do not explain a difference.
    """
    from bench.entries.statement import read_entry
    from bench.entries.validate import validate as look_at
    from bench.entries.verify import check_code, outcome, write_verification
    from bench.entries.verify import verify as run_again
    from bench.measure.pipeline import Pipeline
    from bench.system.threads import use_spare_threads

    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction is {fraction:g}; it is above 0 and at most 1, which runs everything again")
    given = named(code)
    with suppress(StoreError):  # which validation tells below, with all else
        check_code(read_entry(entry / ENTRY)[0], given)
    where, _ = find_device(device), use_spare_threads()
    parts = loader(data_dir, model_dir)
    report = look_at(entry, parts, given, where)
    show(report)
    if report.wrong:
        raise typer.Exit(1)
    seed = secrets.randbelow(2**31) if seed is None else seed
    with tempfile.TemporaryDirectory(prefix="parry-verify-") as dropped:
        store = Store((work or Path(dropped)).resolve()).open()
        pipeline = Pipeline(store.root / "networks", where, 256)
        with Screen(console, (row.cell for row in report.rows)) as screen:
            verdict = run_again(report, parts, given, fraction, seed, pipeline, store, 256, screen)
        rows, _ = store.rows()
    console.print(f"seed {seed}: {outcome(verdict)}", soft_wrap=True)
    for problem in verdict.problems:
        console.print(f"  WRONG {problem}", style="red", soft_wrap=True)
    if verdict.problems:
        raise typer.Exit(1)
    if by:
        write_verification(entry, verdict, by, fraction, seed, rows)
        console.print(f"it agrees; {entry / VERIFIED} says so", soft_wrap=True)
    else:
        console.print(f"it agrees; add --by NAME to say so in {VERIFIED}", soft_wrap=True)
