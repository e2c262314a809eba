"""Boundary Defense: noise on the logits of those queries alone of which the model is not sure."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bench.dataset import Split
from bench.errors import ConfigError
from bench.protocols import Stage
from bench.ranges import Fraction
from bench.registry import defenses
from bench.rng import SampleRng
from defenses.aaa import top_confidence
from defenses.streams import streams


@defenses("boundary-defense")
@dataclass(frozen=True, kw_only=True)
class BoundaryDefense:
    """Add noise of deviation ``sigma`` to the logits where the top confidence is below ``confidence``.

    Attacks that walk along the decision boundary ask there; images that are classified with confidence meet the network
    itself. With K classes the confidence is never below 1 / K, so two classes never meet the noise at 0.3, and ten only
    close to several borders at once.

    Source:
        Aithal and Li, 2022, arXiv:2201.13444: N(0, 0.1) on the logits below a confidence of 0.3.

    Raises:
        ConfigError: a negative or infinite ``sigma``.
    """

    sigma: float = 0.1
    confidence: Fraction = 0.3

    stage: ClassVar[Stage] = "output"
    random: ClassVar[bool] = True
    outside: ClassVar[bool] = True
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Aithal and Li, 2022, arXiv:2201.13444"

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise ConfigError(f"sigma is {self.sigma}; a standard deviation is zero or more, and finite")

    def __call__(self, model: nn.Module, calibration: Split, seed: int) -> nn.Module:
        """The served model; nothing is tuned, and all randomness comes with each query."""
        return NoisyBoundary(model, self.sigma, self.confidence).eval()


class NoisyBoundary(nn.Module):
    """``model`` with noise on the logits that it is not sure of."""

    def __init__(self, model: nn.Module, sigma: float, confidence: float) -> None:
        super().__init__()
        self.model, self.sigma, self.confidence = model, sigma, confidence

    def forward(self, x: Tensor, rng: SampleRng | None = None) -> Tensor:
        """Logits (B, K) of ``x`` (B, C, H, W), some plus the noise that the streams of ``rng`` give, one for each row.

        Raises:
            ValueError: no ``rng``, or one of another length.
        """
        drawn = streams(rng, x, "boundary-defense")
        logits: Tensor = self.model(x)
        unsure = top_confidence(logits.detach(), 1.0) < self.confidence
        return logits + drawn.normal(logits.shape[1]).to(logits) * (self.sigma * unsure.to(logits))[:, None]
