"""SignHunter: the sign of the gradient, found by flipping ever smaller blocks, from scores alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.scored import Scored
from bench.errors import ConfigError
from bench.losses import WITH_DLR
from bench.norms import choose, project
from bench.oracle import Oracle
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat


@attacks("sign-hunter")
@dataclass(frozen=True, kw_only=True)
class SignHunter(Scored):
    """SignHunter (Al-Dujaili and O'Reilly, ICLR 2020), untargeted, in linf and l2; draws no random numbers.

    A pass starts at the corner of the ball where every sign is +1, flips the whole image, its halves, its quarters and
    so on down to single values, and keeps each flip that does not raise the loss. The next pass starts around the
    image that the last one has found; the ball stays where it was. Costs one query for the start of a pass and one for
    each flip. The derivative of the paper compares losses with that of the same base, which cancels and is not asked.

    Args:
        loss: what is minimised, ``margin``, ``ce`` (the log-likelihood) or ``dlr``, which no scale of scores moves.
        layout: in which order an image is cut into blocks; ``hwc`` (channels fastest, as in the authors' code) or
            ``chw``.

    Source: arXiv:1902.06894; l2 steps are eps / sqrt(d) long in each value, and blocks lie as in the
    authors' code.
    """

    loss: Literal["margin", "ce", "dlr"] = "margin"
    layout: Literal["hwc", "chw"] = "hwc"

    access: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Al-Dujaili and O'Reilly, 2020, arXiv:1902.06894"

    def __post_init__(self) -> None:
        if self.loss not in WITH_DLR:
            raise ConfigError(f"loss is {self.loss!r}; use one of {', '.join(WITH_DLR)}")
        if self.layout not in ("hwc", "chw"):
            raise ConfigError(f"layout is {self.layout!r}; use hwc or chw")

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's incumbent."""
        loss, place = WITH_DLR[self.loss], self._places(x)
        size = x[0].numel()
        length = threat.eps if threat.norm == "linf" else threat.eps / math.sqrt(size)

        u, rows = x.clone(), torch.arange(len(x), device=x.device)
        labels, clean, base, incumbent = y, x, x, x
        up, lowest = torch.ones_like(x, dtype=torch.bool), torch.full_like(x[:, 0, 0, 0], torch.inf)
        for _, block in zip(range(oracle.query_budget), passes(size), strict=False):
            active = oracle.active()
            if len(active) == 0:
                break
            if active is not rows:  # gather anew only when somebody has dropped out
                u[rows] = incumbent
                stay = torch.searchsorted(rows, active)
                labels, clean, base, incumbent, up, lowest = (
                    part[stay] for part in (labels, clean, base, incumbent, up, lowest)
                )
                rows = active
            if block is None:
                base, flipped = incumbent, torch.ones_like(up)
                lowest = torch.full_like(lowest, torch.inf)
            else:
                flipped = up ^ ((place >= block[0]) & (place < block[1]))
            candidate = project(torch.where(flipped, base + length, base - length), clean, threat)
            value = loss(oracle.scores(candidate, rows), labels).to(lowest)
            kept = value <= lowest  # a tie keeps the flip, as published; NaN, no answer, never does
            up = flipped if block is None else choose(kept, flipped, up)
            incumbent = choose(kept, candidate, incumbent)
            lowest = torch.where(kept, value, lowest)
        u[rows] = incumbent
        return u

    def _places(self, x: Tensor) -> Tensor:
        """The position (C, H, W) of each value in the flattened image that is cut into blocks."""
        channels, height, width = x.shape[1:]
        order = torch.arange(x[0].numel(), device=x.device)
        if self.layout == "chw":
            return order.view(channels, height, width)
        return order.view(height, width, channels).permute(2, 0, 1)


def blocks(size: int) -> Iterator[tuple[int, int]]:
    """The blocks (first, past the last) of one pass over ``size`` values: all, the halves, ..., each value alone."""
    for level in range(math.ceil(math.log2(size)) + 1):
        length = -(-size // 2**level)
        for first in range(0, size, length):
            yield first, min(first + length, size)


def passes(size: int) -> Iterator[tuple[int, int] | None]:
    """What each query flips, without end; ``None`` starts a pass."""
    while True:
        yield None
        yield from blocks(size)
