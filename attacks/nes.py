"""NES: steps along a gradient that is estimated from pairs of opposite Gaussian probes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.estimation import PROBES, REL_STEP, Walk, check, descend, directions, finite
from attacks.scored import Scored
from bench.oracle import Oracle
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat


@attacks("nes")
@dataclass(frozen=True, kw_only=True)
class NES(Scored):
    """Natural evolution strategies (Ilyas et al., ICML 2018), untargeted, in linf and l2.

    Each step costs ``2 q + 1`` queries: q pairs of probes and the new iterate. Probes are queries like all others, so
    one that is misclassified ends the search. At the end of the budget q shrinks; queries too few for another pair go
    to further steps along the last estimate.

    Probes are projected into ball and box, and each difference of losses is laid along the difference of the projected
    probes (which is 2 eta n_j where nothing was projected). Opposite probes are shortened alike on average, so the
    estimate keeps the signs of the gradient.

    Args:
        eta: l2 length of a probe, about: noise is divided by sqrt(d). 0.1 is usual for ImageNet; a service that rounds
            to 8 bit hides probes much shorter than sqrt(d) / 255.
        q: pairs in a step; 20 (linf) or 4 (l2) by default, 50 for ImageNet.
        rel_step: length of a step as a fraction of eps; 0.25 (linf) or 0.5 (l2) by default.
        loss: what is minimised, ``margin``, ``ce`` (the log-likelihood) or ``dlr``, which no scale of scores moves.

    Source: arXiv:1804.08598, algorithm 1 and its projected sign steps; eta, q and steps as in the public code of
    SignHunter, which compares with it.
    """

    eta: float = 0.01
    q: int | None = None
    rel_step: float | None = None
    loss: Literal["margin", "ce", "dlr"] = "margin"

    access: ClassVar[Access] = "scores"
    fine_scores: ClassVar[bool] = True
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Ilyas et al., 2018, arXiv:1804.08598"

    def __post_init__(self) -> None:
        check(self.eta, self.q, self.rel_step, self.loss, fewest=1)

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's last iterate."""
        q = PROBES[threat.norm] if self.q is None else self.q
        length = threat.eps * (REL_STEP[threat.norm] if self.rel_step is None else self.rel_step)

        def estimate(walk: Walk, rng: SampleRng, spare: int) -> tuple[Tensor, int]:
            """The pairs times the gradient (n, C, H, W), about."""
            pairs = min(q, spare // 2)
            if pairs == 0:
                return walk.memory, 0
            gradient = torch.zeros_like(walk.u)
            for noise in directions(rng, walk.u, pairs, 2):                              # (n, k, C, H, W)
                opposite = torch.stack((self.eta * noise, -self.eta * noise), dim=2)     # (n, k, 2, C, H, W)
                values, probes = walk.ask(walk.u[:, None] + opposite.flatten(1, 2))      # (n, 2 k)
                rise = finite(values[:, ::2] - values[:, 1::2]) / (2 * self.eta)         # (n, k)
                apart = (probes[:, ::2] - probes[:, 1::2]) / (2 * self.eta)
                gradient += torch.einsum("nk,nkchw->nchw", rise.to(walk.u), apart)
            return gradient, 2 * pairs

        memory = torch.zeros_like(x)
        return descend(oracle, x, y, threat, rng, estimate, loss=self.loss, length=length, memory=memory)
