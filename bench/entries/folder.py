"""The folder of an entry: what may lie in it, looked at before anything in it is read.

entry.json      everything about it, for people first
rows/           the records and final examples, as a results folder has them
networks/       trained networks and released images, as data
code/           the source of what is not Parry's own, to be read and never run
verified.json   who has run a part of it again, where somebody has
"""

import os
import stat
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from bench.errors import StoreError

ENTRY, VERIFIED, ROWS, NETWORKS, CODE = "entry.json", "verified.json", "rows", "networks", "code"
MOST_FILES, LARGEST = 20_000, 4 << 30  # files in an entry, and bytes in all
CHUNK = 1 << 22


def contents(folder: Path) -> dict[str, int]:
    """The plain files of an entry by their paths in it, with their sizes; the two files about it aside.

    Raises:
        StoreError: it is no folder, holds links, devices or anything else but plain files and folders, or too much.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise StoreError(f"{folder} is no folder; name the folder that holds {ENTRY}")
    found: dict[str, int] = {}
    for path in _walk(folder):
        name, status = path.relative_to(folder).as_posix(), path.lstat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a link" if stat.S_ISLNK(status.st_mode) else "no plain file"
            raise StoreError(f"{name} is {kind}; an entry holds plain files alone")
        if name not in (ENTRY, VERIFIED) and name.partition("/")[0] not in (ROWS, NETWORKS, CODE):
            raise StoreError(f"{name} has no place in an entry; it holds {ENTRY}, {ROWS}/, {NETWORKS}/ and {CODE}/")
        found[name] = status.st_size
        if len(found) > MOST_FILES or sum(found.values()) > LARGEST:
            raise StoreError(f"more than {MOST_FILES:,} files or {LARGEST >> 30} GB; an entry is smaller than that")
    return {name: size for name, size in sorted(found.items()) if name not in (ENTRY, VERIFIED)}


def hashed(folder: Path, names: Mapping[str, int]) -> dict[str, str]:
    """The sha256 of each of these files."""
    return {name: _sha256(folder / name) for name in names}


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):  # does not follow links
        yield from (Path(place, name) for name in files)
        yield from (path for name in folders if (path := Path(place, name)).is_symlink())


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
