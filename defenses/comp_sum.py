"""Smooth adversarial comp-sum losses: clean accuracy, and margins that an adversary moves little."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bench.ranges import NonNegative, Positive
from bench.registry import defenses
from bench.rng import SampleRng
from bench.training import RecipeName, frozen
from defenses.trades import Regularised

TINY = 1e-12  # keeps the slope of a root at zero finite


@defenses("comp-sum")
@dataclass(frozen=True, kw_only=True)
class CompSum(Regularised):
    """A comp-sum loss of the clean image, and ``beta`` times how far (l2) the margins move within the ball.

    The margins of an image are its true logit minus each other one. This is TRADES with another loss and distance. The
    paper's hyper-parameters are not known to us; these, and the attack, which climbs the distance by PGD, are ours.

    Args:
        tau: of the loss: 0 is the sum of exponentials, 1 the cross-entropy, 2 the mean absolute error.
        rho: what margins are divided by in the loss; with ``beta`` of at least sqrt(K - 1) / rho the sum bounds the
            adversarial loss.

    Source:
        Mao et al., ICML 2023, arXiv:2304.07288, section 5.
    """

    beta: NonNegative = 1.0
    tau: NonNegative = 1.0
    rho: Positive = 1.0
    recipe: RecipeName | None = "trades"

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Mao et al., ICML 2023, arXiv:2304.07288"

    def losses(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Iterator[Tensor]:
        """One step on both terms; ``x_adv`` is where the second is large."""
        with frozen(model):
            clean = margins(model(x).detach(), y)
            x_adv = self.attack(lambda z: length(margins(model(z), y) - clean).sum(), x, rng)
        clean = margins(model(x), y)
        moved = length(margins(model(x_adv), y) - clean)
        yield (comp_sum(clean / self.rho, self.tau) + self.beta * moved).mean()


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """The true logit minus every logit (B, K), from logits (B, K): zero for the true class itself."""
    return logits.gather(1, y[:, None]) - logits


def comp_sum(u: Tensor, tau: float) -> Tensor:
    """The loss (B,) of margins ``u`` (B, K), ``((1 + s)^(1 - tau) - 1) / (1 - tau)`` with s the sum of exp(-u_j).

    The true class, whose margin is zero, gives the 1.
    """
    logarithm = (-u).logsumexp(dim=1)  # log(1 + s)
    return logarithm if math.isclose(tau, 1) else ((1 - tau) * logarithm).expm1() / (1 - tau)


def length(moved: Tensor) -> Tensor:
    """The l2 norm (B,) of each row, with a finite slope at zero."""
    return (moved.square().sum(dim=1) + TINY).sqrt()
