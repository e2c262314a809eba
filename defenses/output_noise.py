"""Gaussian noise on the logits: the baseline that input noise is compared with."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bench.dataset import Split
from bench.errors import ConfigError
from bench.protocols import Stage
from bench.registry import defenses
from bench.rng import SampleRng
from defenses.streams import streams


@defenses("output-noise")
@dataclass(frozen=True, kw_only=True)
class OutputNoise:
    """Answer with the logits plus noise of standard deviation ``sigma`` (in logit units), drawn anew for each query.

    The evaluation of AAA takes 1 for the undefended WideResNet-28-10 of CIFAR-10 and 0.3 for every other network.

    Source:
        Chen et al., NeurIPS 2022, arXiv:2205.12134, the baseline "outRND" of the released ``victim.py``.

    Raises:
        ConfigError: a negative or infinite ``sigma``.
    """

    sigma: float = 1.0

    stage: ClassVar[Stage] = "output"
    random: ClassVar[bool] = True
    outside: ClassVar[bool] = True
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Chen et al., NeurIPS 2022, arXiv:2205.12134 (baseline)"

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise ConfigError(f"sigma is {self.sigma}; a standard deviation is zero or more, and finite")

    def __call__(self, model: nn.Module, calibration: Split, seed: int) -> nn.Module:
        """The served model; nothing is tuned, and all randomness comes with each query."""
        return NoisyOutput(model, self.sigma).eval()


class NoisyOutput(nn.Module):
    """``model`` with noise on its logits."""

    def __init__(self, model: nn.Module, sigma: float) -> None:
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, x: Tensor, rng: SampleRng | None = None) -> Tensor:
        """Logits (B, K) of ``x`` (B, C, H, W) plus the noise that the streams of ``rng`` give, one for each row.

        Raises:
            ValueError: no ``rng``, or one of another length.
        """
        drawn = streams(rng, x, "output-noise")
        logits: Tensor = self.model(x)
        return logits + drawn.normal(logits.shape[1]).to(logits) * self.sigma
