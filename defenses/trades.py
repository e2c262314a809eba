"""TRADES and MART: adversarial training that weighs the clean image against the answers around it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from bench.ascent import ascend, total_cross_entropy
from bench.dataset import Dataset
from bench.protocols import Job, Stage
from bench.ranges import Count, NonNegative, Positive, Radius
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Threat
from bench.training import RecipeName, Trainer, frozen

START = 0.001  # deviation of the normal noise that the attack starts from
SURE = 1e-12  # keeps the logarithm of a probability finite


@dataclass(frozen=True, kw_only=True)
class Regularised(Trainer, ABC):
    """What the two share: an attack on the network in eval mode, from normal noise, and a weight ``beta``."""

    eps: Radius = 8 / 255
    steps: Count = 10
    rel_step: Positive = 0.25
    beta: NonNegative = 6.0

    stage: ClassVar[Stage] = "training"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        return self.train(build, data, job, objective=self.losses)

    @abstractmethod
    def losses(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Iterator[Tensor]:
        """What is stepped on."""

    def attack(self, loss: Callable[[Tensor], Tensor], x: Tensor, rng: SampleRng) -> Tensor:
        """The images in the ball around ``x`` (B, C, H, W) to which ``loss`` leads up."""
        start = x + START * rng.normal(*x.shape[1:])
        threat = Threat("linf", self.eps, "gradients")
        return ascend(loss, start, x, threat, self.steps, self.rel_step * self.eps)


@defenses("trades")
@dataclass(frozen=True, kw_only=True)
class Trades(Regularised):
    """Cross-entropy on clean images, and ``beta`` times the divergence of the answers around them.

    Source:
        Zhang et al., ICML 2019, arXiv:1901.08573, equation 5 and algorithm 1. The released code has steps of 0.007 in a
        ball of 0.031; here they are a quarter of ``eps``, 0.0078.
    """

    recipe: RecipeName | None = "trades"

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Zhang et al., ICML 2019, arXiv:1901.08573"

    def losses(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Iterator[Tensor]:
        """One step on both terms; ``x_adv`` is where the second is large."""
        with frozen(model):
            clean = model(x).detach()
            x_adv = self.attack(lambda z: divergence(clean, model(z)).sum(), x, rng)
        clean = model(x)
        yield F.cross_entropy(clean, y) + self.beta * divergence(clean, model(x_adv)).mean()


@defenses("mart")
@dataclass(frozen=True, kw_only=True)
class Mart(Regularised):
    """TRADES' divergence weighted by how unsure the clean answer is, and a loss that presses the runner-up down.

    Source:
        Wang et al., ICLR 2020, "Improving adversarial robustness requires revisiting misclassified examples", equations
        8 to 11 and algorithm 1; ``beta`` is 6 in the released code, 5 in the paper.
    """

    recipe: RecipeName | None = "mart"

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Wang et al., ICLR 2020, https://openreview.net/forum?id=rklOg6EFwS"

    def losses(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Iterator[Tensor]:
        """One step on the boosted cross-entropy of ``x_adv`` and the weighted divergence."""
        with frozen(model):
            x_adv = self.attack(total_cross_entropy(model, y), x, rng)
        clean, adversarial = model(x), model(x_adv)
        unsure = 1 - clean.softmax(dim=1).gather(1, y[:, None]).squeeze(1)
        yield boosted(adversarial, y) + self.beta * (unsure * divergence(clean, adversarial)).mean()


def divergence(clean: Tensor, adversarial: Tensor) -> Tensor:
    """The Kullback-Leibler divergence (B,) of softmax(``clean``) from softmax(``adversarial``), logits (B, K)."""
    return F.kl_div(adversarial.log_softmax(dim=1), clean.softmax(dim=1), reduction="none").sum(dim=1)


def boosted(logits: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of ``y`` and of not being the likeliest other class."""
    others = logits.softmax(dim=1).scatter(1, y[:, None], 0.0)
    return F.cross_entropy(logits, y) - (1 - others.amax(dim=1) + SURE).log().mean()
