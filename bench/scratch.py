"""What unfinished work keeps on disk, so that a job that was killed goes on from there."""

import io
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from bench.system.claims import claim
from bench.system.files import keep_file

SEAL = sha256().digest_size
PAUSE = 30.0  # seconds of work that a kill may cost beside the step in work: an epoch, a turn, a chunk of images


class Scratch:
    """Named pieces of one job's work in ``folder``, which belongs to this job alone; without one, nothing is kept.

    A job asks for what it has done with :meth:`load` and says what it has with :meth:`save`; each name stands for one
    piece, so a defense that does the same twice needs a job for each. Pieces that other code has left, by its hash
    ``code``, or that were altered since, are not taken up. Whoever started the job calls :meth:`clear` when its result
    is safe.
    """

    def __init__(self, folder: Path | None = None, code: str = "") -> None:
        self.folder, self.code = folder, code
        self._saved = time.monotonic()

    def load(self, name: str) -> Any:
        """What was last saved as ``name``, its tensors on the CPU; ``None`` if there is nothing."""
        if self.folder is None or not (path := self.folder / name).is_file():
            return None
        try:
            written = path.read_bytes()
            seal, content = written[:SEAL], written[SEAL:]
            if seal != self._seal(name, content):
                return None
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
            return None  # no loss but time: the work is done again

    def save(self, name: str, piece: Any) -> None:
        """Keep ``piece``, made of tensors, numbers, strings, lists and dictionaries, in place of an earlier one.

        Raises:
            StoreError: the disk is full or the folder cannot be made.
        """
        if self.folder is None:
            return
        file = io.BytesIO()
        torch.save(piece, file)
        content = file.getvalue()
        keep_file(self.folder / name, self._seal(name, content) + content)

    def _seal(self, name: str, content: bytes) -> bytes:
        """What the file begins with: a hash that other code, another name or other content does not have."""
        return sha256(f"{self.code}\n{name}\n".encode() + content).digest()

    def due(self) -> bool:
        """Whether ``PAUSE`` seconds have gone by since this was last true, so that a costly piece is worth saving."""
        now = time.monotonic()
        if self.folder is None or now - self._saved < PAUSE:
            return False
        self._saved = now
        return True

    def clear(self) -> None:
        """Drop all pieces."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def scratch(folder: Path, code: str) -> Iterator[Scratch]:
    """The scratch in ``folder``, for one process at a time.

    Raises:
        Held: another process is at this job.
        StoreError: the folder cannot be made.
    """
    with claim(folder.with_name(f"{folder.name}.lock")):
        yield Scratch(folder, code)


def sweep(folder: Path, code: str, finished: Callable[[str], bool]) -> None:
    """Drop the scratches in ``folder`` that nothing can go on from: of ``finished`` jobs, by name, and of other code.

    No process may be at work there.
    """
    for lock in folder.glob("*.lock"):
        lock.unlink(missing_ok=True)
    for job in folder.glob("*/"):
        kept = Scratch(job, code)
        if finished(job.name) or all(kept.load(piece.name) is None for piece in job.iterdir()):
            kept.clear()
    with suppress(OSError):  # there is something to go on from, or there is no folder
        folder.rmdir()
