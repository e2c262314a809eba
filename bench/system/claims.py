"""Which work is whose where several runs share a folder, and what killed runs have left in it.

A claim is the lock of a file; it ends with its process, however that ends.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex

from filelock import FileLock, Timeout

from bench.errors import StoreError
from bench.system.files import BESIDE

CLAIMS = ".claims"  # the folder of a results folder that holds the locks of its runs and of their shards
HOUR = 3600.0  # seconds; nothing takes so long to write


class Held(Exception):
    """Another process is at this piece of work."""


@contextmanager
def claim(file: Path) -> Iterator[None]:
    """Hold the lock of ``file``, which is there only meanwhile; its folder, too, if nothing else is in it.

    Raises:
        Held: another process has it.
        StoreError: the folder cannot be made.
    """
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except (Timeout, FileNotFoundError):  # held, or just given back with its folder
        raise Held(file.stem) from None
    except OSError as error:
        if isinstance(error, FileExistsError) and not (file.parent.is_file() or file.parent.is_symlink()):
            # The folder was there, and was gone when mkdir looked what it is.
            raise Held(file.stem) from None
        raise StoreError(f"cannot lock {file}: {error.strerror or error}; choose another --out") from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # others are at work beside it
            file.parent.rmdir()


@contextmanager
def present(root: Path, sweep: Callable[[], None]) -> Iterator[None]:
    """Be known as a run on ``root``; call ``sweep`` first if no other is, so that what it finds belongs to nobody.

    Raises:
        StoreError: the folder cannot be written to.
    """
    folder = root / CLAIMS
    with ExitStack() as stay:
        with _soon(folder / "gate.lock"):  # nobody begins to write while somebody sweeps
            if not any(_held(file) for file in folder.glob("run-*.lock")):
                _remove(root, folder)
                sweep()
            stay.enter_context(claim(folder / f"run-{token_hex(8)}.lock"))
        yield


@contextmanager
def _soon(file: Path) -> Iterator[None]:
    """Hold the lock of ``file`` as soon as those have given it back who have it for a moment."""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(claim(file))
                break
            except Held:
                time.sleep(0.05)
        yield


def _held(file: Path) -> bool:
    try:
        with claim(file):
            return False
    except Held:
        return True


def _remove(root: Path, folder: Path) -> None:
    """Take away the half-written files below ``root`` and the locks of runs that are no more."""
    for file in root.rglob(".*.tmp"):
        if not BESIDE.fullmatch(file.name):
            continue
        beside_runs = file.parent in (root, root / "sheets")  # written before and after one is present
        with suppress(FileNotFoundError):
            if not beside_runs or time.time() - file.stat().st_mtime > HOUR:
                file.unlink()
    for file in folder.glob("*.lock"):
        if file.name != "gate.lock":
            file.unlink(missing_ok=True)
