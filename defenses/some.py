"""SOME: several heads trained under noise, each by what its neighbour finds hard, kept apart from each other."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.dataset import Dataset
from bench.models.heads import heads_of, logits_of_heads
from bench.protocols import Job, Stage
from bench.ranges import Count, NonNegative, Positive
from bench.registry import defenses
from bench.rng import SampleRng
from bench.training import Perturb, Trainer
from defenses.gaussian_training import noisy


@defenses("some")
@dataclass(frozen=True, kw_only=True)
class SmoothedMultiHeadEnsemble(Trainer):
    """Gaussian training of a network with heads, such as ``resnet110(heads=5)``, which answers with the sum of logits.

    A head counts a sample whole where the head before it finds it easy, and else the less, the harder it finds it
    itself. What easy means falls from the logarithm of the number of classes, at first, to ``last``. The cosines
    between the weights of heads are pressed towards zero. A network without heads is one head.

    Args:
        copies: noisy copies of each image; a loss is their mean.
        last: the loss below which a sample is easy in the last epoch. The paper's are 1.2, 0.8 and 0.8 for a ``sigma``
            of 0.25, 0.5 and 1.
        weighting: ``circular``, or ``none`` to count all alike.
        apart: weight of the squared cosines.

    Source:
        Fang et al., 2022, arXiv:2211.10882, and its released code, whose certificates come of an older loss that weighs
        the heads.
    """

    sigma: Positive
    copies: Count = 2
    last: Positive = 0.8
    weighting: Literal["circular", "none"] = "circular"
    apart: NonNegative = 1.0

    stage: ClassVar[Stage] = "training"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Fang et al., 2022, arXiv:2211.10882"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        teaching = Teaching(self, len(data.classes), self.recipe_for(data).epochs)
        return self.train(build, data, job, perturb_at=teaching.begin, objective=teaching.losses)


class Teaching:
    """The loss of :class:`SmoothedMultiHeadEnsemble` as its epochs pass."""

    def __init__(self, some: SmoothedMultiHeadEnsemble, classes: int, epochs: int) -> None:
        self.some, self.classes, self.epochs = some, classes, epochs
        self.easy = math.log(classes)

    def begin(self, epoch: int) -> Perturb:
        """Set what is easy in ``epoch`` (0, 1, ...); the images stay as they are."""
        self.easy = easy(epoch, self.epochs, self.classes, self.some.last)
        return lambda model, x, y, rng: x

    def losses(self, model: nn.Module, x: Tensor, target: Tensor, rng: SampleRng) -> Iterator[Tensor]:
        """One step on a batch."""
        copies = self.some.copies
        logits = logits_of_heads(model, noisy(x, self.some.sigma, rng, copies))       # (H, copies * B, K)
        labels = target.repeat(len(logits) * copies)
        each = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
        smoothed = each.view(len(logits), copies, len(target)).mean(dim=1)            # (H, B)
        weights = weigh(smoothed.detach(), self.easy) if self.some.weighting == "circular" else 1.0
        loss = (weights * smoothed).mean(dim=1).mean()
        heads = heads_of(model)
        yield loss + self.some.apart * overlap(heads) if len(heads) > 1 else loss


def easy(epoch: int, epochs: int, classes: int, last: float) -> float:
    """The loss below which a sample is easy in ``epoch`` (0, 1, ...) of so many ``epochs``.

    Ten to the power of minus it runs in a straight line from that of ln ``classes`` to that of ``last``.
    """
    begin, end = 10 ** -math.log(classes), 10**-last
    return -math.log10(begin + (end - begin) * epoch / max(epochs - 1, 1))


def weigh(losses: Tensor, easy: float) -> Tensor:
    """The weight (H, B) of each sample for each head, by the ``losses`` (H, B) of heads.

    1 where the head before, which is the last one for the first, finds it easy, else less than 1 where it is hard.
    """
    before = losses.roll(1, dims=0)
    return torch.where(before <= easy, 1.0, (1 + math.exp(-easy)) / (1 + (losses - easy).exp()))


def overlap(heads: list[nn.Module]) -> Tensor:
    """The sum over pairs of ``heads`` of the squared cosines between all their parameters."""
    flat = torch.stack([torch.cat([value.flatten() for value in head.parameters()]) for head in heads])
    cosines = F.normalize(flat, dim=1) @ F.normalize(flat, dim=1).T
    return cosines.triu(diagonal=1).square().sum()
