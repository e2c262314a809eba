"""Gaussian training: what makes a network of use to randomized smoothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

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

    sigma: Positive = 0.25

    stage: ClassVar[Stage] = "training"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Cohen et al., ICML 2019, arXiv:1902.02918"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        return self.train(build, data, job, perturb=self.perturb)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Tensor:
        """The images (B, C, H, W) under noise."""
        return x + self.sigma * rng.normal(*x.shape[1:])
