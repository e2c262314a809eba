"""AWP: adversarial training at weights that are perturbed against it, which flattens the loss around the weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.ascent import pgd
from bench.dataset import Dataset
from bench.protocols import Job, Stage
from bench.ranges import Count, Positive, Radius
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Threat
from bench.training import RecipeName, Trainer, frozen

TINY = 1e-20  # keeps a layer without a gradient from dividing by zero


@defenses("awp")
@dataclass(frozen=True, kw_only=True)
class AdversarialWeightPerturbation(Trainer):
    """PGD training whose gradient is taken where the weights, too, have moved up the loss.

    Each layer moves by ``gamma`` times its norm, and back after the step. An epoch costs ``steps + 2`` forward and
    backward passes per image. The attack sees the network in training mode.

    Source:
        Wu et al., NeurIPS 2020, arXiv:2004.05884, equations 7 to 10; one step on the weights, as in the released code,
        where weight decay acts on the perturbed ones.
    """

    eps: Radius = 8 / 255
    steps: Count = 10
    rel_step: Positive = 0.25
    gamma: Positive = 5e-3
    recipe: RecipeName | None = "awp"

    stage: ClassVar[Stage] = "training"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Wu et al., NeurIPS 2020, arXiv:2004.05884"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        return self.train(build, data, job, objective=self.losses)

    def losses(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Iterator[Tensor]:
        """One step, at the perturbed weights."""
        with frozen(model, training=True):
            x_adv = pgd(model, x, y, Threat("linf", self.eps, "gradients"), rng, self.steps, self.rel_step)
        moves = self.moves(model, x_adv, y)
        with torch.no_grad():
            for weight, move in moves.items():
                weight.add_(move)
        yield F.cross_entropy(model(x_adv), y)
        with torch.no_grad():
            for weight, move in moves.items():
                weight.sub_(move)

    def moves(self, model: nn.Module, x: Tensor, y: Tensor) -> dict[nn.Parameter, Tensor]:
        """How each weight (of two or more dimensions: no biases, no batch-norms) moves up the loss of ``x``.

        Batch-norm's running statistics are left as they were.
        """
        weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), weights)
        for buffer, before in statistics:
            buffer.copy_(before)
        return {
            weight: self.gamma * weight.detach().norm() / (gradient.norm() + TINY) * gradient
            for weight, gradient in zip(weights, gradients, strict=True)
        }
