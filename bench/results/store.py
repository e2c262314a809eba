"""Results on disk: a folder for each cell, an immutable pair of files for each shard of it.

``cifar10-resnet20/aaa-linear/square-28db1bbb`` holds data set and model, defense, attack and the start of the cell's
key. Only the key counts for a reader, so a folder may be moved or renamed before it.

A shard is a stretch of a cell's samples. Everything about it goes into ``000000-000100.json``, its records into
``000000-000100-HASH.parquet``, each written beside its place and renamed into it, the JSON last: a shard exists when
its JSON does. Two writers, a kill at any moment or a full disk cost the shard in work and nothing else.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bench.errors import StoreError
from bench.plan.cell import Cell
from bench.plan.order import in_order
from bench.results.examples import examples_path, write_examples
from bench.results.records import Columns, frame, joined, length, rows_of
from bench.results.shards import KEY_DIGITS, SHARDS, Shard, read_shard, stated_cell, table_path, write_json
from bench.results.spelling import Spelling
from bench.rules import NEVER
from bench.system.files import keep_file, replace_file, slug
from bench.system.spread import spread

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


@dataclass(frozen=True)
class Row:
    """A cell with everything that is stored about it.

    ``columns`` are those of its records by name, an entry of each for each finished sample; they are given as arrays or
    as a table of pandas, and kept as arrays.

    An attack that was run only on what others had left has met the hardest samples of its cell, so that no share of
    them says anything of the cell. Then ``columns`` is empty, and what was measured is ``partial``: for whoever takes
    the attacks together, sample by sample, and for nobody who takes this one by itself.

    A row is ``sequential`` where outcomes could have decided how many samples it has: these were taken in an order that
    knows nothing of them, until something was decided. Then intervals and tests have to hold whenever a run stops.
    While it has not met all samples it has ``stopped``: ``columns`` are empty, what was measured is ``partial``, and
    who wants the shares of its ``prefix``, which are shares of the cell, has to ask.
    """

    cell: Cell
    columns: Columns
    shards: tuple[Shard, ...]
    partial: Columns = field(default_factory=dict)

    def __post_init__(self) -> None:
        for field_name in ("columns", "partial"):
            arrays = {str(name): np.asarray(values) for name, values in getattr(self, field_name).items()}
            object.__setattr__(self, field_name, arrays if length(arrays) else {})

    @classmethod
    def of(cls, cell: Cell, measured: Columns, shards: tuple[Shard, ...]) -> "Row":
        """The row of all that was ``measured``, an entry of each column for each sample."""
        chosen = any(shard.chosen for shard in shards if shard.error is None)
        row = cls(cell, measured, shards)
        return cls(cell, {}, shards, row.columns) if chosen and not row.complete else row

    @property
    def measured(self) -> Columns:
        """The columns of all samples that were measured, whichever these are."""
        return self.partial or self.columns

    @property
    def n(self) -> int:
        """How many samples have a record."""
        return length(self.columns)

    @cached_property
    def records(self) -> "pd.DataFrame":
        """Its records as pandas has them."""
        return frame(self.columns)

    @cached_property
    def hits(self) -> NDArray[np.float64]:
        """(n,) the query that beat each sample: 0 if it was wrong when clean, infinity if none did."""
        found = self.columns.get("first_hit", np.zeros(0)).astype(float)
        return np.where(found == NEVER, math.inf, found)

    @property
    def stopped(self) -> bool:
        """Whether what it holds was taken in order, and samples are left."""
        return self.sequential and not self._covered

    @cached_property
    def sequential(self) -> bool:
        """Whether outcomes could have decided how many samples it has. Who has run the rest of it, whatever came
        before, has fixed their number again."""
        finished = [shard for shard in self.shards if shard.error is None]
        if any(shard.chosen and not shard.in_order for shard in finished):  # by what other attacks had left
            return False
        if self._covered:
            fixed = [shard for shard in finished if not shard.until]
            return not self._all_of(fixed) and not any(shard.in_order for shard in fixed)
        return any(shard.in_order for shard in finished)

    @cached_property
    def _covered(self) -> bool:
        return self._all_of(shard for shard in self.shards if shard.error is None)

    def _all_of(self, shards: Iterable[Shard]) -> bool:
        """Whether every sample of the cell is in one of ``shards``."""
        return len(_positions(shards)) == len(self.cell.ids)

    @cached_property
    def prefix(self) -> Columns:
        """The records of the samples that come first in the order of the cell, as many as have run without a gap."""
        ids = np.asarray(self.cell.ids)[in_order(self.cell.ids)]
        has = np.isin(ids, self.measured.get("sample_id", ()))
        first = ids[: len(ids) if has.all() else int(np.argmin(has))]
        return rows_of(self.measured, np.isin(self.measured.get("sample_id", ()), first))

    @property
    def errors(self) -> list[str]:
        """The tracebacks of its failed shards."""
        return [shard.error for shard in self.shards if shard.error is not None]

    @property
    def complete(self) -> bool:
        """Whether every sample of the cell has a record."""
        return self.n == len(self.cell.ids)

    @property
    def figures(self) -> dict[str, float]:
        """What its shards measured once, the later shard winning."""
        return {name: value for shard in self.shards for name, value in shard.figures.items()}

    @property
    def training(self) -> Sequence[Mapping[str, float]]:
        """What was seen after each epoch of its network's training; empty where nobody looked."""
        return next((shard.training for shard in self.shards if shard.training), ())


class Store:
    """A folder of results.

    Raises:
        StoreError: the folder cannot be made or written to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._at_first: _Contents | None = None
        self._new_homes: dict[str, tuple[Cell, Path]] = {}  # by key, of cells that were not where they are usually

    def open(self) -> "Store":
        """Make the folder and try it, before slow work starts."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            replace_file(self.root / ".writable", lambda path: path.write_text("parry\n"))
            (self.root / ".writable").unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot write to {self.root}: {error.strerror or error}; choose another --out") from None
        return self

    def save(self, shard: Shard, records: "pd.DataFrame", examples: "Tensor | None" = None) -> None:
        """Keep a finished shard, and its final ``examples`` (B, C, H, W); a failure of the same stretch is forgotten.

        Raises:
            StoreError: the disk is full or the folder is gone. What was stored before is untouched.
        """
        kept = None if examples is None else write_examples(shard.ids, examples)
        self.keep(shard, records.to_parquet(index=False), kept)

    def keep(self, shard: Shard, table: bytes, examples: bytes | None = None) -> None:
        """As :meth:`save`, of what are the bytes of files already: ``table`` is Parquet, ``examples`` are as written.

        Raises:
            StoreError: as :meth:`save`.
        """
        shard, folder = self._placed(shard)
        digest = sha256(table).hexdigest()
        path = folder / shard.file_name
        if examples is not None:
            keep_file(examples_path(table_path(path, digest)), examples)
        keep_file(table_path(path, digest), table)
        keep_file(path, write_json(shard, digest))
        (folder / f"{shard.stem}.failed.json").unlink(missing_ok=True)

    def adopt(self, path: Path, shard: Shard) -> None:
        """Keep a copy of the files of ``shard``, whose JSON is at ``path`` and has been read.

        Raises:
            StoreError: as :meth:`save`.
        """
        folder = self.root / place(shard.cell)
        digest = json.loads(path.read_bytes())["records_sha256"]
        table = table_path(path, digest)
        for file in (examples_path(table), table, path):  # the JSON last
            if file.is_file():
                keep_file(folder / file.name, file.read_bytes())

    def fail(self, shard: Shard) -> None:
        """Keep the traceback of a shard that could not be finished; the next run tries it again."""
        shard, folder = self._placed(shard)
        keep_file(folder / shard.file_name, write_json(shard, None))

    def missing(self, cell: Cell) -> list[int]:
        """The positions in ``cell.ids`` that no finished shard covers, wherever it lies.

        Raises:
            StoreError: a stored shard of this cell is damaged, or two give the same samples other results.
        """
        done = _positions(shard for row in self._whole(cell) for shard in row.shards if shard.error is None)
        return [position for position in range(len(cell.ids)) if position not in done]

    def settled(self, shard: Shard) -> tuple[bool, int | None]:
        """Whether exactly this shard is finished, and when it failed last, in ns; other runs may change both."""
        _, folder = self._placed(shard)
        finished = folder / f"{shard.stem}.json"
        failed = finished.with_name(f"{shard.stem}.failed.json")
        try:
            return finished.exists(), failed.stat().st_mtime_ns
        except FileNotFoundError:
            return finished.exists(), None

    def row(self, cell: Cell) -> Row:
        """Everything that is stored about ``cell``.

        Raises:
            StoreError: one of its files is damaged, or two folders give the same samples other results.
        """
        return _joined(self._home(cell)[0], self._whole(cell))

    def rows(self) -> tuple[list[Row], list[StoreError]]:
        """All cells in the folder, as :func:`rows_in` reads them.

        Raises:
            StoreError: there is no such folder.
        """
        return rows_in(cell_folders(self.root))

    def _home(self, cell: Cell) -> tuple[Cell, Path]:
        """``cell`` as it is written here, and where its next shard goes.

        Rows from before may name the same in other words, which have another key, and people may have put its folder
        elsewhere. A cell that is new here takes the words of those that are there.
        """
        if (usual := self.root / place(cell)).is_dir():
            return cell, usual
        if cell.key not in self._new_homes:  # asked for every shard
            there = self._contents()
            alike = there.spelling.alike(cell)
            self._new_homes[cell.key] = there.homes.get(cell.meaning, [(alike, self.root / place(alike))])[0]
        return self._new_homes[cell.key]

    def _placed(self, shard: Shard) -> tuple[Shard, Path]:
        cell, folder = self._home(shard.cell)
        return replace(shard, cell=cell), folder

    def _contents(self) -> "_Contents":
        if self._at_first is None:
            stated = [(stated_cell(min(folder.glob(SHARDS))), folder) for folder in _holding(self.root)]
            self._at_first = _Contents([(cell, folder) for cell, folder in stated if cell is not None])
        return self._at_first

    def _whole(self, cell: Cell) -> list[Row]:
        """The shards of ``cell`` in all folders that hold some, a row of each, none of them damaged."""
        homes = [self._home(cell)[1], *(folder for _, folder in self._contents().homes.get(cell.meaning, ()))]
        found = {}
        for folder in dict.fromkeys(homes):
            found[folder], damaged = _read_all(folder)
            if damaged:
                raise damaged[0]
            if other := next((row.cell for row in found[folder] if row.cell.meaning != cell.meaning), None):
                raise StoreError(f"{folder} is of {other}, whose key starts alike; use another --out for this")
        if against := contradictions({folder: united(rows) for folder, rows in found.items()}):
            raise against[0]
        return [row for rows in found.values() for row in rows]


class _Contents:
    """What a folder of results held when somebody first looked: by its meaning where a cell lies, and how it is spelt.

    Folders of cells that came later are where such folders go.
    """

    def __init__(self, found: Sequence[tuple[Cell, Path]]) -> None:
        self.homes: dict[str, list[tuple[Cell, Path]]] = {}
        for cell, folder in found:
            self.homes.setdefault(cell.meaning, []).append((cell, folder))
        self.spelling = Spelling(cell for cell, _ in found)


def place(cell: Cell) -> Path:
    """The folder of a cell, below that of the results."""
    name = f"{slug(cell.attack.spec)}-{cell.key[: KEY_DIGITS[0]]}"
    return Path(slug(cell.dataset.spec, cell.model.spec), slug(cell.defense_name), name)


def cell_folders(root: Path) -> list[Path]:
    """The folders below ``root`` that hold shards, in the order of their names.

    Raises:
        StoreError: there is no such folder.
    """
    if not root.is_dir():
        raise StoreError(f"no results folder {root}; run a suite with --out {root} first")
    return _holding(root)


def links_in(root: Path) -> list[StoreError]:
    """What is wrong with each link to a folder below ``root``: nothing behind it is read."""
    below = (Path(place, name) for place, names, _ in os.walk(root) for name in names)
    links = sorted(path for path in below if path.is_symlink())
    return [StoreError(f"{link} is a link, behind which nothing is read; name {link.resolve()}") for link in links]


def rows_in(folders: Iterable[Path]) -> tuple[list[Row], list[StoreError]]:
    """All cells in ``folders``, each of which holds shards, and what is wrong with the shards that cannot be read.

    A cell with damaged shards has the records of the others. One that lies in two folders comes once; where they give
    the same samples other results, that is damage, too, as nobody can say which is right.
    """
    folders = list(dict.fromkeys(folders))
    found = dict(zip(folders, spread(_read_all, folders), strict=True))
    damaged = [error for _, errors in found.values() for error in errors]
    rows = united(row for rows, _ in found.values() for row in rows)
    return rows, damaged + contradictions({folder: united(rows) for folder, (rows, _) in found.items()})


def united(rows: Iterable[Row]) -> list[Row]:
    """The rows, those of one cell as one: of several shards or several folders, each sample once.

    What is spelt in several ways is called as in the first row that has it.
    """
    found = list(rows)
    if len(found) < 2:
        return found
    alike: dict[str, list[Row]] = {}
    for row in found:
        alike.setdefault(row.cell.meaning, []).append(row)
    spelling = Spelling(same[0].cell for same in alike.values())
    named = ((spelling.alike(same[0].cell), same) for same in alike.values())
    return [_called(cell, same[0]) if len(same) == 1 else _joined(cell, same) for cell, same in named]


def contradictions(found: Mapping[Path, Sequence[Row]]) -> list[StoreError]:
    """The cells that lie in two folders with different results, told by name."""
    alike: dict[str, list[tuple[Path, Row]]] = {}
    for folder, rows in found.items():
        for row in rows:
            alike.setdefault(row.cell.meaning, []).append((folder, row))
    return [
        StoreError(
            f"{one} and {other} are the same cell with different results ({differ} samples differ); the first is "
            "shown: delete the one that you do not trust"
        )
        for copies in alike.values()
        for (one, a), (other, b) in combinations(copies, 2)
        if (differ := _differing(a.measured, b.measured))
    ]


def _differing(a: Columns, b: Columns) -> int:
    """How many samples that both have fell at other queries, ended as another class, or are proven within another
    radius."""
    if not length(a) or not length(b):
        return 0
    _, of_a, of_b = np.intersect1d(a["sample_id"], b["sample_id"], return_indices=True)
    results = [name for name in ("first_hit", "final_pred", "radius") if name in a]
    return int(np.any([a[name][of_a] != b[name][of_b] for name in results], axis=0).sum())


def _called(cell: Cell, row: Row) -> Row:
    return row if row.cell is cell else replace(row, cell=cell)


def _joined(cell: Cell, rows: Sequence[Row]) -> Row:
    columns = joined([row.measured for row in rows if row.measured])
    shards = [shard for row in rows for shard in row.shards]
    done = _positions(shard for shard in shards if shard.error is None)
    # A failure is over once other shards, perhaps of another size, have covered its samples.
    return Row.of(cell, columns, tuple(x for x in shards if x.error is None or not done.issuperset(x.positions)))


def _holding(root: Path) -> list[Path]:
    return sorted({path.parent for path in root.rglob(SHARDS)})


def _read_all(folder: Path) -> tuple[list[Row], list[StoreError]]:
    """The shards in a folder, a row of each, and what is wrong with those that cannot be read."""
    whole, damaged = [], []
    for path in sorted(folder.glob(SHARDS)):
        try:
            shard, columns = read_shard(path)
        except StoreError as error:
            damaged.append(error)
        else:
            whole.append(Row.of(shard.cell, columns, (shard,)))
    return whole, damaged


def _positions(shards: Iterable[Shard]) -> set[int]:
    """The positions in a cell's samples that the shards cover."""
    return set().union(*(shard.positions for shard in shards))
