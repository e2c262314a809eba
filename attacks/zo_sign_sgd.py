"""ZO-signSGD: signs of a gradient that is estimated from forward differences."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.nes import PAIRS, REL_STEP, check, directions, finite, inside, losses
from bench.losses import LOSSES
from bench.norms import per_sample, project, steepest
from bench.oracle import Oracle
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat


@attacks("zo-sign-sgd")
@dataclass(frozen=True, kw_only=True)
class ZOSignSGD:
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
        loss: what is minimised, ``margin`` or ``ce`` (the log-likelihood).

    Source: Liu et al., openreview BJe-DsC5Fm, algorithm 1; eta, q and steps as in the public code of SignHunter,
    which compares with it.
    """

    eta: float = 0.01
    q: int | None = None
    rel_step: float | None = None
    loss: Literal["margin", "ce"] = "margin"

    access: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Liu et al., 2019, openreview:BJe-DsC5Fm"

    def __post_init__(self) -> None:
        check(self.eta, self.q, self.rel_step, self.loss, fewest=2)

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns the last iterate of each sample that was asked about."""
        q = PAIRS[threat.norm] if self.q is None else self.q
        length = threat.eps * (REL_STEP[threat.norm] if self.rel_step is None else self.rel_step)

        u, rows = x.clone(), torch.arange(len(x), device=x.device)
        labels, clean, now, signs, streams = y, x, x, torch.zeros_like(x), rng
        left, step = oracle.query_budget, 0
        while left > 0:
            active = oracle.active()
            if len(active) == 0:
                break
            if active is not rows:  # gather anew only when somebody has dropped out
                u[rows] = now
                stay = torch.searchsorted(rows, active)
                labels, clean, now, signs = (part[stay] for part in (labels, clean, now, signs))
                rows, streams = active, rng[active]
            if step > 0:
                now = project(now - length * steepest(signs, threat.norm), clean, threat)
            base = LOSSES[self.loss](oracle.scores(now, rows), labels)
            probes = min(q, left - 2)  # one is kept for the image that they lead to
            if probes >= 2:
                stream = streams.fork(step)
                signs = self._estimate(oracle, rows, now, clean, labels, base, threat, stream, probes).sign()
                left -= probes
            left, step = left - 1, step + 1
        u[rows] = now
        return u

    def _estimate(
        self,
        oracle: Oracle,
        rows: Tensor,
        u: Tensor,
        x: Tensor,
        y: Tensor,
        base: Tensor,
        threat: Threat,
        rng: SampleRng,
        count: int,
    ) -> Tensor:
        """``count`` times the gradient (n, C, H, W) at ``u``, about, where the loss is ``base`` (n,)."""
        along, noises, mean = torch.zeros_like(u), torch.zeros_like(u), torch.zeros_like(u[:, 0, 0, 0])
        for noise in directions(rng, u, count, 1):                       # (n, k, C, H, W)
            probes = inside(u[:, None] + self.eta * noise, x, threat)
            values = losses(oracle.scores(probes, rows), y, self.loss)
            rise = (finite(values - base[:, None]) / self.eta).to(u)     # (n, k)
            along += torch.einsum("nk,nkchw->nchw", rise, noise)
            noises, mean = noises + noise.sum(dim=1), mean + rise.sum(dim=1) / count
        return along - per_sample(mean) * noises if threat.norm == "linf" else along
