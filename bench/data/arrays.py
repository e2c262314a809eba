"""One's own arrays, from a NumPy archive."""

import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.data.holdout import find, hold_out
from bench.dataset import Dataset, Split, numbered
from bench.errors import DataError
from bench.ranges import Few, Whole
from bench.registry import datasets
from bench.system.memory import check_memory

KEYS = ("x_train", "y_train", "x_test", "y_test")
DEFLATED = 1032  # deflate shrinks to no less than so many times
CHANNELS = (1, 3)  # the axis of this length holds the channels


@datasets("npz")
@dataclass(frozen=True)
class Npz:
    """Arrays ``x_test``, ``y_test`` and optionally ``x_train``, ``y_train`` of an ``.npz`` file.

    Images are (N, C, H, W) or (N, H, W, C) with one or three channels, uint8 levels or floats in [0, 1]; labels are
    integers from 0. The last tenth of the training images calibrates, at most 1,000. ``classes`` counts the classes
    where the largest label does not tell; ``flip`` and ``shift`` allow augmentations (see ``Dataset``).
    """

    path: str
    classes: Few | None = None
    flip: bool = False
    shift: Whole = 0

    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""

    def __call__(self, data_dir: Path | None) -> Dataset:
        """Load the file, looked for in the working directory and then in ``data_dir``.

        Raises:
            DataError: a missing or broken file, missing arrays, or shapes and types that cannot be meant.
        """
        file = find(self.path, data_dir, "npz")
        arrays = read_arrays(file, KEYS)
        test = pair(arrays, "test", file)
        if len(test) == 0:
            raise DataError(f"{file}: x_test is empty; a data set needs test images")
        train = pair(arrays, "train", file) if {"x_train", "y_train"} & arrays.keys() else test.subset(slice(0))
        if train.shape != test.shape or train.images.dtype != test.images.dtype:
            raise DataError(
                f"{file}: train images are {train.images.dtype} {train.shape}, test images {test.images.dtype} "
                f"{test.shape}; store both alike"
            )
        train, calibration = hold_out(train)
        top = max(int(split.labels.max()) for split in (train, calibration, test) if len(split))
        names = numbered(max(1, top + 1) if self.classes is None else self.classes, str(file))
        return Dataset(file.stem, names, train, calibration, test, flip=self.flip, shift=self.shift)


def read_arrays(file: Path, keys: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz`` file: those of ``keys`` that it has, or all.

    Raises:
        DataError: it cannot be read, holds what is not a plain array, or claims more than it holds or memory can.
    """
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            wanted = [key for key in (archive.files if keys is None else keys) if key in archive]
            if keys is not None and not wanted:
                raise DataError(
                    f"{file} holds {', '.join(archive.files)[:200] or 'no arrays'}; name the images x_test and their "
                    "labels y_test, those to train on x_train and y_train"
                )
            check_memory(sum(_claimed(archive.zip, key) for key in wanted), f"the arrays in {file}")
            return {key: archive[key] for key in wanted}
    except DataError:
        raise
    except Exception as error:  # bytes from anywhere meet parsers that raise whatever they trip over
        reason = (str(error).splitlines() or [""])[0][:200]
        raise DataError(
            f"{file} is not a readable .npz file of plain arrays ({type(error).__name__}: {reason}); "
            "write it with numpy.savez(file, x_test=..., y_test=...)"
        ) from error


def _claimed(archive: zipfile.ZipFile, key: str) -> int:
    """The bytes of an array by its own header, before any is read.

    Raises:
        ValueError: its entry cannot hold so many.
    """
    entry = archive.getinfo(f"{key}.npy" if f"{key}.npy" in archive.namelist() else key)
    with archive.open(entry) as opened:
        version = np.lib.format.read_magic(opened)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(opened)
        if dtype.hasobject:
            raise ValueError(f"{key} holds Python objects, not numbers")
        size = math.prod(shape) * dtype.itemsize
        if size != entry.file_size - opened.tell() or entry.file_size > DEFLATED * max(entry.compress_size, 1):
            raise ValueError(f"{key} claims {size:,} bytes, which it does not hold")
    return size


def pair(arrays: Mapping[str, NDArray[Any]], part: str, file: Path) -> Split:
    """The images ``x_part`` and labels ``y_part`` of the ``arrays`` in ``file``.

    Raises:
        DataError: one of them is missing, or has a shape or type that cannot be meant.
    """
    for key in (f"x_{part}", f"y_{part}"):
        if key not in arrays:
            raise DataError(f"{file} has no {key}, only {', '.join(arrays)}; add it")
    labels = arrays[f"y_{part}"]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{file}: y_{part} is {labels.dtype} {labels.shape}; expected integers (N,)")
    return Split(_images(arrays[f"x_{part}"], f"{file}: x_{part}"), torch.from_numpy(labels.astype(np.int64)))


def _images(images: NDArray[Any], where: str) -> Tensor:
    """Images as (N, C, H, W), uint8 or float32."""
    first, last = (images.ndim == 4 and images.shape[axis] in CHANNELS for axis in (1, 3))
    if first == last:
        problem = "both axis 1 and axis 3 could be channels" if first else "no axis holds the channels"
        raise DataError(f"{where} has shape {images.shape}, {problem}; expected (N, C, H, W) or (N, H, W, C), C 1 or 3")
    if images.dtype.kind != "f" and images.dtype != np.uint8:
        raise DataError(f"{where} is {images.dtype}; store uint8 levels or floats in [0, 1]")
    images = images if first else images.transpose(0, 3, 1, 2)
    wanted = np.uint8 if images.dtype == np.uint8 else np.float32
    return torch.from_numpy(np.ascontiguousarray(images, dtype=wanted))
