"""Several results folders as one."""

from collections.abc import Sequence
from pathlib import Path

from bench.errors import StoreError
from bench.results.shards import SHARDS, read_shard
from bench.results.store import Row, Store, contradictions


def merge(folders: Sequence[Path], out: Path) -> int:
    """Copy into ``out`` the finished shards of ``folders`` that it lacks, byte for byte, with their final examples.

    Everything is read first, ``out`` too, and nothing is written where a file is damaged or two folders give the same
    samples other results. Failed shards stay behind: whoever runs the suite on ``out`` tries them again.

    Returns:
        How many shards were copied.

    Raises:
        StoreError: no such folder, a damaged file, a contradiction, or a place that cannot be written to.
    """
    found = {folder: _rows(folder) for folder in folders}
    target = Store(out).open()
    if against := contradictions({**found, out: _rows(out)}):
        raise StoreError(f"nothing was merged: {against[0]}")
    copied = 0
    for path in (path for folder in folders for path in sorted(folder.rglob(SHARDS))):
        shard, _ = read_shard(path)
        if shard.error is None and set(target.missing(shard.cell)).intersection(shard.positions):
            target.adopt(path, shard)
            copied += 1
    return copied


def _rows(folder: Path) -> list[Row]:
    rows, damaged = Store(folder).rows()
    if damaged:
        raise StoreError(f"nothing was merged: {damaged[0]}")
    return rows
