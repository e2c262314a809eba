"""RND: Gaussian noise on each query, so that finite differences of scores mislead."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bench.dataset import Split
from bench.errors import ConfigError
from bench.protocols import Stage
from bench.registry import defenses
from bench.rng import SampleRng
from defenses.streams import streams


@defenses("rnd")
@dataclass(frozen=True, kw_only=True)
class RandomNoiseDefense:
    """Classify ``x`` plus noise of standard deviation ``sigma`` (on the pixel scale), drawn anew for each query.

    ``clip`` puts the noisy image back into [0, 1], as the AAA and UniG evaluations do; the paper's own evaluation does
    not say, and BlackboxBench leaves it out.

    With a network trained on such noise it is RND-GF: ``gaussian-training(sigma=0.02) + rnd(sigma=0.02)``, where the
    paper tunes a trained network further.

    Source:
        Qin et al., NeurIPS 2021, arXiv:2104.11470: f(x + nu * N(0, I)).

    Raises:
        ConfigError: a negative ``sigma``.
    """

    sigma: float = 0.02
    clip: bool = True

    stage: ClassVar[Stage] = "output"
    random: ClassVar[bool] = True
    outside: ClassVar[bool] = True
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Qin et al., NeurIPS 2021, arXiv:2104.11470"

    def __post_init__(self) -> None:
        if not self.sigma >= 0:
            raise ConfigError(f"sigma is {self.sigma}; a standard deviation is zero or more")

    def __call__(self, model: nn.Module, calibration: Split, seed: int) -> nn.Module:
        """The served model; nothing is tuned, and all randomness comes with each query."""
        return NoisyInput(model, self.sigma, self.clip).eval()


class NoisyInput(nn.Module):
    """``model`` behind input noise."""

    def __init__(self, model: nn.Module, sigma: float, clip: bool) -> None:
        super().__init__()
        self.model, self.sigma, self.clip = model, sigma, clip

    def forward(self, x: Tensor, rng: SampleRng | None = None) -> Tensor:
        """Logits (B, K) of ``x`` (B, C, H, W) under the noise that the streams of ``rng`` give, one for each row.

        Raises:
            ValueError: no ``rng``, or one of another length.
        """
        noisy = x + streams(rng, x, "rnd").normal(*x.shape[1:]).to(x) * self.sigma
        logits: Tensor = self.model(noisy.clamp(0, 1) if self.clip else noisy)
        return logits
