"""PMA: projected ascent on the margin of probabilities, taken apart at first; PMA+ with APGD-T after it."""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from attacks.apgd_t import TargetedAPGD
from attacks.autoattack import Member, cascade
from attacks.descent import Descent
from bench.losses import Loss, check_classes, probability, probability_margin
from bench.norms import project
from bench.oracle import Oracle
from bench.ranges import Count
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

RUNS = 2  # for each restart: one lowers the true class at first, one raises its rival


@attacks("pma")
@dataclass(frozen=True, kw_only=True)
class PMA:
    """Probability margin attack (Xie et al., 2024), in linf.

    Sign steps on the margin of softmax probabilities. In the first half of a run only one side of the margin counts, in
    one run the true class, in the other its strongest rival, so that neither hides the other's gradient. Steps fall
    from 2 eps by a cosine, twice: in the first half and in the second. Costs ``2 * restarts * (steps + 1)`` forward and
    ``2 * restarts * steps`` backward passes; a sample stops at its first success.

    As released, the very first step goes up the true class, away from flat ground. Unlike there, the random start is
    clamped to the box, without which the first queries were no images.

    Source: arXiv:2411.15210, and the authors' code for what it takes from margin decomposition (arXiv:2006.13726).
    """

    steps: Count = 100
    restarts: Count = 1

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Xie et al., 2024, arXiv:2411.15210"

    @property
    def most_queries(self) -> int:
        """Forward passes that a sample costs which never falls."""
        return RUNS * self.restarts * (self.steps + 1)

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's point of the lowest margin."""
        descent = Descent(oracle, x, y, threat, probability_margin)
        for run in range(RUNS * self.restarts):
            noise = rng.fork(run).uniform(*x.shape[1:]).to(x) * 2 - 1
            u = project(x + threat.eps * noise, x, threat)
            if not descent.run(u, self.steps, partial(self._loss, run % RUNS), self._size):
                break
        return descent.best

    def _loss(self, run: int, step: int) -> Loss:
        """What this step minimises."""
        if step == 0:
            return lambda logits, y: -probability(logits, y)
        if step >= self.steps / 2:
            return probability_margin
        return probability if run == 0 else _rival

    def _size(self, step: int) -> float:
        """The length of a step as a share of eps."""
        half = self.steps / 2
        done = step - 1 if step <= half else step - half - 1
        return 1 + math.cos(math.pi * done / (self.steps - half))


@attacks("pma-plus")
@dataclass(frozen=True, kw_only=True)
class PMAPlus:
    """PMA, then APGD-T on what it has left: for under a quarter of the passes that AutoAttack needs.

    ``fell_to`` of a sample's record names which of the two beat it.

    Source: Xie et al., 2024, arXiv:2411.15210, PMA+.
    """

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Xie et al., 2024, arXiv:2411.15210"
    members: ClassVar[tuple[Member, ...]] = (Member("pma", PMA()), Member("apgd-t", TargetedAPGD()))

    def check(self, classes: int, shape: tuple[int, int, int]) -> None:
        """Whether the data have the classes that APGD-T compares."""
        check_classes("dlr", classes, fewest=4)

    @property
    def most_queries(self) -> int:
        """Forward passes that a sample costs which never falls."""
        return sum(member.queries for member in self.members)

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns what APGD-T came to for those that stand."""
        return cascade(self.members, oracle, x, y, threat, rng)


def _rival(logits: Tensor, y: Tensor) -> Tensor:
    """Minus the probability (n,) of the strongest wrong class."""
    return probability_margin(logits, y) - probability(logits, y)
