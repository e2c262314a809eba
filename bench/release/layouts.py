"""Training sets as their owners keep them, and how protected images go back into the same layout.

Beside :mod:`bench.data`, which reads data sets to measure on: here every training image is read as it is stored, none
is resized or put aside, and each source knows how to write itself with other pixels.
"""

import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bench.data.arrays import pair, read_arrays
from bench.data.folders import EXPECTED, Labelled, class_names, files_below, is_image, list_images, visible
from bench.data.images import Advance, Frame, Pictures, Pixels, in_parallel, read_pictures
from bench.data.tables import read_table
from bench.dataset import Dataset, Split, numbered
from bench.errors import DataError

IMAGE, LABEL = ("img", "image"), ("label", "fine_label")  # columns, under the names they go by
UNSORTED = "images"  # the one class of images that lie in no class folders, and the folder that they get


class Bar(Protocol):
    """Who is told how far slow work is (:class:`bench.run.progress.Steps`)."""

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
    changed: Mapping[str, Sequence[str]] = field(default_factory=dict)  # images that reading has changed, by how
    note: str = ""  # what a reader of the protected set must know


def read_source(path: Path, bar: Bar, frame: Frame | None = None, unsorted: bool = False) -> Source:
    """The training set at ``path``: an .npz file, a Parquet file or a folder of them, or class folders of images.

    Args:
        frame: what brings the images to one size, if they are to be.
        unsorted: whether images may lie in no class folders, since nobody asks for their classes.

    Raises:
        DataError: none of these, a link that leads out of a folder, or an image that cannot be read or is of another
            size than the rest.
    """
    if path.is_dir():
        _refuse_leaving(path)
        if any(path.glob("*.parquet")):
            return _parquet_folder(path, bar, frame)
        return _image_folder(path, bar, frame, unsorted)
    if path.suffix == ".npz":
        if frame is not None:
            raise DataError(f"{path}: arrays are not resized; store them in the size they shall have, without --size")
        return _npz(_existing(path))
    if path.suffix == ".parquet":
        return _parquet(_existing(path).parent, [path], {}, (), bar, frame)
    raise DataError(
        f"{path} is {'neither .npz nor .parquet' if path.exists() else 'not there'}; "
        "expected class folders of images, an .npz file, or a Parquet file or folder"
    )


def pixels(split: Split) -> Pixels:
    """The images of ``split``, which are uint8, channels last."""
    return split.images.permute(0, 2, 3, 1).numpy()


def digest_files(files: Mapping[str, Path]) -> dict[str, str]:
    """The SHA-256 of each file, by the name it is given."""
    hashes = in_parallel(lambda file: sha256(file.read_bytes()).hexdigest(), files.values())
    return dict(zip(files, hashes, strict=True))


def _image_folder(root: Path, bar: Bar, frame: Frame | None, unsorted: bool) -> Source:
    """Class folders in ``root/train``, beside which all else is copied, or in ``root``."""
    part = root / "train" if (root / "train").is_dir() else root
    classes, listed = _labelled(part, unsorted)
    found = [file for file, _ in listed]
    names = [file.relative_to(root) for file in found]
    apart = UNSORTED if found[0].parent == part else ""  # from the contact sheet, which would be one of them
    targets = [name.parent / apart / f"{name.stem}.png" for name in names]
    for (one, first), (other, second) in pairwise(zip(names, targets, strict=True)):
        if first.parent == second.parent and first >= second:
            what = "the same name" if first == second else "another order"
            raise DataError(f"{one} and {other} in {root} would have {what} once they are .png; rename one of them")
    pictures = _read(list(map(str, found)), lambda row: found[row], bar, frame)
    files = {str(file.relative_to(root)): file for file in files_below(root)}
    copies = {name: file for name, file in files.items() if part != root and Path(name).parts[0] in ("val", "test")}
    return Source(
        "imagefolder",
        _dataset(root.resolve().name, classes, pictures, torch.tensor([label for _, label in listed])),
        (*found, *copies.values()),
        {str(target): _one_png(pictures, row) for row, target in enumerate(targets)},
        copies,
        {str(name): str(target) for name, target in zip(names, targets, strict=True) if name != target},
        tuple(sorted(files.keys() - copies.keys() - {str(name) for name in names})),
        {how: [str(names[row]) for row in rows] for how, rows in pictures.changes.items()},
    )


def _labelled(part: Path, unsorted: bool) -> tuple[tuple[str, ...], Labelled]:
    """The classes of ``part`` that have images, and the images."""
    names = class_names({"train": part})
    listed = list_images(part, names)
    if listed:
        present = sorted({label for _, label in listed})  # a folder without images is no class
        return tuple(names[label] for label in present), [(file, present.index(label)) for file, label in listed]
    flat = [file for file in sorted(part.iterdir()) if visible(file.name) and is_image(file) and file.is_file()]
    if not flat:
        raise DataError(f"no images in {part}; {EXPECTED}")
    if not unsorted:
        raise DataError(
            f"the {len(flat):,} images in {part} lie in no class folders, and this defense goes by classes; put those "
            "of each class into a folder with its name"
        )
    return (UNSORTED,), [(file, 0) for file in flat]


def _one_png(pictures: Pictures, row: int) -> Callable[[Pixels, Advance], bytes]:
    return lambda images, advance: pictures.png(row, images[row])


def _npz(file: Path) -> Source:
    arrays = read_arrays(file)
    train = pair(arrays, "train", file)
    if len(train) == 0:
        raise DataError(f"{file}: x_train is empty; there is nothing to protect")
    classes = numbered(max(1, int(train.labels.max()) + 1), str(file))
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
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
            for name, array in {**arrays, "x_train": np.ascontiguousarray(x)}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)
        advance(len(images))
        return buffer.getvalue()

    note = "floats count as the nearest of 256 levels; those whose level stays are kept as they were" if floats else ""
    return Source("npz", data, (file,), {file.name: content}, note=note)


def _is_packed(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def _parquet_folder(root: Path, bar: Bar, frame: Frame | None) -> Source:
    """``train*.parquet`` in ``root``; Parquet files of other splits are copied."""
    files = sorted(root.glob("*.parquet"))
    train = [file for file in files if file.name.startswith("train")]
    if not train:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{root} has {names}, none of which starts with train; name the training file itself")
    copies = {file.name: file for file in files if file not in train}
    rest = {str(file.relative_to(root)) for file in files_below(root)} - copies.keys() - {file.name for file in train}
    return _parquet(root, train, copies, tuple(sorted(rest)), bar, frame)


def _parquet(
    root: Path, files: Sequence[Path], copies: Mapping[str, Path], left_out: tuple[str, ...], bar: Bar,
    frame: Frame | None,
) -> Source:  # fmt: skip
    """The rows of ``files``, which hold an image ``{bytes, path}`` and a label each."""
    tables = [read_table(file, IMAGE, LABEL) for file in files]
    entries: list[dict[str, Any]] = []
    names, labels, rows = list[str](), list[int](), list[slice]()
    for file, (table, image, label) in zip(files, tables, strict=True):
        rows.append(slice(len(entries), len(entries) + table.num_rows))
        names += [f"{file}, row {row}" for row in range(table.num_rows)]
        entries += [entry or {} for entry in table.column(image).to_pylist()]
        labels += table.column(label).to_pylist()
    if not entries:
        raise DataError(f"{files[0]} has no rows; there is nothing to protect")
    pictures = _read(names, lambda row: io.BytesIO(entries[row].get("bytes") or b""), bar, frame)
    paths = [entry.get("path") for entry in entries]
    renamed = Counter(Path(path).suffix for path in paths if path and _as_png(path) != path)
    return Source(
        "parquet",
        _dataset(root.resolve().name, _class_names(labels, paths, str(files[0])), pictures, torch.tensor(labels)),
        (*files, *copies.values()),
        {
            file.name: _rewrite(file, table, image, pictures, part)
            for file, (table, image, _), part in zip(files, tables, rows, strict=True)
        },
        copies,
        {suffix: f".png in {count:,} paths of the table" for suffix, count in sorted(renamed.items())},
        left_out,
        {how: [names[row] for row in found] for how, found in pictures.changes.items()},
    )


def _rewrite(
    file: Path, table: Any, column: str, pictures: Pictures, rows: slice
) -> Callable[[Pixels, Advance], bytes]:
    """What writes ``table`` with the protected images of ``rows``, compressed and cut into groups as ``file`` is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def content(images: Pixels, advance: Advance) -> bytes:
        place = table.column_names.index(column)
        kind = table.schema.field(place)
        coded = in_parallel(lambda row: pictures.png(row, images[row]), range(rows.start, rows.stop), advance)
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


def _class_names(labels: Sequence[int], paths: Sequence[str | None], where: str) -> tuple[str, ...]:
    """The folder in which all paths of a class, and of no other, are; or else its number."""
    folders: dict[int, set[str]] = {}
    for label, path in zip(labels, paths, strict=True):
        folders.setdefault(label, set()).add(Path(path or "").parent.name)
    shared = Counter(name for names in folders.values() for name in names)
    named = {label: min(names) for label, names in folders.items() if len(names) == 1 and shared[min(names)] == 1}
    return tuple(named.get(label) or number for label, number in enumerate(numbered(max(1, max(labels) + 1), where)))


def _dataset(name: str, classes: tuple[str, ...], pictures: Pictures, labels: torch.Tensor) -> Dataset:
    """All images as training images; the augmentations are those of :mod:`bench.data` for photographs."""
    train = Split(torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2).contiguous(), labels)
    nothing = train.subset(slice(0))
    return Dataset(name, classes, train, nothing, nothing, flip=True, shift=pictures.pixels.shape[1] // 8)


def _read(names: Sequence[str], load: Callable[[int], Path | io.BytesIO], bar: Bar, frame: Frame | None) -> Pictures:
    bar.step("looking at the images", 2 * len(names), "images")
    return read_pictures(names, load, frame=frame, advance=bar.advance)


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise DataError(f"{file} is not a file; check --in")
    return file


def _refuse_leaving(root: Path) -> None:
    """Whether all visible links below ``root`` lead to something below it, so that nothing else is released.

    Raises:
        DataError: they do not, by name.
    """
    home, leaving = root.resolve(), []
    for place, inner, names in os.walk(root):
        inner[:] = filter(visible, inner)
        for path in (Path(place, name) for name in sorted((*inner, *filter(visible, names)))):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(home):
                leaving.append(f"{path.relative_to(root)} -> {path.readlink()}")
    if leaving:
        more = f" and {len(leaving) - 3:,} more" if len(leaving) > 3 else ""
        raise DataError(
            f"links in {root} lead out of it ({', '.join(leaving[:3])}{more}), and what is behind them would be "
            "released; replace them by copies, or remove them"
        )
