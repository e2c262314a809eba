"""Square against defenses that edit the scores: other rules for which proposals to take, or a decoded margin."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from attacks.square import Rule, Square, Values, lower
from bench.errors import ConfigError
from bench.losses import margin
from bench.oracle import Oracle
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

AAA = "Chen et al., NeurIPS 2022, arXiv:2205.12134"


def upward(jump: float, held: Tensor, value: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Take what raises the margin, or drops it by more than ``jump``: then it has crossed into the next interval."""
    rise = value - held
    return (rise > 0) | (rise < -jump), memory


def both_ways(jump: float, held: Tensor, value: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Take what lowers the margin, until a proposal has raised it by more than ``jump``; :func:`upward` from then on.

    ``memory`` is 1 from that proposal on; it is itself judged by the rule before.
    """
    down, _ = lower(held, value, memory)
    up, _ = upward(jump, held, value, memory)
    return torch.where(memory == 0, down, up), torch.where(value - held > jump, 1, memory)


def switching(patience: int, held: Tensor, value: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Take what lowers the margin, or what raises it, and turn round after ``patience`` refusals in a row.

    ``memory`` counts refusals, and an acceptance takes it back to the last multiple of ``patience``; an odd multiple
    means upwards.
    """
    turns, refusals = memory // patience, memory % patience
    taken = torch.where(turns % 2 == 0, value < held, value > held)
    refused = ~taken & ~value.isnan()
    return taken, torch.where(taken, memory - refusals, memory + refused.long())


def decoded(interval: float, logits: Tensor, y: Tensor) -> Tensor:
    """The margin (n,) that AAA-linear with step 1 has mirrored inside its interval; negative ones are not edited.

    A margin in [k tau, (k + 1) tau) is reported in (k tau, (k + 1) tau], and 0 for one just below tau.
    """
    reported = margin(logits, y)
    centre = ((reported / interval).ceil().clamp(min=1) - 0.5) * interval
    return torch.where(reported < 0, reported, 2 * centre - reported)


@dataclass(frozen=True, kw_only=True)
class _AdaptiveSquare(ABC):
    """Square's proposals, with the schedule of a run of 10,000, under the tactic of a subclass."""

    p_init: float = 0.3

    access: ClassVar[Access] = "scores"
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
        return Square(p_init=self.p_init).search(oracle, x, y, threat, rng, values, rule)


@attacks("bi-square")
@dataclass(frozen=True, kw_only=True)
class BiSquare(_AdaptiveSquare):
    """Bi-Square (Chen et al., 2022): downwards until the margin jumps up by more than ``jump``, then upwards.

    Each sample finds out by itself. Square's proposals, with the schedule of a run of 10,000.

    Args:
        p_init: share of the pixels in the first windows; 0.3 as released for defended models.
        jump: rise that gives an edit away; half of the defense's interval, 6 as released.

    Source: the rule in ``square.py`` of the authors' code; unlike there, a misclassified proposal is never missed.
    """

    jump: float = 3.0

    paper: ClassVar[str] = AAA

    def __post_init__(self) -> None:
        _above_zero("jump", self.jump)
        super().__post_init__()

    def tactic(self) -> tuple[Values, Rule]:
        """The margin as it is shown, under the rule of this attack."""
        return margin, partial(both_ways, self.jump)


@attacks("up-square")
@dataclass(frozen=True, kw_only=True)
class UpSquare(_AdaptiveSquare):
    """Up-Square (Chen et al., 2022): upwards on purpose, and down where the margin drops by more than ``jump``.

    Args, Source: as for :class:`BiSquare`.
    """

    jump: float = 3.0

    paper: ClassVar[str] = AAA

    def __post_init__(self) -> None:
        _above_zero("jump", self.jump)
        super().__post_init__()

    def tactic(self) -> tuple[Values, Rule]:
        """The margin as it is shown, under the rule of this attack."""
        return margin, partial(upward, self.jump)


@attacks("switch-square")
@dataclass(frozen=True, kw_only=True)
class SwitchSquare(_AdaptiveSquare):
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
        if self.patience < 1:
            raise ConfigError(f"patience is {self.patience}; turn round after at least one refusal")
        super().__post_init__()

    def tactic(self) -> tuple[Values, Rule]:
        """The margin as it is shown, under the rule of this attack."""
        return margin, partial(switching, self.patience)


@attacks("decode-square")
@dataclass(frozen=True, kw_only=True)
class DecodeSquare(_AdaptiveSquare):
    """Square on the margin behind AAA-linear: an attacker who knows the interval mirrors every margin back.

    Exact where the solver of the defense reaches its target margin with step 1; AAA-sine cannot be inverted.

    Args:
        p_init: as for :class:`BiSquare`.
        interval: the defense's interval (tau).

    Source: our own; the mirror is its own inverse.
    """

    interval: float = 6.0

    paper: ClassVar[str] = "ours"

    def __post_init__(self) -> None:
        _above_zero("interval", self.interval)
        super().__post_init__()

    def tactic(self) -> tuple[Values, Rule]:
        """The decoded margin, under Square's own rule."""
        return partial(decoded, self.interval), lower


def _above_zero(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value:g}; it is a difference of margins, above zero and finite")
