"""What unfinished work keeps on disk, so that a job that was killed goes on from there."""

import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from bench.errors import StoreError
from bench.store import replace_file

PAUSE = 30.0  # seconds of work that a kill may cost, at most, beside the step in work


class Scratch:
    """Named pieces of one job's work in ``folder``, which belongs to this job alone; without one, nothing is kept.

    A job asks for what it has done with :meth:`load` and says what it has with :meth:`save`. Pieces that other code has
    left, by its hash ``code``, are not taken up. Whoever started the job calls :meth:`clear` when its result is safe.
    """

    def __init__(self, folder: Path | None = None, code: str = "") -> None:
        self.folder, self.code = folder, code
        self._saved = time.monotonic()

    def load(self, name: str) -> Any:
        """What was last saved as ``name``, its tensors on the CPU; ``None`` if there is nothing."""
        if self.folder is None or not (path := self.folder / name).is_file():
            return None
        try:
            kept = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
            return None  # no loss but time: the work is done again
        return kept["piece"] if kept["code"] == self.code else None

    def save(self, name: str, piece: Any) -> None:
        """Keep ``piece``, made of tensors, numbers, strings, lists and dictionaries, in place of an earlier one.

        Raises:
            StoreError: the disk is full or the folder cannot be made.
        """
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = {"code": self.code, "piece": piece}
            replace_file(self.folder / name, lambda beside: torch.save(content, beside))
        except OSError as error:
            path = self.folder / name
            raise StoreError(f"cannot write {path}: {error.strerror or error}; free some space and run again") from None

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
