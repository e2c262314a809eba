"""What commands share: where they print, what they say of mistakes and of users' code, and the device."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.terminal import Terminal
from bench.errors import BenchError, ConfigError
from bench.plan.pin import code_files
from bench.spec import Spec

if TYPE_CHECKING:
    import torch

    from bench.plan.tasks import Loader

console = Terminal()
errors = Terminal(stderr=True)


def complain(error: BenchError) -> None:
    """A user's mistake, in one line."""
    errors.print(f"error: {' '.join(str(error).splitlines())}", style="red", soft_wrap=True)


def warn(line: str) -> None:
    """What a user should know of and the command goes on without."""
    errors.print(f"warning: {' '.join(line.splitlines())}", style="yellow", soft_wrap=True)


def path(text: str) -> Path:
    """A path that was given on the command line.

    Raises:
        typer.BadParameter: an empty one, which would mean the working directory.
    """
    if not text.strip():
        raise typer.BadParameter("the path is empty, name a file or folder")
    return Path(text)


DataDir = Annotated[
    Path | None, typer.Option(parser=path, envvar="BENCH_DATA_DIR", help="Folder that holds the data sets.")
]
ModelDir = Annotated[
    Path | None,
    typer.Option(parser=path, envvar="BENCH_MODEL_DIR", help="Folder that holds weights; beside the data folder."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; a GPU where there is one.")]


def loader(data_dir: Path | None, model_dir: Path | None) -> "Loader":
    """What makes components of the data and weights in these folders."""
    from bench.plan.tasks import Loader  # not before it is needed, as torch in the others

    if model_dir is None and data_dir is not None:
        model_dir = data_dir.resolve().parent / "models"
    return Loader(*(path and path.resolve() for path in (data_dir, model_dir)))  # wherever a component goes


def say_whose_code(specs: Iterable[Spec]) -> None:
    """Tell the user which files of theirs the components ``specs`` execute, before they do."""
    for file in sorted({file for spec in specs for file in code_files(spec) if file.is_file()}):
        errors.print(f"running code from {file}", style="yellow", soft_wrap=True)


def device(name: str | None) -> "torch.device":
    """The device of this name; without one, a GPU where there is one.

    Raises:
        ConfigError: it is not there.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError):
        raise ConfigError(f"device {name!r} is not there; use cpu, or cuda where a GPU is installed") from None
    return device


def devices(names: str | None) -> "list[torch.device]":
    """The devices that are named, with commas between them; as :func:`device`.

    Raises:
        ConfigError: one is not there, or they are of different kinds, on which numbers differ.
    """
    found = [device(name.strip()) for name in names.split(",")] if names else [device(None)]
    if len({each.type for each in found}) > 1:
        raise ConfigError(f"devices {names!r} are of different kinds, whose numbers differ; name one kind")
    return found


def say_stopped(line: str) -> None:
    """Tell that a signal has ended the command, if there is still someone to tell."""
    with suppress(OSError):  # the terminal that hung up is gone
        errors.print(line, soft_wrap=True)
