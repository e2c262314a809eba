"""Image files in one folder for each class."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bench.data.holdout import find, held_out
from bench.dataset import Dataset, Split
from bench.errors import DataError
from bench.ranges import Few
from bench.registry import datasets

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
Labelled = list[tuple[Path, int]]  # image files and their labels


@datasets("imagefolder")
@dataclass(frozen=True)
class ImageFolder:
    """Images in ``path/{train,val,test}/class/``, or in ``path/class/``, where all are test images.

    The test images are those in ``test``, or in ``val`` where there is no ``test``. With both, ``val`` calibrates;
    otherwise a tenth of the training images does (at most 1,000), spread evenly over the files. The shorter side is
    resized to ``size`` pixels (bilinear, antialiased) and the centre is cropped. Classes are the sorted folder names.
    Everything is held in memory, ``3 * size * size`` bytes for each image.
    """

    path: str
    size: Few = 224

    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""

    def __call__(self, data_dir: Path | None) -> Dataset:
        """Load the folder, looked for in the working directory and then in ``data_dir``.

        Raises:
            DataError: no such folder, no images in it, or an image that cannot be read.
        """
        return _load(find(self.path, data_dir, "imagefolder"), self.size, self.size, with_train=True)


@datasets("imagenet")
@dataclass(frozen=True)
class ImageNet:
    """ImageNet (ILSVRC 2012) laid out as for ``imagefolder``, with 1,000 class folders.

    The shorter side is resized to ``resize`` pixels and the centre of ``size`` pixels cropped. The training images
    (some 190 GB once decoded) are read only with ``train=true``; without it, only those that calibrate.
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
        folder = find(self.path, data_dir, "imagenet")
        classes = class_names(_parts(folder))
        if len(classes) != 1000:  # a subset would number its classes unlike every published model
            raise DataError(f"{folder} has {len(classes)} class folders, ImageNet 1000; use imagefolder for a subset")
        return _load(folder, self.size, self.resize, with_train=self.train)


def _load(folder: Path, size: int, resize: int, *, with_train: bool) -> Dataset:
    if not 1 <= size <= resize:
        raise DataError(f"size is {size} and resize {resize}; expected 1 <= size <= resize")
    parts = _parts(folder)
    classes = class_names(parts)
    files = {part: list_images(path, classes) for part, path in parts.items()}
    if not files["test"]:
        raise DataError(f"no images in {parts['test']}; expected class/name.png, .jpg, .jpeg, .bmp or .webp")
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
        train=_decode_all(train if with_train else [], size, resize),
        calibration=_decode_all(calibration, size, resize),
        test=_decode_all(files["test"], size, resize),
        flip=True,
        shift=size // 8,  # as 4 pixels are for CIFAR
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
    return tuple(sorted({child.name for part in parts.values() for child in part.iterdir() if child.is_dir()}))


def list_images(part: Path, classes: Sequence[str]) -> Labelled:
    """The image files in the class folders of ``part``, by class and then by name."""
    return [
        (file, label)
        for label, name in enumerate(classes)
        if (part / name).is_dir()
        for file in sorted((part / name).iterdir())
        if file.suffix.lower() in SUFFIXES
    ]


def _decode_all(files: Labelled, size: int, resize: int) -> Split:
    images = np.empty((len(files), size, size, 3), dtype=np.uint8)

    def decode(row: int) -> None:
        images[row] = _decode(files[row][0], size, resize)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, range(len(files))))  # list() raises what a thread raised
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels)


def _decode(file: Path, size: int, resize: int) -> NDArray[np.uint8]:
    """The centre (size, size, 3) of an image whose shorter side was resized to ``resize`` pixels."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image ({type(error).__name__}); replace or remove it") from None
    short = min(image.size)
    width, height = (max(resize, round(side * resize / short)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)  # Pillow widens the filter where it shrinks
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
