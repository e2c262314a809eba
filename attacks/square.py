"""Square: random search over square windows, from scores alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from attacks.windows import Proposals, proposals
from bench.errors import ConfigError
from bench.losses import SCORES, check_classes, margin
from bench.norms import choose
from bench.oracle import Oracle
from bench.registry import added, attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

# Iterations, of a run of 10,000, after which the share of changed pixels halves.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

# What each public code does, where it changes a figure. Windows are drawn for each sample by itself in all of them:
# sharing them, as two of the three do, only correlates the samples.
PRESETS: dict[str | None, dict[str, Any]] = {
    None: {},
    "eccv2020": {"rescale": True, "edges": "reference", "accept": "loss"},
    "autoattack": {"p_init": 0.8, "edges": "reference", "accept": "loss_or_fooled"},
    "aaa": {"p_init": 0.3, "edges": "reference", "accept": "loss"},
    "aaa-standard": {"p_init": 0.05, "edges": "reference", "accept": "loss"},
}
DEFAULTS = {"rescale": False, "edges": "inclusive", "accept": "loss_or_fooled"}
P_INIT: dict[str, float] = {"linf": 0.05, "l2": 0.1, "l1": 0.8}  # the papers' choice for undefended models

Values = Callable[[Tensor, Tensor], Tensor]  # logits (n, K) and labels (n,) to what a rule compares (n,)
# Incumbent's value, candidate's value and the rule's memory, an int64 for each sample that starts at 0, all (n,), and
# the streams of this step, of which the proposals take their own forks; which candidates to take and the memory after
# that. A NaN, the answer that a finished sample gets, is never taken.
Rule = Callable[[Tensor, Tensor, Tensor, SampleRng], tuple[Tensor, Tensor]]


class ScoreOracle(Protocol):
    """What a search asks: the oracle, or something that stands before it."""

    @property
    def query_budget(self) -> int:
        """How many images it may ask about for each sample."""
        ...

    def active(self) -> Tensor:
        """The rows (n,) worth asking about, the same tensor until somebody has dropped out."""
        ...

    def scores(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits (n, K) of ``x`` (n, C, H, W)."""
        ...


def lower(lowest: Tensor, value: Tensor, memory: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
    """Square's rule: take what lowers the value."""
    return value < lowest, memory


@attacks("square")
@dataclass(frozen=True, kw_only=True)
class Square:
    """Square attack (Andriushchenko et al., ECCV 2020), untargeted or targeted, in linf, l2 and l1.

    One query for the start and one for each proposal; a sample stops at its first misclassified query. Every sample
    draws its own windows and signs.

    The targeted form pulls each sample towards a class of its own, drawn uniformly from the wrong ones. It is a way to
    search and no other goal: a sample falls, and stops, at its first misclassified query, whatever the class, and
    whether the target was reached is not counted. Targets are usually sought with a smaller ``p_init`` and a larger
    budget, up to 100,000; the published code names no value, so the default stays.

    Args:
        preset: ``eccv2020`` (schedule rescaled to the budget), ``autoattack`` (p_init 0.8), or ``aaa`` and
            ``aaa-standard`` (schedule of a run of 10,000): AAA's code takes p_init 0.3 for every network but the one
            called Standard, its undefended CIFAR-10 network, where it takes 0.05. So the figures of AAA on CIFAR-10
            belong to ``aaa-standard``; ``aaa`` is the stronger one on AAA, and ranks. Arguments that are given win over
            the preset.
        p_init: share of the pixels in the first windows; 0.05 (linf), 0.1 (l2) or 0.8 (l1) by default.
        loss: what is minimised, ``margin``, ``ce`` (the log-likelihood) or ``prob`` (the probability) of the label, or
            ``dlr``, the margin that sees through any scale that a defense puts on its scores, or ``unit``, which does
            so with two classes, too; the targeted form maximises that of the target, as both public codes do with
            ``ce``.
        accept: take a proposal when the ``loss`` falls, or also when it is misclassified (``loss_or_fooled``), as the
            target where there is one.
        rescale: stretch the schedule over the query budget; then one run does not answer for smaller budgets.
        edges: ``inclusive`` lets windows reach the last row and column, ``reference`` never does, like the public code.
        targeted: draw a wrong class for each sample and raise it, where otherwise its label is lowered.

    Source: arXiv:1912.00049, algorithms 1 to 3; schedule and l2 windows as in the authors' code. In l1 as in
    arXiv:2103.01208, section 4.
    """

    preset: Literal["eccv2020", "autoattack", "aaa", "aaa-standard"] | None = None
    p_init: float | None = None
    loss: Literal["margin", "ce", "prob", "dlr", "unit"] = "margin"
    accept: Literal["loss", "loss_or_fooled"] | None = None
    rescale: bool | None = None
    edges: Literal["inclusive", "reference"] | None = None
    targeted: bool = added(False)

    access: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l1", "l2", "linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Andriushchenko et al., 2020, arXiv:1912.00049"

    @property
    def top_scores(self) -> bool:
        """Whether it does with the scores of the best classes: a target may be any, dlr sees the third, unit all."""
        return not self.targeted and self.loss not in ("dlr", "unit")

    def __post_init__(self) -> None:
        for name, value in {**DEFAULTS, **PRESETS[self.preset]}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.p_init is not None and not 0 < self.p_init <= 1:
            raise ConfigError(f"p_init is {self.p_init:g}; it is a share of the pixels, above 0 and at most 1")

    def check(self, classes: int, shape: tuple[int, int, int]) -> None:
        """Whether the data have the classes that the loss compares."""
        check_classes(self.loss, classes)

    @property
    def rescaled(self) -> bool:
        """Whether the schedule follows the budget, so that smaller budgets cannot be read off this run."""
        return bool(self.rescale)

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's incumbent."""
        return self.search(oracle, x, y, threat, rng, self._loss, lower)

    def search(
        self, oracle: ScoreOracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng, values: Values, rule: Rule,
        beside: Callable[[Proposals, Tensor], Proposals] = lambda own, rows: own,
    ) -> Tensor:
        """Square's proposals under any ``rule`` over any ``values``; returns each sample's incumbent (B, C, H, W).

        ``beside(own, rows)`` may have others beside Square's ``own`` proposals for the samples ``rows`` (n,).
        """
        inset = 1 if self.edges == "reference" else 0
        u = proposals(x, threat, inset).start(rng.fork("start"))
        first = oracle.scores(u)
        if self.targeted:
            y = wrong_classes(rng.fork("target"), y, first.shape[1])
        best = values(first, y)
        memory = torch.zeros_like(y)
        p_init = P_INIT[threat.norm] if self.p_init is None else self.p_init

        rows = torch.arange(len(x), device=x.device)
        search, labels, streams = beside(proposals(x, threat, inset), rows), y, rng
        work = u.clone(), best.clone(), memory.clone()
        for step in range(1, oracle.query_budget):
            active = oracle.active()
            if len(active) == 0:
                break
            if active is not rows:  # gather anew only when somebody has dropped out
                u[rows], best[rows], memory[rows] = work
                rows, labels, streams = active, y[active], rng[active]
                search = beside(proposals(x[active], threat, inset), rows)
                work = u[active], best[active], memory[active]
            incumbent, held, known = work
            side = window_side(self._share(p_init, step - 1, oracle.query_budget), x.shape[2:])
            here = streams.fork(step)
            candidate = search.propose(incumbent, side, here)
            value = values(oracle.scores(candidate, rows), labels)
            taken, known = rule(held, value, known, here)
            work = choose(taken, candidate, incumbent), torch.where(taken, value, held), known
        u[rows], best[rows], memory[rows] = work
        return u

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """What :class:`Square` minimises (n,); ``y`` holds the targets of a targeted search, which are to win."""
        side = -1 if self.targeted else 1
        value = side * SCORES[self.loss](logits, y)
        if self.accept == "loss_or_fooled" and self.loss != "margin":  # under the margin, fooled is lower already
            value = torch.where(side * margin(logits, y) <= 0, -math.inf, value)
        return value

    def _share(self, p_init: float, iteration: int, budget: int) -> float:
        """The share of pixels in a window at ``iteration``, counted from 0."""
        if self.rescale:
            iteration = int(iteration / budget * 10_000)
        return p_init * 0.5 ** sum(iteration > bound for bound in HALVINGS)


def window_side(share: float, size: tuple[int, ...] | torch.Size) -> int:
    """The side of a square that covers ``share`` of an image of ``size`` (H, W), 1 .. min(H, W) - 1."""
    height, width = size
    return max(1, min(round(math.sqrt(share * height * width)), min(height, width) - 1))


def wrong_classes(rng: SampleRng, y: Tensor, classes: int) -> Tensor:
    """A class (B,) for each sample, uniform over all ``classes`` but ``y``."""
    return (y + 1 + rng.integers(classes - 1)) % classes
