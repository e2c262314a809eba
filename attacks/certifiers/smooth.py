"""Randomized smoothing: what a network mostly says of an image under Gaussian noise, and how far nothing moves that."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import special
from torch import Tensor

from bench.protocols import Certificates, Network
from bench.ranges import Count, Level, Positive
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm


@attacks("smooth")
@dataclass(frozen=True, kw_only=True)
class Smooth:
    """Certify the class that a network gives most often to ``x + sigma * N(0, I)``.

    ``n0`` draws choose the class, ``n`` others count how often it comes. From these follows a lower bound of its
    probability p (Clopper and Pearson), and from p the l2 radius ``sigma * Phi^-1(p)``; where p may be below one half,
    it abstains. The noisy images leave the box [0, 1], as those of Gaussian training do.

    Args:
        alpha: the probability with which a certificate may fail.

    Source:
        Cohen, Rosenfeld and Kolter, ICML 2019, arXiv:1902.02918, section 3.2 (CERTIFY and PREDICT); n0, n and alpha are
        those of its released code.
    """

    sigma: Positive
    n0: Count = 100
    n: Count = 100_000
    alpha: Level = 0.001

    access: ClassVar[Access] = "certificate"
    norm: ClassVar[Norm] = "l2"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Cohen et al., ICML 2019, arXiv:1902.02918"

    @property
    def draws(self) -> int:
        """Forward passes that each image costs."""
        return self.n0 + self.n

    def __call__(self, network: Network, x: Tensor, rng: SampleRng, batch: int) -> Certificates:
        """Certify the images ``x`` (B, C, H, W); see :class:`bench.protocols.Certifier`."""
        chosen = self.votes(network, x, rng.fork("choose"), self.n0, batch)
        predicted = chosen[:, :-1].argmax(dim=1)
        counted = self.votes(network, x, rng.fork("count"), self.n, batch)
        votes = counted.gather(1, predicted[:, None]).squeeze(1)
        radius, abstained = self.proven(votes)
        invalid = (chosen[:, -1] + counted[:, -1]) > 0
        return Certificates(
            predicted, radius=radius, abstained=abstained, votes=votes, invalid=invalid,
            n0=self.n0, n=self.n, alpha=self.alpha, most=float(self.proven(torch.tensor([self.n]))[0]),
        )  # fmt: skip

    def proven(self, votes: Tensor) -> tuple[Tensor, Tensor]:
        """The radii (B,) that so many ``votes`` (B,) of the ``n`` draws prove, and where they prove nothing (B,)."""
        p = at_least(votes, self.n, self.alpha)
        return self.radius(p), p < 0.5

    def radius(self, p: Tensor) -> Tensor:
        """(B,) float64 in l2, within which no change takes the majority from a class of probability ``p`` (B,)."""
        deviations: Tensor = torch.special.ndtri(p.clamp(min=0.5))
        return self.sigma * deviations

    def predict(self, network: Network, x: Tensor, rng: SampleRng, batch: int, draws: int, alpha: float) -> Tensor:
        """The class (B,) that ``draws`` draws give most; -1 where a binomial test cannot tell it from the next."""
        votes = self.votes(network, x, rng, draws, batch)
        (first, second), (answer, _) = (part.unbind(1) for part in votes.topk(2, dim=1))
        tail = special.bdtr(second.cpu().numpy(), (first + second).cpu().numpy(), 0.5)
        unsure = torch.from_numpy(np.minimum(2 * tail, 1) > alpha).to(x.device)
        return answer.masked_fill(unsure | (answer == votes.shape[1] - 1), -1)

    def soften(self, network: Network, x: Tensor, rng: SampleRng, draws: int) -> Tensor:
        """The mean probabilities (B, K) over ``draws`` draws, which have a gradient."""
        rows = torch.arange(len(x), device=x.device).repeat_interleave(draws)
        logits = network(self.noisy(x, rng, rows, torch.arange(draws, device=x.device).repeat(len(x))))
        return logits.softmax(dim=1).view(len(x), draws, -1).mean(dim=1)

    @torch.no_grad()
    def votes(self, network: Network, x: Tensor, rng: SampleRng, draws: int, batch: int) -> Tensor:
        """(B, K + 1) int64: how many of ``draws`` draws of each image got each class; last, NaN or infinite answers.

        Batches are filled with draws of several images. Which they are has no say in any draw.
        """
        parts = torch.arange(len(x) * draws, device=x.device).split(batch)
        counts = [self._counted(network, x, rng, part // draws, part % draws) for part in parts]
        return torch.stack(counts).sum(dim=0)

    def _counted(self, network: Network, x: Tensor, rng: SampleRng, rows: Tensor, numbers: Tensor) -> Tensor:
        logits = network(self.noisy(x, rng, rows, numbers))
        classes = logits.shape[1]
        answers = logits.argmax(dim=1).where(logits.isfinite().all(dim=1), classes)
        counts = torch.zeros(len(x) * (classes + 1), dtype=torch.int64, device=x.device)
        counts.index_add_(0, rows * (classes + 1) + answers, torch.ones_like(answers))
        return counts.view(len(x), classes + 1)

    def noisy(self, x: Tensor, rng: SampleRng, rows: Tensor, numbers: Tensor) -> Tensor:
        """The images ``rows`` (n,) of ``x`` under the draws ``numbers`` (n,) of their streams."""
        return x[rows] + self.sigma * rng[rows].fork(numbers).normal(*x.shape[1:]).to(x)


def at_least(successes: Tensor, n: int, alpha: float) -> Tensor:
    """What a probability is at least, but for a chance of ``alpha``, if ``n`` trials had so many ``successes`` (B,).

    Source: Clopper and Pearson, 1934, Biometrika 26(4), the one-sided bound, as a quantile of a beta distribution.
    """
    counts = successes.cpu().numpy().astype(float)
    bound = special.betaincinv(counts.clip(1), n - counts.clip(1) + 1, alpha)
    return torch.from_numpy(bound).where(successes.cpu() > 0, 0).to(successes.device)
