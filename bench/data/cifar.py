"""CIFAR-10 and CIFAR-100, from Parquet files in the Hugging Face layout or from torchvision's own files."""

import io
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features
from PIL import __version__ as pillow

from bench.data.holdout import hold_out, require_folder
from bench.data.images import COLOUR, GREY, in_parallel
from bench.data.tables import read_table
from bench.dataset import Dataset, Split
from bench.errors import ConfigError, DataError, StoreError
from bench.registry import added, datasets
from bench.system.extras import library
from bench.system.files import cache_folder, slug
from bench.system.sealed import keep_tensors, kept_tensors

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# fmt: off
CIFAR100_CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)
# fmt: on
SIDE = 32  # pixels


@dataclass(frozen=True, kw_only=True)
class _Cifar:
    """What both have in common."""

    train: int | None = added(None)
    calibrate: bool = added(True)
    classes: str = added("")

    def __post_init__(self) -> None:
        if self.train is not None and self.train < 1:
            raise ConfigError(f"train is {self.train}; train on at least one image, or leave it out for all")

    def limited(self, data: Dataset) -> Dataset:
        """``data`` with its samples of ``classes``, and of these the first ``train`` training images."""
        if self.classes:
            data = data.restricted(self.classes.split("+"))
        if self.train is None:
            return data
        if self.train > len(data.train):
            raise DataError(f"train is {self.train}; {data.name} has {len(data.train)} training images, ask for fewer")
        return replace(data, train=data.train.subset(slice(self.train)))


@datasets("cifar10")
@dataclass(frozen=True, kw_only=True)
class Cifar10(_Cifar):
    """60,000 colour images of 32x32 pixels in ten classes; the last 1,000 of the training images calibrate.

    Args:
        train: so many of the training images, the first; all by default.
        calibrate: off to train on all 50,000, as papers on training data do; then nothing is there to tune on.
        classes: of which classes, such as ``airplane+automobile``; all by default.
    """

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Krizhevsky, 2009, Learning Multiple Layers of Features from Tiny Images"

    def __call__(self, data_dir: Path | None) -> Dataset:
        """Load it from ``data_dir/cifar10/*.parquet`` or ``data_dir/cifar-10-batches-py``.

        Raises:
            DataError: no such files and no way to download them, or files that are broken.
        """
        files = "cifar10", CIFAR10_CLASSES, "label", "cifar-10-batches-py"
        return self.limited(_load(*files, data_dir, self.calibrate))


@datasets("cifar100")
@dataclass(frozen=True, kw_only=True)
class Cifar100(_Cifar):
    """60,000 colour images of 32x32 pixels in a hundred (fine) classes; split and limited as for ``cifar10``."""

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Krizhevsky, 2009, Learning Multiple Layers of Features from Tiny Images"

    def __call__(self, data_dir: Path | None) -> Dataset:
        """Load it from ``data_dir/cifar100/*.parquet`` or ``data_dir/cifar-100-python``.

        Raises:
            DataError: no such files and no way to download them, or files that are broken.
        """
        files = "cifar100", CIFAR100_CLASSES, "fine_label", "cifar-100-python"
        return self.limited(_load(*files, data_dir, self.calibrate))


def _load(
    name: str, classes: tuple[str, ...], label: str, batches: str, data_dir: Path | None, calibrate: bool
) -> Dataset:
    folder = require_folder(data_dir, name)
    files = {part: folder / name / f"{part}-00000-of-00001.parquet" for part in ("train", "test")}
    if any(file.exists() for file in files.values()):
        train, test = (_from_parquet(files[part], label) for part in ("train", "test"))
    else:
        train, test = (_from_torchvision(name, folder, batches, part == "train") for part in ("train", "test"))
    train, calibration = hold_out(train) if calibrate else (train, train.subset(slice(0)))
    return Dataset(name, classes, train, calibration, test, flip=True, shift=4)


def _from_parquet(file: Path, label: str) -> Split:
    """The images in ``file``, decoded once and then kept in the cache folder, bound to the content of ``file``."""
    if not file.is_file():
        raise DataError(f"{file} is missing, though its other half is there; copy both the train and the test file")
    try:
        content = sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}); check its rights") from None
    # Another decoder may round otherwise.
    recipe = f"{content} {label} pillow {pillow} jpeg {features.version('jpg')} zlib {features.version('zlib')}"
    path = cache_folder() / f"{slug(file.stem)}-{sha256(recipe.encode()).hexdigest()[:32]}.safetensors"
    kept = kept_tensors(path, recipe)
    if kept is None:
        split = _decoded(file, label)
        kept = {"images": split.images, "labels": split.labels}
        with suppress(StoreError):  # a cache that cannot be written costs time alone
            keep_tensors(path, kept, recipe)
    return Split(kept["images"], kept["labels"])


def _decoded(file: Path, label: str) -> Split:
    table, image, _ = read_table(file, ("img",), (label,))
    coded = [entry and entry["bytes"] for entry in table.column(image).to_pylist()]
    labels = table.column(label).to_numpy().astype(np.int64)
    images = np.empty((len(coded), SIDE, SIDE, 3), dtype=np.uint8)

    def decode(start: int) -> None:
        for row in range(start, min(start + 1000, len(coded))):
            images[row] = _decode(coded[row], f"{file}, row {row}")

    in_parallel(decode, range(0, len(coded), 1000))
    return _split(images, labels)


def _decode(coded: bytes | None, where: str) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(coded or b""), formats=("JPEG", "PNG")) as image:
            if image.mode not in GREY + COLOUR:
                raise ValueError(f"its pixels are {image.mode}, not of 8 bits a channel")
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # bytes from anywhere meet decoders that raise whatever they trip over
        raise DataError(f"{where}: cannot decode the image ({type(error).__name__}); download the file again") from None
    if pixels.shape != (SIDE, SIDE, 3):
        height, width, _ = pixels.shape
        raise DataError(f"{where}: the image is {width}x{height}; expected {SIDE}x{SIDE} (imagefolder takes any size)")
    return pixels


def _from_torchvision(name: str, folder: Path, batches: str, train: bool) -> Split:
    """torchvision compares the MD5 sum of every file with the published one before it unpickles any."""
    try:
        sources = library("torchvision.datasets", "zoo")
    except ConfigError as error:
        raise DataError(
            f"no {name}/{{train,test}}-00000-of-00001.parquet in {folder}, "
            f"and any other files are torchvision's to read: {error}"
        ) from error
    source: Any = {"cifar10": sources.CIFAR10, "cifar100": sources.CIFAR100}[name]
    present = (folder / batches).exists()
    try:
        with warnings.catch_warnings():
            # The pickles of 2009 hold dtypes in a form that NumPy 2.4 deprecates.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
            data = source(str(folder), train=train, download=not present)
    except Exception as error:  # whatever a download can raise
        if present:
            raise DataError(f"{folder / batches} is damaged ({_line(error)}); remove it and download again") from error
        raise DataError(
            f"no {name} in {folder}, and it cannot be downloaded ({_line(error)}); put "
            f"{name}/{{train,test}}-00000-of-00001.parquet or {batches}/ there, or name another folder with --data-dir"
        ) from error
    return _split(data.data, np.asarray(data.targets, dtype=np.int64))


def _split(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Split:
    """A split from images (N, H, W, C)."""
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
