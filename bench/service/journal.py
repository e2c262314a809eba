"""Every question to a service and its answer, on disk, so that a run that was cut off resumes without asking again.

One file of JSON lines for each service, to which is only added; answers are packed as float32. A question is written
down before it is sent, and its answer when it has come; so what may have been paid for is known whenever a run ends,
and what lies between the two is sent again under the same name, by which a service can tell that it is no new one.
"""

import base64
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from typing import IO, Any, NamedTuple

import numpy as np

from bench.errors import StoreError
from bench.service.answers import Rows

SCHEMA = 1


class Key(NamedTuple):
    """A question: the ``number``-th time that an image, by its ``digest``, is asked about in a ``scope``.

    What is kept for all scopes has the scope "" and the number 0.
    """

    scope: str
    digest: str
    number: int


class Journal:
    """What has been asked of one service and answered, in memory and, where it has a ``path``, in that file.

    Args:
        path: where it is kept.
        about: what the service is, for people who open the file.
    """

    def __init__(self, path: Path | None = None, about: Mapping[str, Any] | None = None) -> None:
        self.path, self._about = path, dict(about or {})
        self.answers: dict[Key, Rows] = {}
        self.attempts = 0  # how often calls were sent, as far as is known
        self._run = token_hex(8)  # tells these questions from those of other journals
        self._asked: Counter[str] = Counter()
        self._spent: Counter[float] = Counter()  # questions by their price
        self._open: set[str] = set()  # calls that were sent and not answered
        self._keys: dict[str, list[Key]] = {}  # of these
        self._read_to = 0

    @property
    def questions(self) -> int:
        """How many were sent, each once."""
        return self._asked.total()

    @property
    def spent(self) -> float:
        """What they have cost."""
        return sum(price * count for price, count in self._spent.items())

    def asked(self, scope: str) -> int:
        """How many were sent in ``scope``."""
        return self._asked[scope]

    def name(self, keys: Sequence[Key]) -> str:
        """What a call that asks ``keys`` is called, today and when it is sent again."""
        return blake2b("\n".join([self._run, *map(repr, keys)]).encode(), digest_size=16).hexdigest()

    def price(self, keys: Sequence[Key], price: float) -> float:
        """What sending ``keys`` would add to what is spent: nothing where this was done before."""
        return 0.0 if self.name(keys) in self._open else price * len(keys)

    def sent(self, scope: str, keys: Sequence[Key], price: float) -> str:
        """Write down that a call is about to be sent; returns its name."""
        name = self.name(keys)
        if name not in self._open:
            questions = [[key.scope, key.digest, key.number] for key in keys]
            self._write({"sent": name, "scope": scope, "price": price, "at": _now(), "questions": questions})
        return name

    def answered(self, name: str, rows: Rows, attempts: int) -> None:
        """Write down what the call ``name`` was answered."""
        packed = base64.b64encode(rows.astype("<f4").tobytes()).decode()
        self._write({"answered": name, "attempts": attempts, "answers": packed})

    def failed(self, name: str, attempts: int, why: str) -> None:
        """Write down that the call ``name`` had no answer."""
        self._write({"failed": name, "attempts": attempts, "why": why[:500]})

    def forget(self, scope: str) -> None:
        """Give the memory back that the answers of ``scope`` take, which nobody asks for again; the file has them."""
        for key in [key for key in self.answers if key.scope == scope]:
            del self.answers[key]

    def refresh(self) -> None:
        """Take in what other processes have written, and mend what one has left half written.

        For one that nobody else writes to meanwhile.

        Raises:
            StoreError: the file cannot be read, or is no journal.
        """
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            with self.path.open("r+b") as file:
                file.seek(self._read_to)
                content = file.read()
                whole = content.rpartition(b"\n")[0] + b"\n" if b"\n" in content else b""
                if len(whole) < len(content):  # a kill in the middle of a line
                    file.truncate(self._read_to + len(whole))
        except OSError as error:
            raise StoreError(f"cannot keep {self.path}: {error.strerror or error}; choose another --out") from None
        if not self._read_to and not whole:
            self._write({"journal": SCHEMA, "run": self._run, "of": self._about})
        self._read_to += len(whole)
        for line in whole.splitlines():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{self.path} is damaged ({type(error).__name__}: {error}); move it away, and all is asked anew"
                ) from None

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.path is not None:
            if not self._read_to and "journal" not in line:
                self.refresh()
            content = json.dumps(line, separators=(",", ":")).encode() + b"\n"
            try:
                with self.path.open("ab", buffering=0) as file:
                    _all(file, content)
            except OSError as error:
                with suppress(OSError):
                    os.truncate(self.path, self._read_to)  # what is written next begins a line
                raise StoreError(f"cannot write {self.path}: {error.strerror or error}; make room") from None
            self._read_to += len(content)
        self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        match line:
            case {"sent": str(name)}:
                keys = [Key(str(scope), str(digest), int(number)) for scope, digest, number in line["questions"]]
                self._open.add(name)
                self._keys[name] = keys
                self._asked[str(line["scope"])] += len(keys)
                self._spent[float(line["price"])] += len(keys)
            case {"answered": str(name)}:
                keys = self._keys.pop(name)
                rows = np.frombuffer(base64.b64decode(line["answers"], validate=True), "<f4").reshape(len(keys), -1)
                self.attempts += int(line["attempts"])
                self._open.discard(name)
                self.answers.update(zip(keys, rows, strict=True))
            case {"failed": str(name)}:
                self.attempts += int(line["attempts"])
            case {"journal": int(schema)}:
                if schema != SCHEMA:
                    raise ValueError(f"schema {schema}, this version reads {SCHEMA}")
                self._run = str(line["run"])
            case _:
                raise ValueError("a line that is none of a journal")


def _all(file: IO[bytes], content: bytes) -> None:
    """Write ``content`` as far as the disk takes it, in one call where it takes all."""
    view = memoryview(content)
    while len(view):
        view = view[file.write(view) :]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

