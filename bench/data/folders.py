"""Image files in one folder for each class."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from bench.data.holdout import find, held_out
from bench.data.images import SUFFIXES, Frame, read_pictures
from bench.dataset import Dataset, Split
from bench.errors import DataError
from bench.ranges import Few
from bench.registry import added, datasets

HIDDEN = frozenset({"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir"})
EXPECTED = "expected class/name.png, .jpg, .tif, .webp, .bmp, .ppm or .pgm"
Labelled = list[tuple[Path, int]]  # image files and their labels


@datasets("imagefolder")
@dataclass(frozen=True)
class ImageFolder:
    """Images in ``path/{train,val,test}/class/``, or in ``path/class/``, where all are test images.

    The test images are those in ``test``, or in ``val`` where there is no ``test``. With both, ``val`` calibrates;
    otherwise a tenth of the training images does (at most 1,000), spread evenly over the files. The shorter side is
    resized to ``size`` pixels (bilinear, antialiased) and the centre is cropped; smaller images are refused unless
    ``enlarge=true``. Classes are the sorted folder names; folders inside them are searched, too, as torchvision does,
    and hidden ones left out. Transparent images are refused; for the rest see :mod:`bench.data.images`. Everything is
    held in memory, ``3 * size * size`` bytes for each image.
    """

    path: str
    size: Few = 224
    enlarge: bool = added(False)

    version: ClassVar[int] = 2
    paper: ClassVar[str] = ""

    def __call__(self, data_dir: Path | None) -> Dataset:
        """Load the folder, looked for in the working directory and then in ``data_dir``.

        Raises:
            DataError: no such folder, no images in it, or an image that cannot be read.
        """
        frame = Frame(self.size, enlarge=self.enlarge)
        return _load(find(self.path, data_dir, "imagefolder"), frame, with_train=True)


@datasets("imagenet")
@dataclass(frozen=True)
class ImageNet:
    """ImageNet (ILSVRC 2012) laid out as for ``imagefolder``, with 1,000 class folders.

    The shorter side is resized to ``resize`` pixels, also where it is smaller, as published models are evaluated, and
    the centre of ``size`` pixels cropped. The training images (some 190 GB once decoded) are read only with
    ``train=true``; without it, only those that calibrate.
    """

    path: str = "imagenet"
    size: Few = 224
    resize: Few = 256
    train: bool = False

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Russakovsky et al., 2015, arXiv:1409.0575"

    def __call__(self, data_dir: Path | None) -> Dataset:
        """Load the folder, looked for in the working directory and then in ``data_dir``.

        Raises:
            DataError: no such folder, not 1,000 classes, no images, or an image that cannot be read.
        """
        frame = Frame(self.size, self.resize, enlarge=True)
        folder = find(self.path, data_dir, "imagenet")
        classes = class_names(_parts(folder))
        if len(classes) != 1000:  # a subset would number its classes unlike every published model
            raise DataError(f"{folder} has {len(classes)} class folders, ImageNet 1000; use imagefolder for a subset")
        return _load(folder, frame, with_train=self.train)


def _load(folder: Path, frame: Frame, *, with_train: bool) -> Dataset:
    parts = _parts(folder)
    classes = class_names(parts)
    files = {part: list_images(path, classes) for part, path in parts.items()}
    if not files["test"]:
        raise DataError(f"no images in {parts['test']}; {EXPECTED}")
    train = files.get("train", [])
    if "val" in files:
        calibration = files["val"]
    else:
        count = held_out(len(train))
        # The files are sorted by class, so the last ones would be of one class.
        rows = {index * len(train) // count for index in range(count)}
        calibration = [train[row] for row in sorted(rows)]
        train = [file for row, file in enumerate(train) if row not in rows]
    return Dataset(
        name=folder.resolve().name,
        classes=classes,
        train=_decode_all(train if with_train else [], frame),
        calibration=_decode_all(calibration, frame),
        test=_decode_all(files["test"], frame),
        flip=True,
        shift=frame.size // 8,  # as 4 pixels are for CIFAR
    )


def _parts(folder: Path) -> dict[str, Path]:
    """The folder of each split; there is always one for ``test``, and ``val`` only beside it."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one folder for each class in it")
    parts = {part: folder / part for part in ("train", "val", "test") if (folder / part).is_dir()}
    if not parts:
        return {"test": folder}
    if "test" not in parts:
        if "val" not in parts:
            raise DataError(f"{folder} has train/ but neither val/ nor test/; add one of them")
        parts["test"] = parts.pop("val")
    return parts


def class_names(parts: Mapping[str, Path]) -> tuple[str, ...]:
    """The names of the class folders of all ``parts``, sorted: their places are the labels."""
    found = (child for part in parts.values() for child in part.iterdir())
    return tuple(sorted({child.name for child in found if visible(child.name) and child.is_dir()}))


def list_images(part: Path, classes: Sequence[str]) -> Labelled:
    """The image files below the class folders of ``part``: by class, then by folder, then by name."""
    return [
        (file, label)
        for label, name in enumerate(classes)
        if (part / name).is_dir()
        for file in files_below(part / name)
        if is_image(file)
    ]


def is_image(file: Path) -> bool:
    """Whether its name says so."""
    return file.suffix.lower() in SUFFIXES


def visible(name: str) -> bool:
    """Whether a file or folder of this name is its owner's, and not what systems and tools leave behind."""
    return not name.startswith(".") and name.lower() not in HIDDEN


def files_below(root: Path) -> Iterator[Path]:
    """All visible files below ``root`` in torchvision's order: by folder, then by name.

    Links are followed, but for those to a folder that they lie in, and what is no plain file is left out.
    """
    folders: list[tuple[str, list[str]]] = []
    for place, inner, names in os.walk(root, followlinks=True):
        around = {os.path.realpath(folder) for folder in (Path(place), *Path(place).parents)}
        inner[:] = [name for name in inner if visible(name) and os.path.realpath(Path(place, name)) not in around]
        folders.append((place, sorted(filter(visible, names))))
    for place, names in sorted(folders):
        yield from (file for name in names if (file := Path(place, name)).is_file())


def _decode_all(files: Labelled, frame: Frame) -> Split:
    names = [str(file) for file, _ in files]
    pictures = read_pictures(names, lambda row: files[row][0], frame=frame, colour=True)
    if pictures.alpha:
        row = next(iter(pictures.alpha))
        raise DataError(
            f"{len(pictures.alpha):,} of {len(files):,} images are transparent in places, such as {names[row]}, and "
            "what shows there depends on the viewer; lay them on a background first"
        )
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return Split(torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2).contiguous(), labels)
