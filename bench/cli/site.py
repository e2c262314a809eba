"""``bench site``: results as a static site, which opens from a folder and loads nothing from elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from bench.cli.console import DataDir, complain, console, loader, path
from bench.entries.boards import boards_in, standings
from bench.entries.pictures import Pictures
from bench.errors import ConfigError
from bench.site.boards import boards
from bench.site.pages import write_site

BUDGETS = (100, 1000)


def site(
    folders: Annotated[
        list[Path], typer.Argument(parser=path, help="Results folders, each a board, or a folder of such.")
    ],
    out: Annotated[Path, typer.Option(parser=path, help="The folder of the site.")],
    data_dir: DataDir = None,
) -> None:
    """Write the results as web pages: boards that sort and filter, a page for each defense, any two compared."""
    found, damaged = boards_in(folders)
    if not any(board.rows for board in found):
        for error in damaged:
            complain(error)
        raise ConfigError(f"{', '.join(map(str, folders))} holds no rows; run a suite with --out {folders[0]} first")
    sheets = [sheet for folder in folders for sheet in folder.rglob("sheets/*.png")]
    pictures = Pictures(folders, lambda: loader(data_dir, None))
    pages = write_site(boards(standings(found, BUDGETS), sheets, pictures.of), out, list(map(str, damaged)))
    console.print(f"{pages} pages; open {out / 'index.html'}", soft_wrap=True)
    for why in pictures.missing.values():
        console.print(f"no pictures of examples: {why}", soft_wrap=True)
    for error in damaged:
        complain(error)
    if damaged:
        raise typer.Exit(2)
