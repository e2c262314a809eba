"""Gaussian noise in training: a perturbation that is smaller than the noise drowns in it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.protocols import Job
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access
from bench.training import Trainer


@attacks("gaussian-noise")
@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Trainer):
    """Train on images with normal noise, new in each epoch, clamped to [0, 1].

    Args:
        sigma: standard deviation on the pixel scale; the default is twice the usual radius of a protection.

    Source:
        Bishop, 1995, for what it does to training.
    """

    sigma: float = 16 / 255

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Bishop, Neural Computation 7, 1995, doi:10.1162/neco.1995.7.1.108"

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise ConfigError(f"sigma is {self.sigma}; it is a deviation on the pixel scale, positive and finite")

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        return self.train(build, data, job, perturb=self.perturb)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Tensor:
        """The images (B, C, H, W) with their noise."""
        return (x + self.sigma * rng.normal(*x.shape[1:])).clamp(0, 1)
