"""SimBA: a walk along the vectors of an orthonormal basis, from scores alone."""

import math
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


@attacks("simba")
@dataclass(frozen=True, kw_only=True)
class SimBA(Scored):
    """Simple black-box attack (Guo et al., ICML 2019), untargeted, in linf and l2.

    Takes the vectors of a basis in an order of each sample's own, tries a step down and, where that did not lower the
    loss, a step up. Costs one query for the clean image and one for each try. Every sample walks at its own pace, so
    the second try is asked only where the first has failed.

    A sample walks unbounded, as in the authors' code, and what it asks about is the projection of where it stands. A
    wave that the ball has flattened keeps its full height underneath and shapes every later query; projecting after
    each step instead forgets it, and left 18.0 % of 200 CIFAR-10 images standing after 500 queries in linf 8/255 where
    this leaves 6.0 %. A sample that has come to the end of its basis starts again at the front; the authors stop.

    Args:
        basis: ``pixel``, single values of the image, or ``dct``, cosine waves over one channel.
        step: length of a step; 0.2 by default, and at most eps / 5 in l2.
        freq_dims: cosine waves below this frequency in both directions come first; 28 is usual for ImageNet.
        stride: how many frequencies are added at a time after that.
        loss: what is minimised, ``margin``, ``prob`` (the probability of the true class, as in the paper; in float32 it
            is 1 for all candidates where a network is confident, and then nothing improves), ``ce`` (its logarithm:
            the same choices up to rounding, and 0 as early) or ``dlr``, which no scale of scores moves.

    Source: arXiv:1905.07121, algorithm 1; order of the waves as in the authors' code.
    """

    basis: Literal["pixel", "dct"] = "dct"
    step: float | None = None
    freq_dims: int = 32
    stride: int = 7
    loss: Literal["margin", "ce", "prob", "dlr"] = "margin"

    access: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    version: ClassVar[int] = 2  # 1 projected the incumbent after every step
    paper: ClassVar[str] = "Guo et al., 2019, arXiv:1905.07121"

    def __post_init__(self) -> None:
        if self.basis not in ("pixel", "dct"):
            raise ConfigError(f"basis is {self.basis!r}; use pixel or dct")
        if self.step is not None and not 0 < self.step < math.inf:
            raise ConfigError(f"step is {self.step:g}; it is a length on the pixel scale, above 0")
        if self.freq_dims < 1 or self.stride < 1:
            raise ConfigError(f"freq_dims={self.freq_dims}, stride={self.stride}; both must be at least 1")
        if self.loss not in WITH_DLR:
            raise ConfigError(f"loss is {self.loss!r}; use one of {', '.join(WITH_DLR)}")

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns what each sample's incumbent looks like in the ball."""
        loss, waves = WITH_DLR[self.loss], self._waves(x)
        step, order = self._step(threat), self._order(x, rng.fork("order"), oracle.query_budget)

        rows = torch.arange(len(x), device=x.device)
        lowest = loss(oracle.scores(x, rows), y).to(x).nan_to_num(nan=torch.inf)
        u, labels, clean, incumbent = x.clone(), y, x, x
        turn, second = torch.zeros_like(y), torch.zeros_like(y, dtype=torch.bool)  # which vector, and which try
        for _ in range(1, oracle.query_budget):
            active = oracle.active()
            if len(active) == 0:
                break
            if active is not rows:  # gather anew only when somebody has dropped out
                u[rows] = incumbent
                stay = torch.searchsorted(rows, active)
                labels, clean, incumbent, lowest, order, turn, second = (
                    part[stay] for part in (labels, clean, incumbent, lowest, order, turn, second)
                )
                rows = active
            number = order.gather(1, (turn % order.shape[1])[:, None]).squeeze(1)
            signed = torch.where(second, 1, -1).to(x) * step
            candidate = _add(incumbent, number, signed, waves)
            value = loss(oracle.scores(project(candidate, clean, threat), rows), labels).to(lowest)
            better = value < lowest  # never for NaN, the answer of a finished sample
            incumbent = choose(better, candidate, incumbent)
            lowest = torch.where(better, value, lowest)
            turn = turn + (better | second)
            second = ~(better | second)
        u[rows] = incumbent
        return project(u, x, threat)

    def _step(self, threat: Threat) -> float:
        if self.step is not None:
            return self.step
        return min(0.2, threat.eps / 5) if threat.norm == "l2" else 0.2

    def _waves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The factors (H, H) and (W, W) of the basis: each of its vectors is a row of one times a row of the other."""
        down, across = (cosines(length) if self.basis == "dct" else torch.eye(length) for length in x.shape[2:])
        return down.to(x), across.to(x)

    def _order(self, x: Tensor, rng: SampleRng, queries: int) -> Tensor:
        """The numbers (B, at most ``queries``) of the vectors each sample takes, low frequencies first."""
        channels, height, width = x.shape[1:]
        lots = (rng.words(channels * height * width) >> 16) & ((1 << 48) - 1)
        if self.basis == "dct":
            down, across = (torch.arange(length, device=x.device) for length in (height, width))
            beyond = (torch.maximum(down[:, None], across) - self.freq_dims).clamp(min=-1)
            ring = beyond.div(self.stride, rounding_mode="floor") + 1                  # (H, W), 0 below freq_dims
            lots = lots + (ring.flatten().repeat(channels) << 48)
        return lots.argsort(dim=1)[:, :queries].clone()  # the copy lets go of the rest


def cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (size, size), float64: row a is a wave of a half-periods (DCT-II)."""
    index = torch.arange(size, dtype=torch.float64)
    table = math.sqrt(2 / size) * torch.cos(math.pi * (2 * index + 1) * index[:, None] / (2 * size))
    table[0] = math.sqrt(1 / size)
    return table


def _add(u: Tensor, number: Tensor, length: Tensor, waves: tuple[Tensor, Tensor]) -> Tensor:
    """``u`` (n, C, H, W) plus ``length`` (n,) times the basis vector ``number`` (n,), counted in order (C, H, W)."""
    height, width = u.shape[2:]
    channel, down, across = number // (height * width), number // width % height, number % width
    moved = u.clone()
    wave = (length[:, None] * waves[0][down])[:, :, None] * waves[1][across][:, None]  # (n, H, W)
    moved[torch.arange(len(u), device=u.device), channel] += wave
    return moved
