"""One shard as two files: the JSON that says everything about it, and the Parquet table of its records.

What is read is not trusted. A file may come from another machine, another version or another person, so its size is
looked at before it is read, its checksum, its types and its ranges before it is believed, and it has to be of the cell
in whose folder it lies. Whatever is wrong is one :class:`bench.errors.StoreError` that names the file.
"""

import json
import math
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from bench.errors import StoreError
from bench.plan.cell import Cell
from bench.results.arrow import as_numpy
from bench.results.records import Columns, check_records, frame

if TYPE_CHECKING:
    import pandas as pd

SCHEMAS = 1, 2, 3  # of a stretch, of chosen samples, of samples in order; versions that do not know one refuse it
SHARDS = "[0-9]*-[0-9]*.json"  # of finished and of failed ones
KEY_DIGITS = 8, 16  # of a cell's key, at the end of its folder's name: today, and in folders of version 0.1
LARGEST_JSON, LARGEST_TABLE = 64 << 20, 1 << 30  # bytes; a million samples take about 10 and 150 MB
LIST = re.compile(r"\[\n([-\d\s,]+)\n *\]")  # of whole numbers, which go on one line; no string holds a bare newline
REMEDY = "restore it, or delete it and run the suite again"


@dataclass(frozen=True)
class Shard:
    """What a JSON file says: the cell, the stretch ``start:stop`` of its samples, and how it went.

    Of samples that were chosen by what other attacks had left, ``chosen`` holds the positions, from the first to the
    last of the stretch; empty where all of it was measured. They are ``in_order`` where nothing chose them but
    the order of the cell's samples, see :mod:`bench.plan.order`. ``until`` is what the run was to decide, where it
    could have ended with any sample.
    """

    cell: Cell
    start: int
    stop: int
    seconds: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)  # measured once for the shard, not for each sample
    provenance: Mapping[str, Any] = field(default_factory=dict)
    findings: Sequence[Mapping[str, Any]] = ()  # what probing the served model has shown, in the first shard of a cell
    training: Sequence[Mapping[str, float]] = ()  # epoch by epoch, how the network was trained, in the first shard, too
    error: str | None = None  # the traceback of a failed shard
    chosen: tuple[int, ...] = ()
    in_order: bool = False
    until: str = ""

    @property
    def positions(self) -> Sequence[int]:
        """Where its samples stand among those of the cell, ascending."""
        return self.chosen or range(self.start, self.stop)

    @property
    def ids(self) -> list[int]:
        """Its samples."""
        return [self.cell.ids[position] for position in self.positions]

    @property
    def stem(self) -> str:
        """The name of its files, without ending."""
        return stem_of(self.start, self.stop, self.chosen)

    @property
    def file_name(self) -> str:
        """The name of its JSON."""
        return f"{self.stem}.json" if self.error is None else f"{self.stem}.failed.json"


def stem_of(start: int, stop: int, chosen: Sequence[int] = ()) -> str:
    """The name of the files of a shard, without ending; of chosen samples with a hash of which they are."""
    stretch = f"{start:06d}-{stop:06d}"
    return f"{stretch}-{_digest({'chosen': list(chosen)})[: KEY_DIGITS[0]]}" if chosen else stretch


class Stored(NamedTuple):
    """A shard and the columns of its records, an entry of each for each sample; a failed one has none."""

    shard: Shard
    columns: Columns

    @property
    def records(self) -> "pd.DataFrame":
        """The same as pandas has it."""
        return frame(self.columns)


def write_json(shard: Shard, records_sha256: str | None) -> bytes:
    """The JSON file of a shard. Figures that are no finite number have not been measured and are left out."""
    content = {
        "schema": _schema(bool(shard.chosen), shard.in_order),
        "key": shard.cell.key,
        "cell": shard.cell.as_json(),
        "start": shard.start,
        "stop": shard.stop,
        **({"chosen": list(shard.chosen)} if shard.chosen else {}),
        **({"in_order": True, "until": shard.until} if shard.in_order else {}),
        "seconds": round(shard.seconds, 3),
        "figures": _finite_ones(shard.figures),
        "provenance": dict(shard.provenance),
        "findings": [dict(finding) for finding in shard.findings],
        **({"training": [_finite_ones(epoch) for epoch in shard.training]} if shard.training else {}),
        "error": shard.error,
        "records_sha256": records_sha256,
    }
    text = json.dumps({**content, "sha256": _digest(content)}, indent=1)
    return (LIST.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n").encode()


def read_shard(path: Path) -> Stored:
    """The shard whose JSON is at ``path``, once everything about it has been checked.

    Raises:
        StoreError: one of its two files is missing, damaged, or of another cell than its folder.
    """
    text = content_of(path, LARGEST_JSON)
    shard, records_sha256 = _parse(path, text)
    _check_place(path, shard)
    if records_sha256 is None:
        return Stored(shard, {})
    table = table_path(path, records_sha256)
    content = content_of(table, LARGEST_TABLE)
    if sha256(content).hexdigest() != records_sha256:
        raise StoreError(f"{table} was altered or cut short after it was written; {REMEDY}")
    return Stored(shard, _records(table, content, shard))


def stated_cell(path: Path) -> Cell | None:
    """The cell that the JSON at ``path`` names, if it does; believe no more of it than where to look."""
    with suppress(Exception):  # of a stranger's file: whatever its reader raises
        return Cell.from_json(json.loads(content_of(path, LARGEST_JSON))["cell"])
    return None


def table_path(path: Path, records_sha256: str) -> Path:
    """Where the records of the shard at ``path`` are.

    Two writers whose records differ in a last bit write two files, and the JSON in place names the one that is its own.
    """
    return path.with_name(f"{path.stem}-{records_sha256[:12]}.parquet")


def _schema(chosen: bool, in_order: bool) -> int | None:
    """The schema of a shard of chosen samples, or of a stretch; of what can be no shard, none."""
    return None if in_order and not chosen else SCHEMAS[chosen + in_order]


def _finite_ones(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


@dataclass(frozen=True)
class _Finding:
    flag: str
    fired: bool
    evidence: str


@dataclass(frozen=True)
class _Epoch:
    clean_accuracy: Annotated[float, Field(ge=0, le=1)]
    step_accuracy: Annotated[float, Field(ge=0, le=1)]
    pgd_accuracy: Annotated[float, Field(ge=0, le=1)]
    alignment: Annotated[float, Field(ge=-1.01, le=1.01)] = 0.0  # a cosine and its rounding
    gradient_norm: Annotated[float, Field(ge=0), AfterValidator(_finite)] = 0.0
    weight_gradient_norm: Annotated[float, Field(ge=0), AfterValidator(_finite)] = 0.0
    channel_inequality: Annotated[float, Field(ge=-0.01, le=1.01)] = 0.0
    step_channel_inequality: Annotated[float, Field(ge=-0.01, le=1.01)] = 0.0
    self_information: Annotated[float, Field(ge=0, le=1)] = 0.0
    explained_variance: Annotated[float, Field(ge=0, le=1.01)] = 0.0


@dataclass(frozen=True)
class _Provenance:
    hardware: str = ""
    device: str = ""
    parry: str = ""
    commit: str = ""
    libraries: dict[str, str | None] = field(default_factory=dict)
    finished: datetime | None = None


@dataclass(frozen=True)
class _Stated:
    """The types that a file must have. What a later version adds beside them is let be."""

    key: str
    cell: Cell
    start: Annotated[int, Field(ge=0)]
    stop: int
    seconds: Annotated[float, Field(ge=0), AfterValidator(_finite)]
    figures: dict[str, Annotated[float, AfterValidator(_finite)]]
    provenance: _Provenance
    error: str | None
    records_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None
    findings: list[_Finding] = field(default_factory=list)  # rows from before findings were stored have none
    training: list[_Epoch] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    in_order: bool = False
    until: str = ""

    def __post_init__(self) -> None:
        if not self.start < self.stop <= len(self.cell.ids):
            raise ValueError(f"samples {self.start} to {self.stop} are not among the {len(self.cell.ids)} of the cell")
        if self.chosen and (
            sorted(set(self.chosen)) != self.chosen or (self.chosen[0], self.chosen[-1] + 1) != (self.start, self.stop)
        ):
            raise ValueError(f"the chosen samples do not ascend from {self.start} to {self.stop}")
        if self.until and not self.in_order:
            raise ValueError("what it was to decide is told of samples that do not come in order")
        if len(set(self.cell.ids)) != len(self.cell.ids):
            raise ValueError("a sample comes twice in the cell")
        if (self.error is None) != (self.records_sha256 is not None):
            raise ValueError("a shard has either records or an error")


_STATED = TypeAdapter(_Stated)


def _parse(path: Path, text: bytes) -> tuple[Shard, str | None]:
    """What the JSON at ``path`` says, and the hash of the records that belong to it."""
    try:
        content = json.loads(text)
        stated = content.pop("sha256")
        schema = content["schema"]
    except Exception as error:  # of a stranger's file: not JSON, not an object, nested beyond what a parser takes
        raise StoreError(f"{path} cannot be read ({type(error).__name__}); {REMEDY}") from None
    if not isinstance(schema, int):
        raise StoreError(f"{path} is no shard (schema is a {type(schema).__name__}); {REMEDY}")
    if schema != _schema(bool(content.get("chosen")), content.get("in_order") is True):
        known = ", ".join(map(str, SCHEMAS))
        raise StoreError(f"{path} has schema {schema}, this version reads {known}; use the version that wrote it")
    if stated != _digest(content):
        raise StoreError(f"{path} was altered after it was written; {REMEDY}")
    try:
        # A lone surrogate, as in the name of a strange file, is no reason to lose a row.
        _STATED.validate_json(json.dumps(content, ensure_ascii=False).encode(errors="replace"), strict=True)
        cell = Cell.from_json(content["cell"])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StoreError(f"{path} is no shard: {where + ': ' if where else ''}{first['msg']}; {REMEDY}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is no shard ({type(error).__name__}); {REMEDY}") from None
    if content["key"] != cell.key:
        raise StoreError(f"{path} has a key that is not its cell's; {REMEDY}")
    shard = Shard(
        cell=cell,
        **{name: content[name] for name in ("start", "stop", "seconds", "figures", "provenance", "error")},
        findings=tuple(content.get("findings", ())),
        training=tuple(content.get("training", ())),
        chosen=tuple(content.get("chosen", ())),
        in_order=content.get("in_order", False),
        until=content.get("until", ""),
    )
    return shard, content["records_sha256"]


def _check_place(path: Path, shard: Shard) -> None:
    """Whether the file lies where a shard of its cell and its stretch belongs; only the key in a folder's name counts.

    Raises:
        StoreError: it was copied or renamed.
    """
    keys = [shard.cell.key[:digits] for digits in KEY_DIGITS]

    def is_its(folder: str) -> bool:
        return folder in keys or folder.endswith(tuple(f"-{key}" for key in keys))

    if not is_its(path.parent.name) and not is_its(path.resolve().parent.name):  # as it is named, or is
        raise StoreError(
            f"{path} is of another cell than its folder ({shard.cell}, key {keys[0]}); move it to a folder whose name "
            f"ends with -{keys[0]}, or delete it"
        )
    if path.name != shard.file_name:
        raise StoreError(f"{path} holds what belongs into {shard.file_name}; rename it, or delete it")


def _records(table: Path, content: bytes, shard: Shard) -> Columns:
    """The records of a shard from the bytes of their file."""
    samples = len(shard.positions)
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        fits = file.metadata.num_rows == samples and size <= LARGEST_TABLE
        read = file.read(use_threads=False) if fits else pa.table({})
        records = {name: as_numpy(values) for name, values in zip(read.column_names, read.columns, strict=True)}
    except Exception as error:  # of a stranger's file, whatever its reader raises
        raise StoreError(f"{table} cannot be read ({type(error).__name__}); {REMEDY}") from None
    if not fits:
        raise StoreError(f"{table} has {file.metadata.num_rows} lines for {samples} samples; {REMEDY}")
    try:
        if len(records) < read.num_columns:
            raise ValueError("has two columns of one name")
        check_records(records, shard.cell, shard.ids)
    except ValueError as error:
        raise StoreError(f"{table} {error}; {REMEDY}") from None
    return records


def content_of(path: Path, largest: int) -> bytes:
    """The bytes of a plain file of a size that can be meant; anything else could block or fill the memory."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"{path} cannot be read (not a plain file); delete it")
        if status.st_size > largest:
            raise StoreError(f"{path} cannot be read ({status.st_size:,} bytes, at most {largest:,}); delete it")
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({type(error).__name__}); {REMEDY}") from None


def _digest(content: Mapping[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
