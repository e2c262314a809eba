"""GAT: single-step training guided by how far the probabilities move."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.ascent import ascend
from bench.dataset import Dataset
from bench.norms import project
from bench.protocols import Job, Stage
from bench.ranges import NonNegative, Positive, Radius
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Threat
from bench.training import RecipeName, Trainer, frozen

LATE = 0.86  # share of the training after which the penalty weighs more: with the last fall of the rate


@defenses("gat")
@dataclass(frozen=True, kw_only=True)
class GuidedAdversarialTraining(Trainer):
    """Cross-entropy on clean images, and the squared distance of the probabilities at images that a single step finds.

    The step starts from a random corner of a smaller ball and climbs the cross-entropy, in every other batch together
    with that distance, which leads it away from where the gradient of the cross-entropy alone is masked. It sees the
    network in eval mode, and the clean probabilities of training mode, as in the authors' code.

    Args:
        rel_start: size of the random start as a share of ``eps``.
        rel_step: size of the step as a share of ``eps``.
        penalty: weight of the squared distance, in the step and in the loss.
        late: by how much ``penalty`` grows in the loss and the step for the last seventh of the epochs.

    Source:
        Sriramanan et al., NeurIPS 2020, arXiv:2011.14969, algorithm 2; numbers as in the authors' code for CIFAR-10.
    """

    eps: Radius = 8 / 255
    rel_start: NonNegative = 0.5
    rel_step: Positive = 1.0
    penalty: NonNegative = 10.0
    late: Positive = 4.0
    recipe: RecipeName | None = "gat"

    stage: ClassVar[Stage] = "training"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Sriramanan et al., NeurIPS 2020, arXiv:2011.14969"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        guide = Guide(self, self.recipe_for(data).epochs)
        return self.train(build, data, job, perturb_at=guide.begin, objective=guide.losses)


class Guide:
    """The losses of one training of ``epochs`` epochs: which batch of its epoch comes next, and what the penalty is."""

    def __init__(self, defense: GuidedAdversarialTraining, epochs: int) -> None:
        self.defense, self.epochs = defense, epochs
        self.batch, self.weight = 0, defense.penalty

    def begin(self, epoch: int) -> Callable[[nn.Module, Tensor, Tensor, SampleRng], Tensor]:
        """An epoch begins (0, 1, ...); the images of its batches stay as they are until the losses see them."""
        grown = self.defense.late if epoch / self.epochs >= LATE else 1.0
        self.batch, self.weight = 0, self.defense.penalty * grown
        return lambda model, x, y, rng: x

    def losses(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Iterator[Tensor]:
        """One step on both terms."""
        with torch.no_grad():
            clean = model(x).softmax(dim=1)  # in training mode, so that it moves the running statistics, too
        guided = self.weight if self.batch % 2 else 0.0
        self.batch += 1
        x_adv = self._attack(model, x, y, clean, guided, rng)
        logits = model(x_adv)
        answers = model(x)
        yield F.cross_entropy(answers, y) + self.weight * squared(answers.softmax(dim=1), logits.softmax(dim=1)).mean()

    def _attack(self, model: nn.Module, x: Tensor, y: Tensor, clean: Tensor, guided: float, rng: SampleRng) -> Tensor:
        """The images in the ball around ``x`` (B, C, H, W) that one step reaches."""
        defense, threat = self.defense, Threat("linf", self.defense.eps, "gradients")

        def loss(z: Tensor) -> Tensor:
            logits = model(z)
            moved = squared(clean, logits.softmax(dim=1)).sum()
            return F.cross_entropy(logits, y, reduction="sum") + guided * moved

        corner = torch.where(rng.coins(*x.shape[1:]), 1.0, -1.0).to(x)
        with frozen(model):
            start = project(x + defense.rel_start * defense.eps * corner, x, threat)
            return ascend(loss, start, x, threat, 1, defense.rel_step * defense.eps)


def squared(one: Tensor, other: Tensor) -> Tensor:
    """The squared l2 distance (B,) between probabilities (B, K)."""
    return (one - other).square().sum(dim=1)
