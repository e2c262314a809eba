"""What a command has said of a results folder before, so that the same files under the same code are read once.

A text is kept in the user's cache under a hash of every byte that it was made of: the files that readers of results
open, the code, what components say, and what was asked for. Any other byte has another name, so nothing stale is ever
found, and a file that was altered in the folder is read, and named, as ever. What is kept has a checksum; what does not
agree with it is as if it were not there.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fnmatch import translate
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from sys import version as python

from bench.catalogue import kept_hash
from bench.errors import StoreError
from bench.system.files import cache_folder, keep_file

READ = ("[0-9]*-[0-9]*.json", "*.parquet", "entry.json", "verified.json")  # names of what a table is made of
UNREAD = "*.examples.parquet"
LIBRARIES = ("numpy", "pyarrow", "pydantic", "rich", "scipy", "tabulate")
DIGEST = 64  # characters of a hash
KEPT = 64  # texts

_READ, _UNREAD = re.compile("|".join(map(translate, READ))), re.compile(translate(UNREAD))
Said = tuple[str, Sequence[StoreError]]


def remembered(folder: Path, asked: object, make: Callable[[], Said], code: str | None = None) -> Said:
    """What ``make`` says of ``folder``, a text and what is damaged there, or what it has said of the same before.

    Args:
        asked: everything else that the text depends on, which its ``repr`` tells.
        make: whose text depends on the files of the folder, the code and ``asked`` alone. Damage is never kept.
        code: a hash of the code and of what components say; nothing is kept where it is empty.
    """
    code = kept_hash() if code is None else code
    path = _place(folder, asked, code)
    with suppress(OSError, UnicodeDecodeError):
        content = path.read_bytes() if path else b""
        digest, text = content[:DIGEST], content[DIGEST:]
        if content and sha256(text).hexdigest().encode() == digest:
            return text.decode(), ()
    made, damaged = make()
    if path and not damaged and path == _place(folder, asked, code):  # nothing has changed while it was read
        _keep(path, made)
    return made, damaged


def _keep(path: Path, made: str) -> None:
    with suppress(StoreError, OSError, UnicodeEncodeError):  # a cache that cannot be written costs time alone
        text = made.encode()
        keep_file(path, sha256(text).hexdigest().encode() + text)
        for old in sorted(path.parent.glob("*.txt"), key=lambda file: -file.stat().st_mtime)[KEPT:]:
            old.unlink()


def _place(folder: Path, asked: object, code: str) -> Path | None:
    """Where the text would be kept; nowhere where it could depend on more than can be hashed."""
    if not code:
        return None
    digest = sha256(repr((code, python, [version(name) for name in LIBRARIES], asked)).encode())
    try:
        digest.update(folder.resolve(strict=True).name.encode(errors="surrogateescape"))  # it may be that of a cell
        for path in _files(str(folder)):
            content = _content(path)
            digest.update(f"{path[len(str(folder)) :]!r} {len(content)}\n".encode())
            digest.update(content)
    except (OSError, ValueError):
        return None
    return cache_folder() / "tables" / f"{digest.hexdigest()[:32]}.txt"


def _files(folder: str) -> Iterator[str]:
    """What readers may open in ``folder`` and below, in an order of its own.

    Raises:
        ValueError: there is a link to a folder, which readers complain of and which is no file.
    """
    for place, below, names in os.walk(folder):
        below.sort()
        if any(os.path.islink(os.path.join(place, name)) for name in below):  # noqa: PTH114, PTH118
            raise ValueError(place)
        for name in sorted(names):
            if _READ.match(name) and not _UNREAD.match(name):
                yield os.path.join(place, name)  # noqa: PTH118 ten thousand of them


def _content(path: str) -> bytes:
    """The bytes of a plain file, opened once.

    Raises:
        ValueError: it is none, and who reads it could be told anything.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(path)
        content = os.read(handle, status.st_size + 1)
        if len(content) != status.st_size:  # it is being written, or larger than one reading
            raise ValueError(path)
        return content
    finally:
        os.close(handle)
