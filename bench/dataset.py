"""What a data set is, wherever it came from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor

from bench.errors import DataError

MOST_CLASSES = 100_000  # more, and a label is no class number but an identifier


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    ``images`` (N, C, H, W) is uint8 grey levels, or float32 in [0, 1] where the source has no levels; ``labels`` (N,)
    is int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def pixels(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """A copy of the images at ``rows`` as float32 (n, C, H, W) in [0, 1]."""
        images = self.images[rows]
        if images.dtype == torch.uint8:
            return images.float() / 255
        return images.clone() if isinstance(rows, slice) else images  # a slice alone shares memory

    def __reduce__(self) -> tuple[type["Split"], tuple[Tensor, Tensor]]:
        """What goes to another process: of a part of larger tensors, no more than the part."""
        return type(self), (_alone(self.images), _alone(self.labels))

    def subset(self, rows: Tensor | slice) -> "Split":
        """The samples at ``rows``, in that order."""
        return Split(self.images[rows], self.labels[rows])

    def clone(self) -> "Split":
        """The same samples in memory of their own."""
        return Split(self.images.clone(), self.labels.clone())

    def to(self, device: torch.device | str) -> "Split":
        """The same split on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))

    def fingerprint(self) -> str:
        """A hash of every pixel and label."""
        digest = sha256(str((self.images.dtype, tuple(self.images.shape))).encode())
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits. Defenses tune on ``calibration``; nothing but the final evaluation touches ``test``.

    ``train`` and ``calibration`` may be empty where a source has none; ``flip`` and ``shift`` say which standard
    augmentations leave the meaning of an image alone (mirroring, and moving by up to ``shift`` pixels).

    Raises:
        DataError: images outside [0, 1], labels outside the classes, or shapes that do not fit together.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    calibration: Split
    test: Split
    flip: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) for name in self.classes):
            raise DataError(f"{self.name}: classes are {self.classes!r}; expected the name of each, as text")
        for part, split in self._splits().items():
            _check(split, len(self.classes), f"{self.name}, {part} split")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the three splits."""
        return sha256("".join(split.fingerprint() for split in self._splits().values()).encode()).hexdigest()

    def lent(self) -> "Dataset":
        """What components are given: train and calibration images in memory of their own, and no test images."""
        unseen = self.test.subset(slice(0)).clone()
        return replace(self, train=self.train.clone(), calibration=self.calibration.clone(), test=unseen)

    def released(self, train: Split) -> "Dataset":
        """This data set with another training split, as a data defense releases it."""
        return replace(self, train=train)

    def restricted(self, classes: Sequence[str]) -> "Dataset":
        """The samples of ``classes`` alone, numbered in this order.

        Raises:
            DataError: fewer than two, one twice, or one that is not there.
        """
        unknown = [name for name in classes if name not in self.classes]
        if len(set(classes)) < max(2, len(classes)) or unknown:
            told = f"{self.name} has no class {unknown[0]!r}" if unknown else f"{len(set(classes))} different classes"
            raise DataError(f"classes {'+'.join(classes)}: {told}; name two or more of {', '.join(self.classes)}")
        number = torch.full((len(self.classes),), -1)
        number[[self.classes.index(name) for name in classes]] = torch.arange(len(classes))

        def of_them(split: Split) -> Split:
            labels = number[split.labels]
            return Split(split.images[labels >= 0], labels[labels >= 0])

        train, calibration, test = map(of_them, (self.train, self.calibration, self.test))
        return replace(self, classes=tuple(classes), train=train, calibration=calibration, test=test)

    def specimens(self, count: int) -> Tensor:
        """At most ``count`` real images (n, C, H, W) in [0, 1] that no figure is taken of, where there are others."""
        seen = next((split for split in (self.calibration, self.train) if len(split)), self.test)
        return seen.pixels(slice(0, count))

    def _splits(self) -> dict[str, Split]:
        return {"train": self.train, "calibration": self.calibration, "test": self.test}


def _alone(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy of it where the memory that it lies in holds more."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def numbered(count: int, where: str) -> tuple[str, ...]:
    """``count`` classes under their numbers.

    Raises:
        DataError: none, or so many that the labels in ``where`` can be no class numbers.
    """
    if not 1 <= count <= MOST_CLASSES:
        raise DataError(f"{where} has {count:,} classes; expected 1 to {MOST_CLASSES:,}, with labels counted from 0")
    return tuple(map(str, range(count)))


def grey_levels(split: Split) -> Tensor:
    """The images of ``split`` as uint8, float ones rounded to the nearest of 256 levels."""
    images = split.images
    return images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)


def _check(split: Split, classes: int, where: str) -> None:
    if not isinstance(split, Split):
        raise DataError(f"{where}: a {type(split).__name__}; expected a bench.dataset.Split of images and labels")
    images, labels = split.images, split.labels
    for what, tensor in (("images", images), ("labels", labels)):
        if not isinstance(tensor, Tensor):
            raise DataError(f"{where}: {what} are a {type(tensor).__name__}; expected a torch.Tensor")
    if images.ndim != 4 or len(images) != len(labels):
        raise DataError(
            f"{where}: images {tuple(images.shape)} and labels {tuple(labels.shape)}; "
            "expected images (N, C, H, W) and one label for each"
        )
    if min(images.shape[1:]) < 1:
        raise DataError(f"{where}: images of shape {tuple(images.shape[1:])} have no pixels")
    if images.dtype not in (torch.uint8, torch.float32):
        raise DataError(f"{where}: images are {images.dtype}; store uint8 levels or float32 in [0, 1]")
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise DataError(
            f"{where}: labels {tuple(labels.shape)} are {labels.dtype}; expected (N,) int64, the class of each image"
        )
    if len(images) == 0:
        return
    if images.dtype == torch.float32:
        low, high = images.aminmax()
        if not (low.isfinite() and high.isfinite()):  # a NaN is both
            broken = int((~images.isfinite()).flatten(1).any(dim=1).sum())
            raise DataError(
                f"{where}: {broken:,} of {len(images):,} images hold NaN or infinity; leave them out, or look for what "
                "made them"
            )
        if low < 0 or high > 1:
            remedy = "undo what normalises them; models do that inside" if low < 0 else "divide grey levels by 255"
            raise DataError(f"{where}: pixels from {low:g} to {high:g}; expected [0, 1] ({remedy})")
    low, high = labels.aminmax()
    if low < 0 or high >= classes:
        raise DataError(f"{where}: labels from {low} to {high}; expected 0 to {classes - 1}")
