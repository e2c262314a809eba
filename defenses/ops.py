"""OPS, the one-pixel shortcut: one pixel tells the class, so a network learns that and nothing else."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.dataset import Dataset, Split, grey_levels
from bench.errors import ConfigError
from bench.protection import check_share, fitting, merge, protected_rows
from bench.protocols import Job, Stage
from bench.registry import added, defenses
from bench.threat import Norm

CHUNK = 1024  # images squared at a time, to bound memory


@defenses("ops")
@dataclass(frozen=True, kw_only=True)
class OnePixelShortcut:
    """Give all training images of a class the same ``pixels`` pixels, in colours far from what they show there.

    With a ``share`` below 1, only so many of the images are protected, and the pixels are found among them.

    Source:
        Wu et al., ICLR 2023, arXiv:2205.12141; the score and the greedy order are those of the released ``perturb.py``,
        as an exact search in one pass over the images (see :func:`stability`).
    """

    pixels: int = 1
    share: float = added(1.0)

    stage: ClassVar[Stage] = "data"
    norm: ClassVar[Norm] = "l0"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Wu et al., ICLR 2023, arXiv:2205.12141"

    def __post_init__(self) -> None:
        if self.pixels < 1:
            raise ConfigError(f"pixels is {self.pixels}; a shortcut takes at least one")
        check_share(self.share)

    @property
    def eps(self) -> float:
        """At most so many pixels change (fewer where an image has the colour already)."""
        return float(self.pixels)

    def __call__(self, data: Dataset, job: Job) -> Split:
        """The training split to release, uint8; ``job`` draws a share and has no other part in it."""
        rows = protected_rows(data.train, self.share, job)
        images, labels = grey_levels(data.train)[rows], data.train.labels[rows]
        shortcuts = find_shortcuts(images, labels, len(data.classes), self.pixels)
        return merge(data.train, rows, shortcuts.write(images, labels))


@dataclass(frozen=True)
class Shortcuts:
    """The pixels that stand for each class.

    ``position`` (K, P) int64 counts pixels row by row, ``colour`` (K, P) int64 is a code as in :func:`colours`, and
    ``score`` (K, P) float64 is the stability of each, best first.
    """

    position: Tensor
    colour: Tensor
    score: Tensor

    def write(self, images: Tensor, labels: Tensor) -> Tensor:
        """A copy of ``images`` (N, C, H, W) uint8 in which each has the pixels of its class in ``labels`` (N,)."""
        channels = images.shape[1]
        levels = 255 * colours(channels).to(images)[self.colour[labels]]           # (N, P, C)
        places = self.position[labels][:, None].expand(-1, channels, -1)           # (N, C, P)
        return images.flatten(2).scatter(2, places, levels.transpose(1, 2)).view_as(images)


def find_shortcuts(images: Tensor, labels: Tensor, classes: int, pixels: int = 1) -> Shortcuts:
    """The most stable (position, colour) pairs of each class, none of them used by two classes.

    Classes choose in order 0, 1, ...; within a class the positions differ. Equal scores go to the smaller position,
    then to the smaller colour code.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, below ``classes``.

    Raises:
        ConfigError: no unused pair is left.
    """
    channels, height, width = images.shape[1:]
    used = torch.zeros(height * width, 2**channels, dtype=torch.bool)
    chosen = []
    for label in range(classes):
        scores = stability(images[labels == label]).cpu().masked_fill(used, -1)
        for _ in range(pixels):
            score, pair = scores.flatten().max(dim=0)
            position, colour = divmod(int(pair), 2**channels)
            if score < 0:
                raise ConfigError(
                    f"class {label} has no free pixel for a shortcut of {pixels} in {height}x{width} images; use fewer"
                )
            used[position, colour] = True
            scores[position] = -1
            chosen.append((position, colour, float(score)))
    position, colour, score = (torch.tensor(column).view(classes, pixels) for column in zip(*chosen, strict=True))
    return Shortcuts(position, colour, score.double())


def stability(images: Tensor) -> Tensor:
    """How far, and how evenly, each pixel would move if it took each of the extreme colours.

    The score is mean over standard deviation of ``|colour - x|``, pooled over images and channels. An extreme colour
    makes ``|colour - x|`` either x or 255 - x, so the sums of x and of x squared give all scores, in exact integers::

        A = sum |colour - x|,  Q = sum |colour - x|^2,  score = A / sqrt(C n Q - A^2)

    Args:
        images: (n, C, H, W) uint8, of one class.

    Returns:
        (H * W, 2^C) float64, infinite where every image moves by the same amount, 0 where none moves.
    """
    count, channels = images.shape[:2]
    x, x2 = (total.flatten(1) for total in _power_sums(images))     # (C, H W) each
    bright = colours(channels).to(images.device)[:, :, None]        # (2^C, C, 1)
    a = torch.where(bright, 255 * count - x, x).sum(dim=1)          # (2^C, H W)
    q = torch.where(bright, 255**2 * count - 510 * x + x2, x2).sum(dim=1)
    variance = channels * count * q - a.square()
    return (a.double() / variance.double().sqrt()).nan_to_num(nan=0, posinf=torch.inf).T


def colours(channels: int) -> Tensor:
    """The extreme colours (2^C, C) bool, by code: for RGB 0 is black, 1 blue, 2 green, 4 red, 7 white."""
    bits = torch.arange(channels - 1, -1, -1)
    return (torch.arange(2**channels)[:, None] >> bits & 1).bool()


def _power_sums(images: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the images of x and of x squared, both (C, H, W) int64."""
    shape = images.shape[1], images.shape[2], images.shape[3]
    sums = squares = torch.zeros(shape, dtype=torch.int64, device=images.device)
    for chunk in images.split(fitting(CHUNK, shape)):
        x = chunk.int()
        sums, squares = sums + x.sum(dim=0), squares + x.square().sum(dim=0)  # int32 sums become int64
    return sums, squares
