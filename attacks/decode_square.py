"""Square on the margins behind a defense that edits them interval by interval, by one who knows how or learns it."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from attacks.adaptive_square import AdaptiveSquare, above_zero
from attacks.decoding import Edit, Undone
from attacks.probing import probe
from attacks.square import Rule, Values, lower
from bench.errors import ConfigError
from bench.losses import margin
from bench.oracle import Oracle, Rules
from bench.ranges import NonNegative
from bench.registry import added, attacks
from bench.rng import SampleRng
from bench.threat import Threat


@attacks("decode-square")
@dataclass(frozen=True, kw_only=True)
class DecodeSquare(AdaptiveSquare):
    """Square on the margin behind AAA-linear or the Dashed Line Defense: an attacker who knows the edit undoes it.

    Exact where AAA's solver reaches its target margin with step 1, and for DLD; AAA-sine cannot be inverted.

    Args:
        p_init: as for :class:`attacks.adaptive_square.BiSquare`.
        interval: the defense's interval (tau). ``learned`` finds out first, as ``autoquery`` does
            (:func:`attacks.probing.probe`): up to 35 questions tell each sample interval, height and offset for itself,
            or that nothing is edited.
        height: where DLD's two lines begin, as a share of the interval: 0.3 as released. At 1 there is one line, which
            falls through the whole interval: AAA's mirror.
        offset: by which AAA's borders are moved.

    Source: our own; the mirror is its own inverse, and the lines of DLD share no value.

    Raises:
        ConfigError: an offset beside two lines or beyond the interval, or what is learned is told, too.
    """

    interval: float | Literal["learned"] = 6.0
    height: Annotated[float, Field(gt=0, le=1)] = added(1.0)
    offset: NonNegative = added(0.0)

    paper: ClassVar[str] = "ours"

    @property
    def version(self) -> int:  # type: ignore[override]
        """Of what is learned: 1 missed most edits of AAA; 2 those of its released solver, whose answers are rough."""
        return 3 if self.interval == "learned" else 1

    @property
    def rules(self) -> Rules:
        """The way on which the edit is learned leaves the ball."""
        return Rules(roams=self.interval == "learned")

    def __post_init__(self) -> None:
        if self.interval == "learned":
            if (self.height, self.offset) != (1, 0):
                raise ConfigError("interval=learned learns height and offset, too; leave them out")
        else:
            above_zero("interval", self.interval)
            if self.offset and not (self.height == 1 and self.offset < self.interval):
                raise ConfigError(
                    f"offset is {self.offset:g}; it moves AAA's borders (height=1) by less than the interval"
                )
        super().__post_init__()

    def tactic(self) -> tuple[Values, Rule]:
        """The margin before the edit, under Square's own rule."""
        if self.interval == "learned":
            return margin, lower  # of an oracle that has undone it
        return partial(decoded, Edit(self.interval, self.height, self.offset)), lower

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's incumbent."""
        if self.interval != "learned":
            return super().__call__(oracle, x, y, threat, rng)
        values, rule = self.tactic()
        plain = Undone(oracle, y, probe(oracle, x, y, rng.fork("probing")).edit)
        return self.square(threat.norm).search(plain, x, y, threat, rng, values, rule)


def decoded(edit: Edit, logits: Tensor, y: Tensor) -> Tensor:
    """The margins (n,) behind ``edit``."""
    return edit.undone(margin(logits, y))
