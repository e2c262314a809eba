"""``bench protect``: a data owner's images protected."""

import time
from pathlib import Path
from typing import Annotated, cast

import typer

from bench.cli.console import console, path, say_stopped, say_whose_code
from bench.cli.console import device as find_device
from bench.errors import ConfigError
from bench.run.progress import Steps, duration
from bench.spec import parse_chain
from bench.system.interrupt import Stopped


def protect(
    defense: Annotated[str, typer.Option(help="A defense of the data stage, as in `bench ls defenses`.")],
    source: Annotated[
        Path,
        typer.Option("--in", parser=path, help="Class folders of images, an .npz file, or a Parquet file or folder."),
    ],
    out: Annotated[
        Path, typer.Option(parser=path, help="New folder for the protected set, its manifest and a contact sheet.")
    ],
    size: Annotated[
        int | None, typer.Option(min=1, help="Make images of all sizes squares of so many pixels a side.")
    ] = None,
    crop: Annotated[
        str, typer.Option(help="With --size: centre (fit the shorter side, cut out the centre) or squeeze.")
    ] = "centre",
    enlarge: Annotated[bool, typer.Option("--enlarge", help="With --size: enlarge images that are smaller.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of a random defense.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; a GPU where there is one.")] = None,
) -> None:
    """Protect your own training images with a data defense, in the layout they have.

    The same command again resumes where it was stopped.
    """
    from bench.data.images import Crop, Frame
    from bench.release.protect import protect as protect_images
    from bench.release.protect import report

    if size is None and (crop != "centre" or enlarge):
        raise ConfigError("--crop and --enlarge say how images become --size pixels wide and high; give --size, too")
    frame = None if size is None else Frame(size, crop=cast(Crop, crop), enlarge=enlarge)
    where = find_device(device)
    say_whose_code(parse_chain(defense))
    started = time.monotonic()
    try:
        with Steps(console) as steps:
            done = protect_images(defense, source, out, seed, where, steps, frame)
    except Stopped as stop:
        say_stopped(f"stopped; what is done is kept in {out}, the same command resumes")
        raise typer.Exit(stop.exit_code) from None
    for line in report(done, out):
        console.print(line, soft_wrap=True)
    console.print(f"took {duration(time.monotonic() - started)}", style="dim")
