"""Files that are there whole or not at all, and names for them."""

import os
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

from bench.errors import StoreError

BESIDE = re.compile(r"\..*\.[0-9a-f]{8}\.tmp")  # a file in the making, which a kill may leave (see replace_file)


def slug(*names: str) -> str:
    """``names`` as part of a file name: at most 80 small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(names).lower()).strip("-")[:80].rstrip("-")


def slugs(names: Iterable[str]) -> dict[str, str]:
    """A slug for each of ``names``, no two the same: those that would be end with a hash of their names."""
    found = {name: slug(name) for name in names}
    shared = Counter(found.values())
    hashed = {name: f"{short}-{sha256(name.encode(errors='replace')).hexdigest()[:8]}" for name, short in found.items()}
    return {name: short if short and shared[short] == 1 else hashed[name] for name, short in found.items()}


def reachable(path: Path, check: Callable[[Path], bool] = Path.exists) -> bool:
    """Whether ``check`` holds of ``path``: a name that is too long, or lies where one may not look, is not there."""
    try:
        return check(path)
    except OSError:
        return False


def cache_folder() -> Path:
    """Where what is costly to make of files is kept: ``BENCH_CACHE_DIR``, or else ``parry`` in the user's cache."""
    if own := os.environ.get("BENCH_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "parry")  # noqa: PTH111 never raises


def keep_file(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write ``content``, or what it writes to the path it is called with, as ``path``: whole, or not at all.

    Raises:
        StoreError: the disk is full or the folder cannot be made.
    """
    write = content if callable(content) else lambda beside: beside.write_bytes(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, write)
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another --out, "
            "then run again: what was finished is kept"
        ) from None


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside ``path`` and rename it into place once it is safely on the disk."""
    beside = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")  # no longer than names may be
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
