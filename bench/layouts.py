"""Training sets as their owners keep them, and how protected images go back into the same layout.

Beside :mod:`bench.data`, which reads data sets to measure on: here every training image is read as it is stored, none
is resized or put aside, and each source knows how to write itself with other pixels.
"""

import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from bench.data.arrays import pair, read_arrays
from bench.data.folders import class_names, list_images
from bench.dataset import Dataset, Split
from bench.errors import DataError

Pixels = NDArray[np.uint8]  # (N, H, W, C), C 1 or 3
Advance = Callable[[int], None]  # so many more images are done
GREY, COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # Pillow's modes of 8 bits
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
IMAGE, LABEL = ("img", "image"), ("label", "fine_label")  # columns, under the names they go by

T = TypeVar("T")
R = TypeVar("R")


class Bar(Protocol):
    """Who is told how far slow work is (:class:`bench.progress.Steps`)."""

    def step(self, label: str, total: int | None = None, unit: str = "") -> None: ...
    def advance(self, count: int = 1) -> None: ...
    def work(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Source:
    """A training set and the files that hold it.

    ``files`` has, for each file to write, by its name below the output folder, what makes its content of the protected
    images (all of them, in order). ``copies`` are files to carry over as they are, ``renamed`` says what is called
    otherwise afterwards, ``left_out`` names what is in the folder and neither written nor copied.
    """

    layout: str
    data: Dataset  # all images in ``train``, uint8
    inputs: tuple[Path, ...]
    files: Mapping[str, Callable[[Pixels, Advance], bytes]]
    copies: Mapping[str, Path] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    note: str = ""  # what a reader of the protected set must know


def read_source(path: Path, bar: Bar) -> Source:
    """The training set at ``path``: an .npz file, a Parquet file or a folder of them, or class folders of images.

    Raises:
        DataError: none of these, or an image that cannot be read or is of another size than the rest.
    """
    if path.suffix == ".npz":
        return _npz(_existing(path))
    if path.suffix == ".parquet":
        return _parquet(_existing(path).parent, [path], {}, (), bar)
    if path.is_dir() and any(path.glob("*.parquet")):
        return _parquet_folder(path, bar)
    if path.is_dir():
        return _image_folder(path, bar)
    raise DataError(
        f"{path} is {'neither .npz nor .parquet' if path.exists() else 'not there'}; "
        "expected class folders of images, an .npz file, or a Parquet file or folder"
    )


def pixels(split: Split) -> Pixels:
    """The images of ``split``, which are uint8, channels last."""
    return split.images.permute(0, 2, 3, 1).numpy()


def in_parallel(function: Callable[[T], R], items: Iterable[T], advance: Advance = lambda count: None) -> list[R]:
    """``function`` of each item, in order; the first exception ends it, and what has not begun is not done."""
    results = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for result in pool.map(function, items):
                results.append(result)
                advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def digest_files(files: Mapping[str, Path]) -> dict[str, str]:
    """The SHA-256 of each file, by the name it is given."""
    hashes = in_parallel(lambda file: sha256(file.read_bytes()).hexdigest(), files.values())
    return dict(zip(files, hashes, strict=True))


def png(image: Pixels) -> bytes:
    """An image (H, W, C) as the bytes of a PNG file, which loses nothing."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


def _image_folder(root: Path, bar: Bar) -> Source:
    """Class folders in ``root/train``, beside which all else is copied, or in ``root``."""
    part = root / "train" if (root / "train").is_dir() else root
    listed = list_images(part, class_names({"train": part}))
    if not listed:
        raise DataError(f"no images in {part}; expected class/name.png, .jpg, .jpeg, .bmp or .webp")
    found = [file for file, _ in listed]
    classes = tuple(dict.fromkeys(file.parent.name for file in found))  # a folder without images is no class
    names = [file.relative_to(root) for file in found]
    targets = [name.with_suffix(".png") for name in names]
    for (one, first), (other, second) in pairwise(zip(names, targets, strict=True)):
        if first.parent == second.parent and first >= second:
            what = "the same name" if first == second else "another order"
            raise DataError(f"{one} and {other} in {root} would have {what} once they are .png; rename one of them")
    images = _decode_all([str(file) for file in found], lambda row: found[row].read_bytes(), bar)
    labels = torch.tensor([classes.index(file.parent.name) for file in found])
    files = _below(root)
    copies = {name: file for name, file in files.items() if part != root and Path(name).parts[0] in ("val", "test")}
    return Source(
        "imagefolder",
        _dataset(root.resolve().name, classes, images, labels, augment=True),
        (*found, *copies.values()),
        {str(target): _one_png(row) for row, target in enumerate(targets)},
        copies,
        {str(name): str(target) for name, target in zip(names, targets, strict=True) if name != target},
        tuple(sorted(files.keys() - copies.keys() - {str(name) for name in names})),
    )


def _one_png(row: int) -> Callable[[Pixels, Advance], bytes]:
    return lambda images, advance: png(images[row])


def _npz(file: Path) -> Source:
    arrays = read_arrays(file)
    train = pair(arrays, "train", file)
    if len(train) == 0:
        raise DataError(f"{file}: x_train is empty; there is nothing to protect")
    classes = tuple(str(label) for label in range(int(train.labels.max()) + 1))
    data = Dataset(file.stem, classes, train, train.subset(slice(0)), train.subset(slice(0)))
    stored = arrays["x_train"]
    floats = stored.dtype.kind == "f"
    if floats:
        data = data.released(Split((train.images * 255).round().to(torch.uint8), train.labels))
    before = pixels(data.train)
    last = stored.shape[1:] != data.train.shape
    packed = _is_packed(file)

    def content(images: Pixels, advance: Advance) -> bytes:
        levels, old = (part if last else part.transpose(0, 3, 1, 2) for part in (images, before))
        x = np.where(levels == old, stored, (levels / 255).astype(stored.dtype)) if floats else levels
        buffer = io.BytesIO()
        changed: dict[str, Any] = {**arrays, "x_train": np.ascontiguousarray(x)}
        (np.savez_compressed if packed else np.savez)(buffer, **changed)
        advance(len(images))
        return buffer.getvalue()

    note = "floats count as the nearest of 256 levels; those whose level stays are kept as they were" if floats else ""
    return Source("npz", data, (file,), {file.name: content}, note=note)


def _is_packed(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def _parquet_folder(root: Path, bar: Bar) -> Source:
    """``train*.parquet`` in ``root``; Parquet files of other splits are copied."""
    files = sorted(root.glob("*.parquet"))
    train = [file for file in files if file.name.startswith("train")]
    if not train:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{root} has {names}, none of which starts with train; name the training file itself")
    copies = {file.name: file for file in files if file not in train}
    rest = _below(root).keys() - copies.keys() - {file.name for file in train}
    return _parquet(root, train, copies, tuple(sorted(rest)), bar)


def _parquet(
    root: Path, files: Sequence[Path], copies: Mapping[str, Path], left_out: tuple[str, ...], bar: Bar
) -> Source:
    """The rows of ``files``, which hold an image ``{bytes, path}`` and a label each."""
    tables = [_table(file) for file in files]
    coded: list[bytes | None] = []
    names, labels, parts = [], [], {}
    for file, (table, image, label) in zip(files, tables, strict=True):
        parts[file.name] = _rewrite(file, table, image, slice(len(coded), len(coded) + table.num_rows))
        column = table.column(image).to_pylist()
        coded += [row and row["bytes"] for row in column]
        names += [(f"{file}, row {row}", (entry or {}).get("path")) for row, entry in enumerate(column)]
        labels += table.column(label).to_pylist()
    if not coded:
        raise DataError(f"{files[0]} has no rows; there is nothing to protect")
    if not all(isinstance(label, int) for label in labels):
        raise DataError(f"{files[0]}: labels that are no integers; expected integers from 0 in {' or '.join(LABEL)}")
    images = _decode_all([where for where, _ in names], lambda row: coded[row] or b"", bar)
    paths = [path for _, path in names]
    renamed = Counter(Path(path).suffix for path in paths if path and _as_png(path) != path)
    return Source(
        "parquet",
        _dataset(root.resolve().name, _class_names(labels, paths), images, torch.tensor(labels), augment=True),
        (*files, *copies.values()),
        parts,
        copies,
        {suffix: f".png in {count:,} paths of the table" for suffix, count in sorted(renamed.items())},
        left_out,
    )


def _table(file: Path) -> tuple[Any, str, str]:
    """A table with the names of its image and label columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{file} is not a readable Parquet file ({reason}); download it again") from None
    image, label = (next((name for name in names if name in table.column_names), "") for names in (IMAGE, LABEL))
    kind: Any = table.schema.field(image).type if image else pa.null()
    inside = [kind.field(index).name for index in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    if not label or "bytes" not in inside:
        columns = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
        raise DataError(
            f"{file} has the columns {columns}; expected {' or '.join(IMAGE)} {{bytes, path}} and {' or '.join(LABEL)}"
        )
    return table, image, label


def _rewrite(file: Path, table: Any, column: str, rows: slice) -> Callable[[Pixels, Advance], bytes]:
    """What writes ``table`` with the protected images of ``rows``, compressed and cut into groups as ``file`` is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def content(images: Pixels, advance: Advance) -> bytes:
        place = table.column_names.index(column)
        kind = table.schema.field(place)
        coded = in_parallel(png, images[rows], advance)
        old = table.column(place).to_pylist()
        new = [
            {**row, "bytes": data, **({"path": _as_png(row["path"])} if row.get("path") else {})}
            for row, data in zip(old, coded, strict=True)
        ]
        written = table.set_column(place, kind, pa.array(new, type=kind.type))
        group = pq.ParquetFile(file).metadata.row_group(0)
        buffer = io.BytesIO()
        pq.write_table(written, buffer, compression=group.column(0).compression, row_group_size=group.num_rows)
        return buffer.getvalue()

    return content


def _as_png(path: str) -> str:
    return str(Path(path).with_suffix(".png")) if Path(path).suffix else path


def _class_names(labels: Sequence[int], paths: Sequence[str | None]) -> tuple[str, ...]:
    """The folder in which all paths of a class, and of no other, are; or else its number."""
    folders: dict[int, set[str]] = {}
    for label, path in zip(labels, paths, strict=True):
        folders.setdefault(label, set()).add(Path(path or "").parent.name)
    shared = Counter(name for names in folders.values() for name in names)
    named = {label: min(names) for label, names in folders.items() if len(names) == 1 and shared[min(names)] == 1}
    return tuple(named.get(label) or str(label) for label in range(max(labels) + 1))


def _dataset(name: str, classes: tuple[str, ...], images: Pixels, labels: torch.Tensor, *, augment: bool) -> Dataset:
    """All images as training images; the augmentations are those of :mod:`bench.data` for photographs."""
    train = Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels)
    nothing = train.subset(slice(0))
    return Dataset(name, classes, train, nothing, nothing, flip=augment, shift=images.shape[1] // 8 if augment else 0)


def _decode_all(names: Sequence[str], load: Callable[[int], bytes], bar: Bar) -> Pixels:
    """Every image, of one size; grey ones are grey only where all are.

    Raises:
        DataError: images that cannot be read, each counted and the first named with the reason, or several sizes.
    """
    bar.step("looking at the images", 2 * len(names), "images")
    headers = _readable(names, in_parallel(lambda row: _attempt(_header, load, row), range(len(names)), bar.advance))
    first = {size: row for row, (size, _) in reversed([*enumerate(headers)])}
    if len(first) > 1:
        counts = Counter(size for size, _ in headers).most_common()
        kinds = [f"{width}x{height} ({count}, as {names[first[width, height]]})" for (width, height), count in counts]
        more = f" and {len(kinds) - 3} more" if len(kinds) > 3 else ""
        raise DataError(
            f"the images have {len(kinds)} sizes: {', '.join(kinds[:3])}{more}; "
            "a defense needs one size: resize or crop them all to it first"
        )
    ((width, height),) = first
    grey = all(grey for _, grey in headers)
    images = np.empty((len(names), height, width, 1 if grey else 3), dtype=np.uint8)

    def decode(row: int, image: Image.Image) -> None:
        images[row] = np.asarray(image.convert("L" if grey else "RGB")).reshape(images.shape[1:])

    found = in_parallel(lambda row: _attempt(partial(decode, row), load, row), range(len(names)), bar.advance)
    _readable(names, found)
    return images


class _Broken(str):
    """Why an image cannot be read."""


def _attempt(look: Callable[[Image.Image], R], load: Callable[[int], bytes], row: int) -> R | _Broken:
    """What ``look`` finds in an image."""
    coded = b""
    try:
        coded = load(row)
        with Image.open(io.BytesIO(coded)) as image:
            return look(image)
    except UnidentifiedImageError:
        return _Broken("not an image" if coded else "empty")
    except UNREADABLE as error:
        return _Broken(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def _header(image: Image.Image) -> tuple[tuple[int, int], bool]:
    """Its size, and whether it is grey."""
    if image.mode not in GREY + COLOUR:
        raise ValueError(f"its pixels are {image.mode}, not of 8 bits a channel")
    return image.size, image.mode in GREY


def _readable(names: Sequence[str], found: Sequence[R | _Broken]) -> list[R]:
    """What was found, which must be no failure."""
    broken = [(name, reason) for name, reason in zip(names, found, strict=True) if isinstance(reason, _Broken)]
    if broken:
        name, reason = broken[0]
        others = ", ".join(name for name, _ in broken[1:4]) + (", …" if len(broken) > 4 else "")
        more = f", nor can {len(broken) - 1} more: {others}" if others else ""
        raise DataError(f"{name} cannot be read as an image ({reason}){more}; replace or remove what is broken")
    return [one for one in found if not isinstance(one, _Broken)]


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise DataError(f"{file} is not a file; check --in")
    return file


def _below(root: Path) -> dict[str, Path]:
    """All files below ``root`` but hidden ones, by name."""
    files = {str(file.relative_to(root)): file for file in sorted(root.rglob("*")) if file.is_file()}
    return {name: file for name, file in files.items() if not any(part.startswith(".") for part in Path(name).parts)}
