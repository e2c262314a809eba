"""Pictures of what came of an entry, where a folder holds something to draw them of.

Drawing takes torch and the data set, so :mod:`bench.entries.drawn` is not imported where there is nothing to draw.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from bench.entries.folder import NETWORKS
from bench.errors import BenchError
from bench.measure.keys import data_defense, release_key
from bench.results.examples import SUFFIX
from bench.results.shards import KEY_DIGITS
from bench.results.store import Row

if TYPE_CHECKING:
    from bench.plan.tasks import Loader


class Pictures:
    """The pictures that ``folders``, of results or entries, have something for."""

    def __init__(self, folders: Iterable[Path], loader: "Callable[[], Loader]") -> None:
        self._loader = cache(loader)
        self._examples: dict[str, list[Path]] = {}  # by the beginning of the key of their cell
        self._kept: dict[str, Path] = {}            # released images, among networks
        for folder in folders:
            self._kept |= {path.stem: path for path in folder.rglob(f"{NETWORKS}/*.safetensors")}
            for path in folder.rglob(f"*{SUFFIX}"):
                self._examples.setdefault(path.parent.name.rpartition("-")[2], []).append(path)
        self.missing: dict[str, str] = {}  # by data set, why there are none of it

    def of(self, row: Row) -> bytes | None:
        """A PNG of the final examples of ``row``, or of the images that were released for it; nothing without any."""
        paths = self._files(row)
        if not paths:
            return None
        from bench.entries.drawn import Unknown, attacked, released

        try:
            if row.cell.threat.asks:
                return attacked(row, self._loader(), paths)
            return released(row, self._loader(), paths[0])
        except Unknown as error:
            self.missing[row.cell.dataset.spec] = str(error)
        except BenchError:  # whoever validates the entry hears of that
            pass
        return None

    def _files(self, row: Row) -> Sequence[Path]:
        """What there is to draw of: files of final examples, or the one of what was released."""
        if row.cell.threat.asks:
            return next(filter(None, (self._examples.get(row.cell.key[:digits]) for digits in KEY_DIGITS)), ())
        kept = self._kept.get(release_key(row.cell)) if data_defense(row.cell) else None
        return [kept] if kept and not kept.is_symlink() else ()
