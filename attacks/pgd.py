"""Projected gradient descent."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.descent import Descent
from bench.errors import ConfigError
from bench.losses import WITH_DLR, check_classes
from bench.norms import lp_norm, per_sample, project
from bench.oracle import Oracle
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat


@attacks("pgd")
@dataclass(frozen=True, kw_only=True)
class PGD:
    """Steepest descent on the log-likelihood (or the margin, or DLR) with projection, from random starts.

    Costs ``restarts * (steps + 1)`` forward and ``restarts * steps`` backward passes; a sample stops at its first
    success, and the last iterate of every restart is asked about, too. The first step is ``rel_step * eps`` long; under
    the ``cosine`` schedule steps fall to nothing over ``steps``, so a budget below ``steps`` cuts them short.

    The defaults are measured ones. Images left after 40 steps from one start in linf, on digits with ``cnn`` (300
    images), undefended at eps 0.1 and adversarially trained at eps 0.2, and on CIFAR-10 with ResNet-20 (100) at 1/255:
    constant steps of eps / 10 on the margin 68.0, 37.0 and 39.0 %, on the likelihood 65.7, 28.7 and 39.0 %, falling
    steps on the likelihood from eps 63.7 and 21.3 %, from 2 eps 63.0, 19.3 and 38.0 %.

    Source: Madry et al., 2018, arXiv:1706.06083, section 2.1; random l2 starts are uniform in the ball.
    """

    steps: int = 40
    rel_step: float = 2.0
    restarts: int = 1
    loss: Literal["margin", "ce", "dlr"] = "ce"
    start: Literal["random", "clean"] = "random"
    schedule: Literal["cosine", "constant"] = "cosine"

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    version: ClassVar[int] = 2  # 1 took constant steps of 0.1 eps on the margin
    paper: ClassVar[str] = "Madry et al., 2018, arXiv:1706.06083"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or self.rel_step <= 0:
            raise ConfigError(
                f"steps={self.steps}, restarts={self.restarts}, rel_step={self.rel_step:g}; all must be above zero"
            )

    def check(self, classes: int, shape: tuple[int, int, int]) -> None:
        """Whether the data have the classes that the loss compares."""
        check_classes(self.loss, classes)

    @property
    def most_queries(self) -> int:
        """Forward passes that a sample costs which never falls."""
        return self.restarts * (self.steps + 1)

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's iterate of the largest loss."""
        loss = WITH_DLR[self.loss]
        descent = Descent(oracle, x, y, threat, loss)
        for restart in range(self.restarts):
            u = x.clone() if self.start == "clean" and restart == 0 else self._start(x, threat, rng.fork(restart))
            if not descent.run(u, self.steps, lambda step: loss, self._size):
                break
        return descent.best

    def _size(self, step: int) -> float:
        """The length of a step as a share of eps."""
        left = (1 + math.cos(math.pi * step / self.steps)) / 2 if self.schedule == "cosine" else 1.0
        return self.rel_step * left

    def _start(self, x: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """Points drawn uniformly from the ball around ``x``, then clamped to the box."""
        shape = x.shape[1:]
        if threat.norm == "linf":
            direction, radius = rng.uniform(*shape).to(x) * 2 - 1, torch.ones(len(x), dtype=x.dtype, device=x.device)
        else:
            normal = rng.normal(*shape).to(x)
            direction = normal / per_sample(lp_norm(normal, "l2"))
            radius = rng.fork("radius").uniform().to(x) ** (1 / shape.numel())
        return project(x + threat.eps * per_sample(radius) * direction, x, threat)
