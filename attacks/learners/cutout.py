"""Cutout: a hole in every image, so that no small part of it can carry the class alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.protocols import Job
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access
from bench.training import Trainer


@attacks("cutout")
@dataclass(frozen=True, kw_only=True)
class Cutout(Trainer):
    """Train on images with ``holes`` black squares, after the usual augmentation.

    The centre of a square is any pixel with equal probability; what lies beyond the border is lost.

    Args:
        side: of a square, as a share of the image's shorter side: one half is 16 pixels on CIFAR.

    Source:
        DeVries and Taylor, 2017, arXiv:1708.04552.
    """

    side: float = 0.5
    holes: int = 1

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "DeVries and Taylor, 2017, arXiv:1708.04552"

    def __post_init__(self) -> None:
        if not 0 < self.side <= 1:
            raise ConfigError(f"side is {self.side}; it is a share of the image's shorter side, above 0 and at most 1")
        if self.holes < 1:
            raise ConfigError(f"holes is {self.holes}; cut at least one")

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        return self.train(build, data, job, perturb=self.perturb)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Tensor:
        """The images (B, C, H, W) with their holes."""
        side = torch.full_like(y, max(1, round(self.side * min(x.shape[2:]))))
        for hole in range(self.holes):
            x = x.masked_fill(boxes(x, side, side, rng.fork(hole)), 0)
        return x


def boxes(x: Tensor, height: Tensor, width: Tensor, rng: SampleRng) -> Tensor:
    """Which pixels (B, 1, H, W) bool lie in a box around a random pixel of each image, cut at the border.

    ``height`` and ``width`` (B,) int64 count pixels; the centre is the pixel at half of each, rounded down.
    """
    rows = _interval(height, x.shape[2], rng.fork("row"))
    columns = _interval(width, x.shape[3], rng.fork("column"))
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _interval(length: Tensor, size: int, rng: SampleRng) -> Tensor:
    """(B, size) bool: ``length`` (B,) places around a random one."""
    start = rng.integers(size, 1) - length[:, None] // 2  # (B, 1)
    place = torch.arange(size, device=length.device)
    return (place >= start) & (place < start + length[:, None])
