"""ZO-signSGD: signs of a gradient that is estimated from forward differences."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.estimation import PROBES, REL_STEP, Walk, check, descend, directions, finite
from attacks.scored import Scored
from bench.norms import per_sample
from bench.oracle import Oracle
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat


@attacks("zo-sign-sgd")
@dataclass(frozen=True, kw_only=True)
class ZOSignSGD(Scored):
    """Zeroth-order sign descent (Liu et al., ICLR 2019), untargeted, in linf and l2.

    Each step costs ``q + 1`` queries: the iterate, which is the base of the differences and the check of the step
    before, and q probes. In l2 the step goes along the sign, too, as in the authors' code, and is ``rel_step * eps``
    long. The first base is the clean image. At the end of the budget q shrinks; queries too few for another estimate go
    to further steps along the last one.

    Probes are projected into ball and box. At the corners of the linf ball they all move inwards in most pixels, which
    shifts every difference alike and would drown the gradient, so the mean difference of a step is taken off there.
    Where no probe is projected, that leaves the estimate at (q - 1) / q of what it was on average. In l2 the shift is
    of second order, eta^2 / (2 eps), and taking it off would cost one probe in four.

    Args:
        eta: l2 length of a probe, about: noise is divided by sqrt(d). 0.1 is usual for ImageNet; a service that rounds
            to 8 bit hides probes much shorter than sqrt(d) / 255.
        q: probes in a step, at least 2; 20 (linf) or 4 (l2) by default, 50 for ImageNet.
        rel_step: length of a step as a fraction of eps; 0.25 (linf) or 0.5 (l2) by default.
        loss: what is minimised, ``margin``, ``ce`` (the log-likelihood) or ``dlr``, which no scale of scores moves.

    Source: Liu et al., openreview BJe-DsC5Fm, algorithm 1; eta, q and steps as in the public code of SignHunter,
    which compares with it.
    """

    eta: float = 0.01
    q: int | None = None
    rel_step: float | None = None
    loss: Literal["margin", "ce", "dlr"] = "margin"

    access: ClassVar[Access] = "scores"
    fine_scores: ClassVar[bool] = True
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Liu et al., 2019, openreview:BJe-DsC5Fm"

    def __post_init__(self) -> None:
        check(self.eta, self.q, self.rel_step, self.loss, fewest=2)

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns the last iterate of each sample that was asked about."""
        q = PROBES[threat.norm] if self.q is None else self.q
        length = threat.eps * (REL_STEP[threat.norm] if self.rel_step is None else self.rel_step)

        def estimate(walk: Walk, rng: SampleRng, spare: int) -> tuple[Tensor, int]:
            """The signs (n, C, H, W) of the gradient, about."""
            count = min(q, spare)
            if count < 2:
                return walk.memory, 0
            along, noises = torch.zeros_like(walk.u), torch.zeros_like(walk.u)
            mean = torch.zeros_like(walk.u[:, 0, 0, 0])
            for noise in directions(rng, walk.u, count, 1):                              # (n, k, C, H, W)
                values, _ = walk.ask(walk.u[:, None] + self.eta * noise)                 # (n, k)
                rise = (finite(values - walk.value[:, None]) / self.eta).to(walk.u)
                along += torch.einsum("nk,nkchw->nchw", rise, noise)
                noises, mean = noises + noise.sum(dim=1), mean + rise.sum(dim=1) / count
            return (along - per_sample(mean) * noises if threat.norm == "linf" else along).sign(), count

        signs = torch.zeros_like(x)
        return descend(
            oracle, x, y, threat, rng, estimate, loss=self.loss, length=length, memory=signs, ask_clean=True
        )
