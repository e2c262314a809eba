"""Gaussian training: what makes a network of use to randomized smoothing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.dataset import Dataset
from bench.protocols import Job, Stage
from bench.ranges import Positive
from bench.registry import defenses
from bench.rng import SampleRng
from bench.training import Trainer


@defenses("gaussian-training")
@dataclass(frozen=True, kw_only=True)
class GaussianTraining(Trainer):
    """Train on ``x + sigma * N(0, I)``, with new noise for each image in each epoch.

    It is added before the network normalises, and is not cut to the box [0, 1]: certifiers draw it like that, too.

    Source:
        Cohen, Rosenfeld and Kolter, ICML 2019, arXiv:1902.02918, section 3.3.
    """

    sigma: Positive

    stage: ClassVar[Stage] = "training"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Cohen et al., ICML 2019, arXiv:1902.02918"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        return self.train(build, data, job, objective=self.losses)

    def losses(self, model: nn.Module, x: Tensor, target: Tensor, rng: SampleRng) -> Iterator[Tensor]:
        """One step on the cross-entropy of a noisy copy of each of the images ``x`` (B, C, H, W)."""
        yield F.cross_entropy(model(noisy(x, self.sigma, rng, 1)), target)


def noisy(x: Tensor, sigma: float, rng: SampleRng, copies: int) -> Tensor:
    """So many ``copies`` of the images ``x`` (B, C, H, W), each under noise of its own: (copies * B, C, H, W)."""
    return torch.cat([x + sigma * rng.fork(copy).normal(*x.shape[1:]) for copy in range(copies)])
