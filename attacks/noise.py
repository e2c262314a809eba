"""Random noise: the control that an attack has to beat."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench.norms import lp_norm, per_sample, project
from bench.oracle import Oracle
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat


@attacks("noise")
@dataclass(frozen=True, kw_only=True)
class Noise:
    """Ask about one independent draw after the other from the ball, until one is misclassified.

    A sample that falls to it and not to an attack of the same radius shows that the attack failed. It learns nothing
    from the answers. Draws are clamped to the box.

    Args:
        kind: in linf, ``uniform`` draws every value from the whole range, ``corner`` one of its two ends. In l2 both
            draw a direction uniformly and go to the sphere.

    Source: the random perturbations of Carlini et al., 2019, arXiv:1902.06705, who ask for 10,000 for each image.
    """

    kind: Literal["uniform", "corner"] = "uniform"

    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Carlini et al., 2019, arXiv:1902.06705"

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's last draw."""
        u, rows = x.clone(), torch.arange(len(x), device=x.device)
        clean, streams, draw = x, rng, x
        for query in range(oracle.query_budget):
            active = oracle.active()
            if len(active) == 0:
                break
            if active is not rows:  # gather anew only when somebody has dropped out
                u[rows] = draw
                rows, clean, streams = active, x[active], rng[active]
            draw = project(clean + threat.eps * self._direction(clean, threat.norm, streams.fork(query)), clean, threat)
            oracle.labels(draw, rows)
        u[rows] = draw
        return u

    def _direction(self, x: Tensor, norm: Norm, rng: SampleRng) -> Tensor:
        """(n, C, H, W) like ``x``, in the unit ball."""
        shape = x.shape[1:]
        if norm == "l2":
            normal = rng.normal(*shape).to(x)
            return normal / per_sample(lp_norm(normal, "l2"))
        return (rng.uniform(*shape) if self.kind == "uniform" else rng.coins(*shape)).to(x) * 2 - 1
