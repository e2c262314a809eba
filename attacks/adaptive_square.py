"""Square against defenses that edit scores: other rules for which proposals to take, other values, averaged answers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from attacks.square import Rule, Square, Values, lower
from bench.errors import ConfigError
from bench.losses import margin, probability
from bench.oracle import Oracle, Rules
from bench.ranges import Few
from bench.registry import added, attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

AAA = "Chen et al., NeurIPS 2022, arXiv:2205.12134"
DLD = "Fu et al., AISTATS 2026, arXiv:2602.08679"


def upward(jump: float, held: Tensor, value: Tensor, memory: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
    """Take what raises the margin, or drops it by more than ``jump``: then it has crossed into the next interval."""
    rise = value - held
    return (rise > 0) | (rise < -jump), memory


def both_ways(jump: float, held: Tensor, value: Tensor, memory: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
    """Take what lowers the margin, until a proposal has raised it by more than ``jump``; :func:`upward` from then on.

    ``memory`` is 1 from that proposal on; it is itself judged by the rule before.
    """
    down, _ = lower(held, value, memory, rng)
    up, _ = upward(jump, held, value, memory, rng)
    return torch.where(memory == 0, down, up), torch.where(value - held > jump, 1, memory)


def switching(patience: int, held: Tensor, value: Tensor, memory: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
    """Take what lowers the margin, or what raises it, and turn round after ``patience`` refusals in a row.

    ``memory`` counts refusals, and an acceptance takes it back to the last multiple of ``patience``; an odd multiple
    means upwards.
    """
    turns, refusals = memory // patience, memory % patience
    taken = torch.where(turns % 2 == 0, value < held, value > held)
    refused = ~taken & ~value.isnan()
    return taken, torch.where(taken, memory - refusals, memory + refused.long())


def reversing(patience: int, held: Tensor, value: Tensor, memory: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
    """Like :func:`switching`, but one refusal later, and the proposal at which a sample turns round is taken."""
    taken, after = switching(patience + 1, held, value, memory, rng)
    turned = after // (patience + 1) > memory // (patience + 1)
    return taken | turned, after


def exploring(chance: float, held: Tensor, value: Tensor, memory: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
    """Take what lowers the margin, and anything else with probability ``chance``."""
    lucky = rng.fork("explore").uniform() < chance
    return (value < held) | (lucky & ~value.isnan()), memory


def annealing(
    heat: float, cooling: float, patience: int, in_a_row: bool,
    held: Tensor, value: Tensor, memory: Tensor, rng: SampleRng,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Take what lowers the margin, and a rise with probability exp(-rise / temperature).

    The temperature is ``heat * cooling^t`` at the t-th proposal since the last heating, which follows ``patience``
    refusals, ``in_a_row`` or not. ``memory`` is ``patience * t`` plus the refusals that count.
    """
    temperature = heat * cooling ** (memory // patience)
    exponential = -(1 - rng.fork("anneal").uniform()).log()  # of mean 1
    taken = value - held < temperature * exponential
    refused = ~taken & ~value.isnan()
    after = memory + patience + refused.long()
    after = torch.where(taken, after - memory % patience, after) if in_a_row else after
    after = torch.where(refused & (memory % patience == patience - 1), 0, after)
    return taken, torch.where(value.isnan(), memory, after)


@dataclass(frozen=True, kw_only=True)
class AdaptiveSquare(ABC):
    """Square's proposals, with the schedule of a run of 10,000, under the tactic of a subclass."""

    p_init: float = 0.3

    access: ClassVar[Access] = "scores"
    top_scores: ClassVar[bool] = True
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str]

    def __post_init__(self) -> None:
        Square(p_init=self.p_init)  # complains about an impossible one

    @abstractmethod
    def tactic(self) -> tuple[Values, Rule]:
        """What is compared, and which candidates are taken."""

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's incumbent."""
        values, rule = self.tactic()
        return self.square(threat.norm).search(oracle, x, y, threat, rng, values, rule)

    def square(self, norm: Norm) -> Square:
        """Whose proposals these are."""
        return Square(p_init=self.p_init)


@dataclass(frozen=True, kw_only=True)
class _Jumping(AdaptiveSquare):
    """Tactics of the AAA paper, which tell an interval's border by a jump of the margin."""

    jump: float = 3.0

    paper: ClassVar[str] = AAA

    def __post_init__(self) -> None:
        above_zero("jump", self.jump)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class _OfDLD(AdaptiveSquare):
    """Tactics of the code of the Dashed Line Defense, whose constants ``preset=dld`` takes, and with them its search.

    There the schedule is stretched over the budget, p_init is 0.05 in linf and 0.3 in l2, and windows never reach the
    last row and column.
    """

    preset: Literal["dld"] | None = added(None)

    paper: ClassVar[str] = DLD
    constants: ClassVar[Mapping[str, float]]  # what ``preset=dld`` stands for

    @property
    def rescaled(self) -> bool:
        """Whether the schedule follows the budget, so that smaller budgets cannot be read off this run."""
        return self.preset == "dld"

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        if self.preset and (others := [name for name in given if name != "preset"]):
            raise ConfigError(f"preset={self.preset} fixes {', '.join(others)}; leave out the one or the other")
        super().__post_init__()

    def constant(self, name: str) -> Any:
        """The parameter ``name``, or what the preset has for it."""
        return self.constants[name] if self.preset else getattr(self, name)

    def square(self, norm: Norm) -> Square:
        """Whose proposals these are."""
        if not self.preset:
            return super().square(norm)
        return Square(p_init={"linf": 0.05, "l2": 0.3}[norm], rescale=True, edges="reference")


@attacks("bi-square")
@dataclass(frozen=True, kw_only=True)
class BiSquare(_Jumping):
    """Bi-Square (Chen et al., 2022): downwards until the margin jumps up by more than ``jump``, then upwards.

    Each sample finds out by itself. Square's proposals, with the schedule of a run of 10,000.

    Args:
        p_init: share of the pixels in the first windows; 0.3 as released for every network but AAA's base network on
            CIFAR-10, where it is 0.05.
        jump: rise that gives an edit away; half of the defense's interval, 6 as released.

    Source: the rule in ``square.py`` of the authors' code; unlike there, a misclassified proposal is never missed.
    """

    def tactic(self) -> tuple[Values, Rule]:
        """The margin as it is shown, under the rule of this attack."""
        return margin, partial(both_ways, self.jump)


@attacks("up-square")
@dataclass(frozen=True, kw_only=True)
class UpSquare(_Jumping):
    """Up-Square (Chen et al., 2022): upwards on purpose, and down where the margin drops by more than ``jump``.

    Args, Source: as for :class:`BiSquare`.
    """

    def tactic(self) -> tuple[Values, Rule]:
        """The margin as it is shown, under the rule of this attack."""
        return margin, partial(upward, self.jump)


@attacks("switch-square")
@dataclass(frozen=True, kw_only=True)
class SwitchSquare(AdaptiveSquare):
    """Square that turns round after ``patience`` refusals in a row, first downwards; made for AAA-sine.

    The incumbent stays where it is when the direction turns. Knows nothing of the interval.

    Args:
        p_init: as for :class:`BiSquare`.
        patience: refusals in a row after which a sample turns round.

    Source: the direction switch in the code of Random Logit Scaling, 10 unsuccessful iterations.
    """

    patience: int = 10

    paper: ClassVar[str] = "Random Logit Scaling, openreview CXafPv4aAG"

    def __post_init__(self) -> None:
        _at_least_one("patience", self.patience)
        super().__post_init__()

    def tactic(self) -> tuple[Values, Rule]:
        """The margin as it is shown, under the rule of this attack."""
        return margin, partial(switching, self.patience)


@attacks("reverse-square")
@dataclass(frozen=True, kw_only=True)
class ReverseSquare(_OfDLD):
    """Square that after more than ``patience`` refusals in a row takes the proposal and turns round, first downwards.

    Each sample pursues its own direction. Taking that proposal moves the incumbent off the extremum on which it sits;
    :class:`SwitchSquare` stays there.

    Args:
        p_init: as for :class:`BiSquare`.
        patience: refusals in a row that are borne; the default is ours.
        preset: ``dld`` takes all constants of that code: 23 refusals, and its search (:class:`_OfDLD`).

    Source: the tactic ``reverse`` of the public code of the Dashed Line Defense.
    """

    patience: int = 10

    constants: ClassVar[Mapping[str, float]] = {"patience": 23}

    def __post_init__(self) -> None:
        _at_least_one("patience", self.patience)
        super().__post_init__()

    def tactic(self) -> tuple[Values, Rule]:
        """The margin as it is shown, under the rule of this attack."""
        return margin, partial(reversing, self.constant("patience"))


@attacks("explore-square")
@dataclass(frozen=True, kw_only=True)
class ExploreSquare(_OfDLD):
    """Square that takes any proposal with probability ``chance``, drawn from the sample's stream.

    Args:
        p_init: as for :class:`BiSquare`.
        chance: probability with which a proposal is taken whatever its margin, 0 to 1; the default is ours.
        preset: ``dld`` takes all constants of that code: a chance of 0.5, and its search (:class:`_OfDLD`).

    Source: the tactic ``explore`` of the public code of the Dashed Line Defense.
    """

    chance: float = 0.1

    constants: ClassVar[Mapping[str, float]] = {"chance": 0.5}

    def __post_init__(self) -> None:
        if not 0 <= self.chance <= 1:
            raise ConfigError(f"chance is {self.chance:g}; it is a probability, from 0 to 1")
        super().__post_init__()

    def tactic(self) -> tuple[Values, Rule]:
        """The margin as it is shown, under the rule of this attack."""
        return margin, partial(exploring, self.constant("chance"))


@attacks("annealing-square")
@dataclass(frozen=True, kw_only=True)
class AnnealingSquare(_OfDLD):
    """Square by simulated annealing: a rise of the margin is taken with probability exp(-rise / temperature).

    The temperature falls by a factor with each proposal. After ``patience`` refusals it is back at ``heat``.

    Args:
        p_init: as for :class:`BiSquare`.
        heat: the first temperature, in units of the margin.
        cooling: factor on the temperature for each proposal, above 0 and at most 1.
        patience: refusals, in a row or not, after which a sample is heated again. All three defaults are ours.
        preset: ``dld`` takes all constants of that code: heat 25, cooling 0.997, heated again after more than 20
            refusals in a row, and its search (:class:`_OfDLD`).

    Source: the tactic ``sa`` of the public code of the Dashed Line Defense.
    """

    heat: float = 3.0
    cooling: float = 0.98
    patience: int = 50

    constants: ClassVar[Mapping[str, float]] = {"heat": 25.0, "cooling": 0.997, "patience": 21}

    def __post_init__(self) -> None:
        above_zero("heat", self.heat)
        if not 0 < self.cooling <= 1:
            raise ConfigError(f"cooling is {self.cooling:g}; it is a factor above 0 and at most 1")
        _at_least_one("patience", self.patience)
        super().__post_init__()

    def tactic(self) -> tuple[Values, Rule]:
        """The margin as it is shown, under the rule of this attack."""
        heat, cooling, patience = (self.constant(name) for name in ("heat", "cooling", "patience"))
        return margin, partial(annealing, heat, cooling, patience, self.preset == "dld")


@attacks("confidence-square")
@dataclass(frozen=True, kw_only=True)
class ConfidenceSquare(AdaptiveSquare):
    """Square on the probability of the label, which is the top one until the sample falls.

    AAA reverses the margin, but keeps the top confidence near a calibrated one, a monotone function of the true logits:
    the confidence often keeps the trend that the margin has lost. The same search as ``square(p_init=0.3, loss=prob)``.

    Args:
        p_init: as for :class:`BiSquare`.

    Source: our own.
    """

    paper: ClassVar[str] = "ours"

    def tactic(self) -> tuple[Values, Rule]:
        """The probability, under Square's own rule."""
        return probability, lower


@attacks("eot-square")
@dataclass(frozen=True, kw_only=True)
class EOTSquare(AdaptiveSquare):
    """Square against random defenses: each image is asked ``draws`` times, and the mean of the logits is compared.

    Every draw is a query. A sample falls when the mean of a call is misclassified, where plain Square ends at its first
    lucky draw. Averaging also lets fewer margins in that are low by luck alone, which nothing would beat again. Of the
    estimators in use, means of losses, of logits or of probabilities, this is the margin of the mean logits.

    The windows follow the schedule of a run of 10,000 proposals, whatever each costs.

    Args:
        p_init: as for :class:`BiSquare`.
        draws: answers for each image; AutoAttack's ``rand`` takes 20 gradients, the default is ours.

    Source: expectation over transformation (Athalye et al., 2018), carried over to scores.
    """

    draws: Few = 5

    rules: ClassVar[Rules] = Rules(averages=True)
    paper: ClassVar[str] = "Athalye et al., 2018, arXiv:1707.07397"

    def __post_init__(self) -> None:
        _at_least_one("draws", self.draws)
        super().__post_init__()

    def tactic(self) -> tuple[Values, Rule]:
        """The margin of the mean logits, under Square's own rule."""
        return margin, lower

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's incumbent."""
        values, rule = self.tactic()
        return self.square(threat.norm).search(_Averaged(oracle, self.draws), x, y, threat, rng, values, rule)


class _Averaged:
    """An oracle that is asked about each image ``draws`` times, or as often as the budget leaves, and averages."""

    def __init__(self, oracle: Oracle, draws: int) -> None:
        self.oracle, self.draws, self.query_budget = oracle, draws, oracle.query_budget

    def active(self) -> Tensor:
        return self.oracle.active()

    def scores(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        return self.oracle.scores(x[:, None].expand(-1, self.draws, -1, -1, -1), rows).nanmean(dim=1)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} is {value}; it is a number of queries, at least 1")


def above_zero(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value:g}; it is a difference of margins, above zero and finite")
