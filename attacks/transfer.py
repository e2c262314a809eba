"""Transfer from the undefended twin: the control that tells a confused attack from a robust model."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from attacks.pgd import PGD
from bench.oracle import Oracle, Referee, Rules
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat


@attacks("transfer")
@dataclass(frozen=True, kw_only=True)
class Transfer:
    """PGD on the served network without its output defense, replayed on the defended one, which tells labels only.

    A defense that keeps decisions must lose to it what the undefended network loses to PGD; if it loses less to attacks
    that query it, it has confused them. Costs one query for each restart, and only samples that are left restart.

    Every example takes all steps and is the iterate with the lowest margin on the twin: the first that beats the twin
    would lie so close to its boundary that 8 bits, other numbers or noise undo it. So samples that the twin gets wrong
    when clean need no rule of their own; they are pushed on like all others. A sample that no replay beats ends at its
    last example. All work on the twin is free.

    Args:
        steps, rel_step: of PGD.
        restarts: examples for each sample, from different random starts; the budget may allow fewer.

    Source: the check by transfer of Carlini et al., 2019, arXiv:1902.06705; PGD in equal steps on the margin, as in
        :class:`attacks.pgd.PGD`.
    """

    steps: int = 100
    rel_step: float = 0.1
    restarts: int = 1

    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    rules: ClassVar[Rules] = Rules(surrogate=True)
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Carlini et al., 2019, arXiv:1902.06705"

    def __post_init__(self) -> None:
        PGD(steps=self.steps, rel_step=self.rel_step, restarts=self.restarts)  # complains about impossible ones

    @property
    def most_queries(self) -> int:
        """Forward passes that a sample costs which never falls."""
        return self.restarts

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's last example."""
        x_adv = x.clone()
        for restart in range(self.restarts):
            rows = oracle.active()
            if len(rows) == 0:
                break
            x_adv[rows] = self._craft(oracle, x[rows], y[rows], threat, rng[rows].fork(restart))
            oracle.labels(x_adv[rows], rows)
        return x_adv

    def _craft(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """PGD's examples on the twin; their oracle has a ball of radius 0, in which none falls: all take every step."""
        pgd = PGD(steps=self.steps, rel_step=self.rel_step, loss="margin", schedule="constant")
        white_box = replace(threat, eps=0.0, access="gradients", query_budget=pgd.most_queries)
        return pgd(Referee(oracle.surrogate, x, y, white_box, rng, rules=Rules(minimal=True)).oracle, x, y, threat, rng)
