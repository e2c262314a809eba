"""``bench validate``: whether entries are what they say, without running any code of theirs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.console import DataDir, Device, ModelDir, console, loader, path, say_whose_code
from bench.cli.console import device as find_device
from bench.errors import ConfigError
from bench.spec import Spec

if TYPE_CHECKING:
    from bench.entries.validate import Report

STYLES = {"WRONG": "red", "note": "yellow"}
Code = Annotated[
    Path | None,
    typer.Option(parser=path, help="Your own copy of the file of the defense; it runs, that of an entry never."),
]


def validate(
    entries: Annotated[list[Path], typer.Argument(parser=path, help="Folders of entries.")],
    code: Code = None,
    data_dir: DataDir = None,
    model_dir: ModelDir = None,
    device: Device = None,
) -> None:
    """Check schema, hashes and completeness, that every figure follows from the records, and the final examples.

    No attack is run, and no code of an entry. The exit code is 1 where something is wrong.
    """
    from bench.entries.validate import validate as look_at

    given = named(code)
    reports = []
    for folder in entries:
        report = look_at(folder, loader(data_dir, model_dir), given, find_device(device))
        show(report)
        reports.append(report)
    if any(report.wrong for report in reports):
        raise typer.Exit(1)


def named(code: Path | None) -> Path | None:
    """The user's file ``code``, which may be written ``path.py:Name``, too; said that it runs.

    Raises:
        ConfigError: it is not there.
    """
    if code is None:
        return None
    file = Path(str(code).partition(".py:")[0] + ".py") if ".py:" in str(code) else code
    if not file.is_file() or file.suffix != ".py":
        raise ConfigError(f"--code is {str(code)!r}; name a file, as in --code path/to/file.py")
    say_whose_code([Spec(f"{file}:", {})])
    return file.resolve()


def show(report: "Report") -> None:
    """What was looked at in an entry, a line each."""
    console.print(f"{report.folder}", style="bold", soft_wrap=True)
    for check in report.checks:
        line = f"  {check.outcome:<6}{check.what:<10}{check.said}"
        console.print(line, style=STYLES.get(check.outcome), soft_wrap=True)
