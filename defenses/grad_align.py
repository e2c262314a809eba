"""GradAlign: single-step training whose gradients are made to agree within the ball."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from bench.ascent import alignment, input_gradients, uniform
from bench.dataset import Dataset
from bench.protocols import Job, Stage
from bench.ranges import NonNegative, Positive, Radius
from bench.registry import defenses
from bench.rng import SampleRng
from bench.training import RecipeName, Trainer


@defenses("grad-align")
@dataclass(frozen=True, kw_only=True)
class GradAlign(Trainer):
    """FGSM training with a penalty on the angle between the gradient at an image and at a random point of its ball.

    A single step is as good as many where the gradient is the same all over the ball; where the two differ, training
    collapses. An epoch costs three forward passes and differentiates two gradients once more.

    Args:
        rel_step: size of the step from the image itself, as a share of ``eps``.
        penalty: weight of one minus the mean cosine; the paper has 0.2 for eps 8/255 on CIFAR-10, and more for larger
            radii (2 at 16/255).

    Source:
        Andriushchenko and Flammarion, NeurIPS 2020, arXiv:2007.02617, equation 5.
    """

    eps: Radius = 8 / 255
    rel_step: Positive = 1.0
    penalty: NonNegative = 0.2
    recipe: RecipeName | None = "grad-align"

    stage: ClassVar[Stage] = "training"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Andriushchenko and Flammarion, NeurIPS 2020, arXiv:2007.02617"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        return self.train(build, data, job, objective=self.losses)

    def losses(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Iterator[Tensor]:
        """One step on the cross-entropy of the FGSM images and the penalty."""
        here = input_gradients(model, x, y, create_graph=True)
        there = input_gradients(model, x + uniform(x, self.eps, rng), y, create_graph=True)
        x_adv = (x + self.rel_step * self.eps * here.detach().sign()).clamp(0, 1)
        yield F.cross_entropy(model(x_adv), y) + self.penalty * (1 - alignment(here, there).mean())
