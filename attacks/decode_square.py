"""Square on the margins behind a defense that edits them interval by interval, by an attacker who knows how it does."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from attacks.adaptive_square import AdaptiveSquare, above_zero
from attacks.square import Rule, Values, lower
from bench.errors import ConfigError
from bench.losses import margin
from bench.ranges import NonNegative
from bench.registry import added, attacks


@attacks("decode-square")
@dataclass(frozen=True, kw_only=True)
class DecodeSquare(AdaptiveSquare):
    """Square on the margin behind AAA-linear or the Dashed Line Defense: an attacker who knows the edit undoes it.

    Exact where AAA's solver reaches its target margin with step 1, and for DLD; AAA-sine cannot be inverted.

    Args:
        p_init: as for :class:`attacks.adaptive_square.BiSquare`.
        interval: the defense's interval (tau).
        height: where DLD's two lines begin, as a share of the interval: 0.3 as released. At 1 there is one line, which
            falls through the whole interval: AAA's mirror.
        offset: by which AAA's borders are moved.

    Source: our own; the mirror is its own inverse, and the lines of DLD share no value.
    """

    interval: float = 6.0
    height: Annotated[float, Field(gt=0, le=1)] = added(1.0)
    offset: NonNegative = added(0.0)

    paper: ClassVar[str] = "ours"

    def __post_init__(self) -> None:
        above_zero("interval", self.interval)
        if self.offset and not (self.height == 1 and self.offset < self.interval):
            raise ConfigError(f"offset is {self.offset:g}; it moves AAA's borders (height=1) by less than the interval")
        super().__post_init__()

    def tactic(self) -> tuple[Values, Rule]:
        """The decoded margin, under Square's own rule."""
        return partial(decoded, self.interval, self.height, self.offset), lower


def decoded(interval: float, height: float, offset: float, logits: Tensor, y: Tensor) -> Tensor:
    """The margins (n,) that are reported on one of two lines in each interval; negative ones are not edited.

    Both lines begin at ``height`` (of the interval) above its border: one falls by ``height``, the other rises by the
    rest. At height 1, a margin in [k tau, (k + 1) tau) is reported in (k tau, (k + 1) tau], and 0 for one just below
    tau. With an ``offset`` the first interval ends there.
    """
    reported = margin(logits, y)
    number = ((reported - offset) / interval).ceil() - 1
    first = reported <= offset if offset else torch.zeros_like(reported, dtype=torch.bool)
    border = torch.where(first, 0, offset + number.clamp(min=0) * interval)
    width = torch.full_like(reported, interval).where(~first, offset)
    falling = ((1 + height) * border + height * width - reported) / height
    above = reported - border - height * width
    true = falling.where(above <= 0, border + above / (1 - height)) if height < 1 else falling
    return torch.where(reported < 0, reported, true)
