"""RayS: search for the sign vector along which the boundary is nearest, from labels alone."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.errors import ConfigError
from bench.norms import per_sample, project
from bench.oracle import Oracle, Rules
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat


@attacks("rays")
@dataclass(frozen=True, kw_only=True)
class RayS:
    """RayS (Chen and Gu, KDD 2020), untargeted, in linf.

    A ray leaves the image towards a corner of the cube. Blocks of its signs are flipped, from the whole image down to
    single values, and then single values again and again. A flip is tried with one query at the radius reached so far;
    if the label is wrong there, bisection finds the boundary along the new ray, which becomes the ray of the sample.
    Nothing is drawn at random. The first ray tried is all -1, for the whole image is the first block.

    As a minimum-norm attack it begins far outside the ball, and those queries count. A sample stops at its first
    misclassified query inside the ball, in the midst of a bisection, where the public code finishes the bisection first
    (up to some 15 queries more on 32 x 32 x 3 pixels).

    Args:
        tol: width at which a bisection ends, as an l2 length along the ray: ``tol / sqrt(C H W)`` for each pixel.

    Source: arXiv:2006.12792, algorithms 1 to 3; order of the blocks as in the authors' code.

    Raises:
        ConfigError: a tolerance that is not positive and finite.
    """

    tol: float = 1e-3

    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf"})
    rules: ClassVar[Rules] = Rules(minimal=True)
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Chen and Gu, 2020, arXiv:2006.12792"

    def __post_init__(self) -> None:
        if not 0 < self.tol < math.inf:
            raise ConfigError(f"tol is {self.tol:g}; a bisection ends at a width above zero")

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns the nearest point found, moved into the ball."""
        rays = _Rays(x, self.tol)
        for _ in range(oracle.query_budget):
            rows = oracle.active()
            if len(rows) == 0:
                break
            labels = oracle.labels(rays.query(rows), rows)
            rays.learn(rows, labels != y[rows], labels >= 0)
        return rays.nearest(threat)


class _Rays:
    """Where the search of each sample stands. Each query either tries a flip or halves the interval of one.

    Radii are linf lengths in float64: halvings must not run out of digits. At 1, the cube's corner is reached.
    """

    def __init__(self, x: Tensor, tol: float) -> None:
        self.x = x
        self.values = x[0].numel() if len(x) else 1
        self.width = tol / math.sqrt(self.values)  # at which a bisection ends
        self.plus = torch.ones_like(x, dtype=torch.bool).flatten(1)              # signs of the ray, (B, C H W)
        self.reached = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)  # radius of the boundary
        self.low, self.high = torch.zeros_like(self.reached), torch.zeros_like(self.reached)
        self.halving = torch.zeros_like(self.reached, dtype=torch.bool)
        self.size = torch.full_like(self.reached, self.values, dtype=torch.int64)  # of the blocks of this level
        self.start = torch.zeros_like(self.size)                                  # of the block that is tried
        self.level = torch.zeros_like(self.size)

    def query(self, rows: Tensor) -> Tensor:
        """The next query (n, C, H, W) of the samples at ``rows``."""
        middle = (self.low[rows] + self.high[rows]) / 2
        return self._point(rows, self._tried(rows), torch.where(self.halving[rows], middle, self.reached[rows]))

    def learn(self, rows: Tensor, wrong: Tensor, answered: Tensor) -> None:
        """Take the answers (n,) to :meth:`query`; a sample that got none stays where it is."""
        low, high, reached, halving = (part[rows] for part in (self.low, self.high, self.reached, self.halving))
        middle = (low + high) / 2
        begins = ~halving & wrong
        low = torch.where(begins, 0, torch.where(halving & ~wrong, middle, low))
        high = torch.where(begins, reached.clamp(max=1), torch.where(halving & wrong, middle, high))
        ends = (halving | begins) & (high - low <= self.width)
        nearer = answered & ends & (high < reached)
        moves_on = answered & (ends | (~halving & ~wrong))

        self.plus[rows] = torch.where(nearer[:, None], self._tried(rows), self.plus[rows])
        self.reached[rows] = torch.where(nearer, high, reached)
        self.low[rows] = torch.where(answered, low, self.low[rows])
        self.high[rows] = torch.where(answered, high, self.high[rows])
        self.halving[rows] = torch.where(answered, (halving | begins) & ~ends, halving)
        self._next_block(rows, moves_on)

    def nearest(self, threat: Threat) -> Tensor:
        """The nearest misclassified point (B, C, H, W) moved into the ball; the image itself where none was found."""
        found = self.reached.isfinite()
        rows = torch.arange(len(self.x), device=self.x.device)
        point = self._point(rows, self.plus, torch.where(found, self.reached, 0))
        return project(point, self.x, threat)

    def _tried(self, rows: Tensor) -> Tensor:
        """The signs (n, C H W) of the ray with its block flipped."""
        offset = torch.arange(self.values, device=self.x.device) - self.start[rows, None]
        return self.plus[rows] ^ ((offset >= 0) & (offset < self.size[rows, None]))

    def _point(self, rows: Tensor, plus: Tensor, radius: Tensor) -> Tensor:
        x = self.x[rows]
        step = per_sample(radius.clamp(max=1).to(x.dtype))
        return torch.where(plus.view_as(x), x + step, x - step).clamp(0, 1)

    def _next_block(self, rows: Tensor, moves_on: Tensor) -> None:
        """The next block of the level, or the first of the next, whose blocks have half the size and at least 1."""
        start, level = self.start[rows] + self.size[rows] * moves_on, self.level[rows]
        over = start >= self.values
        level = (level + over).clamp(max=62)
        size = (self.values + 2**level - 1) // 2**level
        self.start[rows], self.level[rows] = torch.where(over, 0, start), level
        self.size[rows] = size
