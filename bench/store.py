"""Results on disk: a folder for each cell, an immutable pair of files for each shard of it.

A shard is a stretch of a cell's samples. Everything about it goes into ``000000-000100.json``, its records into
``000000-000100-HASH.parquet``, each written beside its place and renamed into it, the JSON last: a shard exists when
its JSON does. Two writers, a kill at any moment or a full disk cost the shard in work and nothing else.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from bench.cell import Cell
from bench.errors import StoreError
from bench.files import keep_file, replace_file, slug

SCHEMA = 1
SHARDS = "[0-9]*-[0-9]*.json"  # of finished and of failed ones


@dataclass(frozen=True)
class Shard:
    """What a JSON file says: the cell, the stretch ``start:stop`` of its samples, and how it went."""

    cell: Cell
    start: int
    stop: int
    seconds: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)  # measured once for the shard, not for each sample
    provenance: Mapping[str, Any] = field(default_factory=dict)
    findings: Sequence[Mapping[str, Any]] = ()  # what probing the served model has shown, in the first shard of a cell
    error: str | None = None  # the traceback of a failed shard

    @property
    def stem(self) -> str:
        """The name of its files, without ending."""
        return f"{self.start:06d}-{self.stop:06d}"


@dataclass(frozen=True)
class Row:
    """A cell with everything that is stored about it; ``records`` has one line for each finished sample."""

    cell: Cell
    records: pd.DataFrame
    shards: tuple[Shard, ...]

    @property
    def errors(self) -> list[str]:
        """The tracebacks of its failed shards."""
        return [shard.error for shard in self.shards if shard.error is not None]

    @property
    def complete(self) -> bool:
        """Whether every sample of the cell has a record."""
        return len(self.records) == len(self.cell.ids)

    @property
    def figures(self) -> dict[str, float]:
        """What its shards measured once, the later shard winning."""
        return {name: value for shard in self.shards for name, value in shard.figures.items()}


class Store:
    """A folder of results.

    Raises:
        StoreError: the folder cannot be made or written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self) -> "Store":
        """Make the folder and try it, before slow work starts."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            replace_file(self.root / ".writable", lambda path: path.write_text("parry\n"))
            (self.root / ".writable").unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot write to {self.root}: {error.strerror or error}; choose another --out") from None
        return self

    def save(self, shard: Shard, records: pd.DataFrame) -> None:
        """Keep a finished shard; a failure of the same stretch is forgotten.

        Raises:
            StoreError: the disk is full or the folder is gone. What was stored before is untouched.
        """
        folder = self._folder(shard.cell)
        table = records.to_parquet(index=False)
        digest = sha256(table).hexdigest()
        path = folder / f"{shard.stem}.json"
        keep_file(_table(path, digest), table)
        self._write_json(path, shard, digest)
        (folder / f"{shard.stem}.failed.json").unlink(missing_ok=True)

    def fail(self, shard: Shard) -> None:
        """Keep the traceback of a shard that could not be finished; the next run tries it again."""
        self._write_json(self._folder(shard.cell) / f"{shard.stem}.failed.json", shard, None)

    def missing(self, cell: Cell) -> list[int]:
        """The positions in ``cell.ids`` that no finished shard covers.

        Raises:
            StoreError: a stored shard of this cell is damaged.
        """
        done = _positions(shard for shard, _ in self._shards(self._folder(cell)) if shard.error is None)
        return [position for position in range(len(cell.ids)) if position not in done]

    def row(self, cell: Cell) -> Row:
        """Everything that is stored about ``cell``.

        Raises:
            StoreError: one of its files is damaged.
        """
        return self._row(self._folder(cell))

    def rows(self) -> tuple[list[Row], list[StoreError]]:
        """All cells in the folder, in the order of their names, and what is wrong with those that cannot be read.

        Raises:
            StoreError: there is no such folder.
        """
        if not self.root.is_dir():
            raise StoreError(f"no results folder {self.root}; run a suite with --out {self.root} first")
        rows, damaged = [], []
        for folder in sorted({path.parent for path in self.root.rglob(SHARDS)}):
            try:
                rows.append(self._row(folder))
            except StoreError as error:
                damaged.append(error)
        return rows, damaged

    def _folder(self, cell: Cell) -> Path:
        names = slug(cell.dataset.spec, cell.model.spec, cell.defense_name, cell.attack.spec)
        return self.root / f"{names}-{cell.key[:16]}"

    def _row(self, folder: Path) -> Row:
        stored = list(self._shards(folder))
        cell = stored[0][0].cell
        tables = [records for shard, records in stored if shard.error is None]
        records = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
        if len(records):
            records = records.drop_duplicates("sample_id").sort_values("sample_id", ignore_index=True)
        done = _positions(shard for shard, _ in stored if shard.error is None)
        # A failure is over once other shards, perhaps of another size, have covered its samples.
        shards = [shard for shard, _ in stored if shard.error is None or not done.issuperset(_positions([shard]))]
        return Row(cell, records, tuple(shards))

    def _shards(self, folder: Path) -> Iterator[tuple[Shard, pd.DataFrame]]:
        for path in sorted(folder.glob(SHARDS)):
            yield _read(path)

    def _write_json(self, path: Path, shard: Shard, records_hash: str | None) -> None:
        content = {
            "schema": SCHEMA,
            "key": shard.cell.key,
            "cell": shard.cell.as_json(),
            "start": shard.start,
            "stop": shard.stop,
            "seconds": round(shard.seconds, 3),
            "figures": dict(shard.figures),
            "provenance": dict(shard.provenance),
            "findings": [dict(finding) for finding in shard.findings],
            "error": shard.error,
            "records_sha256": records_hash,
        }
        text = json.dumps({**content, "sha256": _digest(content)}, indent=1)
        keep_file(path, (text + "\n").encode())


def _read(path: Path) -> tuple[Shard, pd.DataFrame]:
    """A shard and its records, every hash checked."""
    remedy = "restore it, or delete it and run the suite again"
    try:
        content = json.loads(path.read_text())
        stated = content.pop("sha256")
        if content["schema"] != SCHEMA:
            raise StoreError(
                f"{path} has schema {content['schema']}, this version reads {SCHEMA}; use the version that wrote it"
            )
        if stated != _digest(content):
            raise StoreError(f"{path} was altered after it was written; {remedy}")
        shard = Shard(
            cell=Cell.from_json(content["cell"]),
            **{name: content[name] for name in ("start", "stop", "seconds", "figures", "provenance", "error")},
            findings=tuple(content.get("findings", ())),  # rows from before findings were stored have none
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} cannot be read ({type(error).__name__}); {remedy}") from None
    if shard.error is not None:
        return shard, pd.DataFrame()
    table = _table(path, content["records_sha256"])
    try:
        if sha256(table.read_bytes()).hexdigest() != content["records_sha256"]:
            raise StoreError(f"{table} was altered or cut short after it was written; {remedy}")
        return shard, pd.read_parquet(table)
    except (OSError, ValueError) as error:
        raise StoreError(f"{table} cannot be read ({type(error).__name__}); {remedy}") from None


def _table(path: Path, digest: str) -> Path:
    """Where the records of the shard at ``path`` are.

    Two writers whose records differ in a last bit write two files, and the JSON in place names the one that is its own.
    """
    return path.with_name(f"{path.stem}-{digest[:12]}.parquet")


def _positions(shards: Iterable[Shard]) -> set[int]:
    """The positions in a cell's samples that the shards cover."""
    return {position for shard in shards for position in range(shard.start, shard.stop)}


def _digest(content: Mapping[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
