"""RandAugment: a few random operations on every image, so that few things in it can be relied on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attacks.learners.operations import OPERATIONS, operate
from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.protocols import Job
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access
from bench.training import Trainer

LEVELS = 9  # each is as likely, the first one ninth of the highest


@attacks("rand-augment")
@dataclass(frozen=True, kw_only=True)
class RandAugment(Trainer):
    """Train on images changed by ``operations`` of 15 operations, drawn with replacement, at random levels.

    They act after the usual augmentation. The released code of OPS shears about a corner and bicubically, here it is
    about the centre and bilinear; it fills with browns and rotates to one side, here with grey and to both.

    Args:
        probability: with which each of the drawn operations acts.

    Source:
        Cubuk et al., NeurIPS 2020, arXiv:1909.13719, in the variant that Wu et al., ICLR 2023, arXiv:2205.12141, use.
    """

    operations: int = 2
    probability: float = 0.5

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Cubuk et al., NeurIPS 2020, arXiv:1909.13719"

    def __post_init__(self) -> None:
        if self.operations < 1:
            raise ConfigError(f"operations is {self.operations}; draw at least one")
        if not 0 < self.probability <= 1:
            raise ConfigError(f"probability is {self.probability}; it is above 0 and at most 1")

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        return self.train(build, data, job, perturb=self.perturb)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Tensor:
        """The images (B, C, H, W) after their operations, whole grey levels."""
        for place in range(self.operations):
            step = rng.fork(place)
            acts = step.fork("acts").uniform() < self.probability
            drawn = 1 + step.fork("operation").integers(len(OPERATIONS) - 1)
            level = (1 + step.fork("level").integers(LEVELS)) / LEVELS
            x = operate(x, torch.where(acts, drawn, 0), level, step)
        return x
