"""FMN: the nearest misclassified point, by projection onto a ball that shrinks and grows around the boundary."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.errors import ConfigError
from bench.losses import margin
from bench.norms import DUAL, TINY, lp_norm, per_sample, project, steepest
from bench.oracle import Oracle, Rules
from bench.ranges import Count, Positive
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat


@attacks("fmn")
@dataclass(frozen=True, kw_only=True)
class FMN:
    """Fast minimum-norm attack (Pintor et al., NeurIPS 2021), in l1, l2 and linf.

    Steps go down the margin, along its gradient in l2, and end in a ball around the image. Where the point is
    misclassified the ball shrinks by a share ``shrink``, where it is not it grows again. Before the first success it
    reaches beyond where the gradient says that the boundary is, by the same share, since a point on a boundary is not
    beyond it. Step size and shrinking fall by a cosine. Costs one forward and one backward pass for each step.

    A sample stops at its first misclassified query inside ``eps``. With ``eps = 0`` none does, and ``best_distance``
    gives the median distance and accuracy at every radius from one run. Nothing is drawn at random.

    Args:
        size: length of the first step, in l2 on the pixel scale; the last is a hundredth of it.
        shrink: share by which the ball changes at first; at the end ``least_shrink``.

    Source: arXiv:2102.12827, algorithm 1.
    """

    steps: Count = 100
    size: Positive = 1.0
    shrink: Positive = 0.05
    least_shrink: Positive = 0.001

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l1", "l2", "linf"})
    rules: ClassVar[Rules] = Rules(minimal=True)
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Pintor et al., 2021, arXiv:2102.12827"

    def __post_init__(self) -> None:
        if not self.least_shrink <= self.shrink < 1:
            raise ConfigError(
                f"shrink is {self.shrink:g} and least_shrink {self.least_shrink:g}; they are shares, falling below 1"
            )

    @property
    def most_queries(self) -> int:
        """Forward passes that a sample costs which never falls."""
        return self.steps

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns the nearest misclassified point found, moved into the ball."""
        u, best = x.clone(), x.clone()
        nearest = torch.full(x.shape[:1], torch.inf, dtype=x.dtype, device=x.device)
        radius = nearest.clone()
        for step in range(self.steps):
            rows = oracle.active()
            if len(rows) == 0:
                break
            now, clean = u[rows], x[rows]
            logits, gradient = oracle.gradients(now, margin, rows)
            lead = margin(logits, y[rows]).to(x.dtype)  # NaN for who gets no answer
            away = lp_norm(now - clean, threat.norm)
            wrong = lead < 0
            nearer = wrong & (away < nearest[rows])
            best[rows] = torch.where(per_sample(nearer), now, best[rows])
            nearest[rows] = torch.where(nearer, away, nearest[rows])

            shrink = _cosine(self.shrink, self.least_shrink, step / self.steps)
            slope = torch.linalg.vector_norm(gradient.flatten(1), DUAL[threat.norm], dim=1)
            smaller = torch.minimum(radius[rows] * (1 - shrink), nearest[rows])
            guess = away + lead.nan_to_num() / (slope + TINY)
            larger = torch.where(nearest[rows].isfinite(), radius[rows], guess) * (1 + shrink)
            reach = torch.where(wrong, smaller, larger)
            move = _cosine(self.size, self.size / 100, step / self.steps) * steepest(gradient, "l2")
            radius[rows] = reach
            u[rows] = project(now - move, clean, threat, reach)
        return project(best, x, threat)


def _cosine(first: float, last: float, done: float) -> float:
    """From ``first`` to ``last`` as ``done`` goes from 0 to 1."""
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2
