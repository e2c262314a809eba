"""Fast adversarial training: one step from a random start, which is cheap and may collapse."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bench.ascent import pgd
from bench.dataset import Dataset
from bench.protocols import Job, Stage
from bench.ranges import Positive, Radius
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Threat
from bench.training import RecipeName, Trainer, frozen
from defenses.early_stopping import EarlyStopping


@dataclass(frozen=True, kw_only=True)
class SingleStep(Trainer, ABC):
    """What single-step trainings share: an epoch costs two forward and backward passes per image.

    The attack sees the network in training mode, as in the papers' codes: it goes by the statistics of its batch, and
    moves the running ones.

    Args:
        early_stopping: return the epoch that withstands PGD best on held-out images, and stop after a collapse.
    """

    eps: Radius = 8 / 255
    rel_step: Positive = 1.0
    early_stopping: bool = False

    stage: ClassVar[Stage] = "training"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        selection = EarlyStopping(data, self.eps, job) if self.early_stopping else None
        return self.train(build, data, job, perturb=self.perturb, selection=selection, pure=True)

    @abstractmethod
    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Tensor:
        """The images (B, C, H, W) to train on instead of ``x``."""


@defenses("fast-at")
@dataclass(frozen=True, kw_only=True)
class FastAdversarialTraining(SingleStep):
    """Train on the images that one gradient step reaches from a uniformly random point of the linf ball.

    Without ``early_stopping`` it may overfit catastrophically: within an epoch its robustness against PGD falls to
    nothing, while that against its own single step rises.

    Args:
        rel_step: size of the step as a share of ``eps``.

    Source:
        Wong et al., ICLR 2020, arXiv:2001.03994, algorithm 3.
    """

    rel_step: Positive = 1.25
    recipe: RecipeName | None = "fast-at"

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Wong et al., ICLR 2020, arXiv:2001.03994"

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Tensor:
        """The images in the ball around ``x`` (B, C, H, W) that one step reaches."""
        with frozen(model, training=True):
            return pgd(model, x, y, Threat("linf", self.eps, "gradients"), rng, 1, self.rel_step)
