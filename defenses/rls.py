"""RLS: multiply all logits by one random number, drawn anew for each query. OpenReview CXafPv4aAG, 2026."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from bench.dataset import Split
from bench.errors import ConfigError
from bench.protocols import Stage
from bench.registry import defenses
from bench.rng import SampleRng
from defenses.streams import streams

Distribution = Literal["uniform", "gaussian"]
FAR = 30  # deviations, not far beyond which probabilities are 0 in float64, and scales infinite


@defenses("rls")
@dataclass(frozen=True, kw_only=True)
class RandomLogitScaling:
    """Multiply the logits of a query by a scale of its own, which changes margins and confidences and no decision.

    ``uniform`` draws it from [``low``, ``high``], as released 0.5 to 10. ``gaussian`` draws it from a normal
    distribution of ``mean`` and ``std``, of which only what lies above ``low`` is kept; released are 1, 100 and 0.2.
    How the released code keeps to that bound is not known; here the distribution is cut off there.

    All logits share the scale, so a loss that no scale moves sees the undefended network: ``square(loss=dlr)``.

    Source:
        Random Logit Scaling, OpenReview CXafPv4aAG, and the README of its code.

    Raises:
        ConfigError: a scale that may be zero or negative, bounds in the wrong order, or a bound that nothing exceeds.
    """

    distribution: Distribution = "uniform"
    low: float | None = None
    high: float = 10.0
    mean: float = 1.0
    std: float = 100.0

    stage: ClassVar[Stage] = "output"
    random: ClassVar[bool] = True
    outside: ClassVar[bool] = True
    knows: ClassVar[tuple[str, ...]] = ("square(loss=dlr)",)
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Random Logit Scaling, openreview CXafPv4aAG"

    def __post_init__(self) -> None:
        if not 0 < self.least < math.inf:
            raise ConfigError(f"low is {self.least:g}; a scale is above zero, or it would turn decisions")
        if self.distribution == "uniform" and not self.least <= self.high < math.inf:
            raise ConfigError(f"high is {self.high:g}, below low, which is {self.least:g}")
        if not 0 < self.std < math.inf or not math.isfinite(self.mean):
            raise ConfigError(f"std is {self.std:g} and mean {self.mean:g}; a deviation is above zero, and both finite")
        if self.distribution == "gaussian" and self.least > self.mean + FAR * self.std:
            raise ConfigError(f"low is {self.least:g}, over {FAR} deviations above the mean, where nothing is left")

    @property
    def least(self) -> float:
        """The smallest scale."""
        return {"uniform": 0.5, "gaussian": 0.2}[self.distribution] if self.low is None else self.low

    def __call__(self, model: nn.Module, calibration: Split, seed: int) -> nn.Module:
        """The served model; nothing is tuned, and all randomness comes with each query."""
        return Scaled(model, self).eval()

    def scales(self, uniform: Tensor) -> Tensor:
        """The scales (B,) that belong to ``uniform`` (B,) on [0, 1)."""
        if self.distribution == "uniform":
            return self.least + (self.high - self.least) * uniform
        return above(uniform, self.mean, self.std, self.least)


class Scaled(nn.Module):
    """``model`` with its logits multiplied by the scale of each query."""

    def __init__(self, model: nn.Module, settings: RandomLogitScaling) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def forward(self, x: Tensor, rng: SampleRng | None = None) -> Tensor:
        """Logits (B, K) of ``x`` (B, C, H, W) times the scales that the streams of ``rng`` give, one for each row.

        Raises:
            ValueError: no ``rng``, or one of another length.
        """
        drawn = streams(rng, x, "rls").uniform(1)
        logits: Tensor = self.model(x)
        return logits * self.settings.scales(drawn).to(logits)


def above(uniform: Tensor, mean: float, std: float, low: float) -> Tensor:
    """Normal numbers of ``mean`` and ``std`` cut off below ``low``, by the quantiles ``uniform`` in [0, 1)."""
    tail = 0.5 * math.erfc((low - mean) / std / math.sqrt(2))  # probability of what is kept
    upper = tail * (1 - uniform.double())                      # of what lies above the number, in (0, tail]
    found: Tensor = mean - std * torch.special.ndtri(upper)
    return found.clamp(min=low)
