"""Transfer: examples of other networks, or of the undefended twin, which tells confused attacks from robust models."""

from dataclasses import dataclass, replace
from typing import ClassVar, cast

from torch import Tensor

from attacks.pgd import PGD
from attacks.sourced import Sourced
from bench.errors import ConfigError
from bench.norms import project
from bench.oracle import Oracle, Referee
from bench.protocols import Attack
from bench.registry import added, attacks
from bench.rng import SampleRng
from bench.rules import rules_of
from bench.threat import Access, Norm, Threat

UNKNOWN = 10_000  # queries of the network itself for an attack that does not say how many it needs


@attacks("transfer")
@dataclass(frozen=True, kw_only=True)
class Transfer(Sourced):
    """PGD on another network, replayed on the served one, which tells labels only.

    With ``from`` it is the attack of those who know no more of a service than what it does, and train or find a network
    that does the same. Left out, it works on the served network without its output defense, and is a control.

    A defense that keeps decisions must lose to the control what the undefended network loses to PGD; if it loses less
    to attacks that query it, it has confused them. Costs one query for each restart, and only samples that are left
    restart.

    Every example takes all steps and is the iterate with the lowest margin on the twin: the first that beats the twin
    would lie so close to its boundary that 8 bits, other numbers or noise undo it. So samples that the twin gets wrong
    when clean need no rule of their own; they are pushed on like all others. A sample that no replay beats ends at its
    last example. Work on the twin costs no queries, and is counted apart.

    Args:
        from_: see :class:`attacks.sourced.Sourced`.
        attack: any attack by gradients that makes the examples in place of that PGD, ``attack=apgd(steps=50)``; what
            misclassifies there does not end it.
        steps, rel_step: of PGD.
        restarts: examples for each sample, from different random starts; the budget may allow fewer.

    Source: the check by transfer of Carlini et al., 2019, arXiv:1902.06705; PGD in equal steps on the margin, as in
        :class:`attacks.pgd.PGD`.
    """

    attack: str = added("")
    steps: int = 100
    rel_step: float = 0.1
    restarts: int = 1

    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Carlini et al., 2019, arXiv:1902.06705"

    def __post_init__(self) -> None:
        PGD(steps=self.steps, rel_step=self.rel_step, restarts=self.restarts)  # complains about impossible ones
        if not self.attack:
            return
        if (self.steps, self.rel_step) != (Transfer.steps, Transfer.rel_step):
            raise ConfigError(f"steps and rel_step are those of its own PGD; give {self.attack} its own")
        if (access := attacks.create(self.attack).access) != "gradients":
            instead = f"write {self.attack}(from=...)" if access == "labels" else "name one that takes gradients"
            raise ConfigError(f"attack={self.attack} asks for {access}, and examples are made by gradients; {instead}")

    @property
    def replays(self) -> str:
        """The attack whose examples it takes; its own PGD where that is empty."""
        return self.attack

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
        """Examples on the surrogate, before a referee of its own, to whom no sample falls: all take every step."""
        maker = self._maker()
        allowed = replace(threat, access="gradients", query_budget=getattr(maker, "most_queries", UNKNOWN))
        judge = Referee(
            oracle.surrogate, x, y, allowed, rng, rules=rules_of(maker), falls=False,
            classes=oracle.classes if self.attack else None, attack=self.attack or "pgd",
        )  # fmt: skip
        found = maker(judge.oracle, x, y, allowed, rng)
        return project(found, x, threat) if self.attack else found

    def _maker(self) -> Attack:
        if self.attack:
            return cast(Attack, attacks.create(self.attack))
        return PGD(steps=self.steps, rel_step=self.rel_step, loss="margin", schedule="constant")
