"""Temperature: calibrated confidence and unchanged decisions, which is what AAA's calibration is compared with."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from bench.dataset import Split
from bench.errors import ConfigError
from bench.metrics import calibration_error
from bench.protocols import Stage
from bench.registry import defenses
from defenses.aaa import TEMPERATURES, top_confidence
from defenses.logits import calibration_logits

Objective = Literal["nll", "ece"]


@defenses("temperature")
@dataclass(frozen=True, kw_only=True)
class Temperature:
    """Divide the logits by ``temperature``.

    ``"tuned"`` picks it on the calibration split: from 0.1 to 10, in steps of 2.3 %, the one that minimises the
    ``objective``, the mean negative log-likelihood or the expected calibration error over 15 bins.

    It protects against nothing but a rule with absolute thresholds: the order of all margins stays, so an attack on
    the margin asks the very same queries. It is the control for defenses that calibrate as well.

    Source:
        Guo et al., ICML 2017, arXiv:1706.04599, section 4.2.

    Raises:
        ConfigError: a temperature that is not positive and finite.
    """

    temperature: float | Literal["tuned"] = "tuned"
    objective: Objective = "nll"

    stage: ClassVar[Stage] = "output"
    random: ClassVar[bool] = False
    outside: ClassVar[bool] = True
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Guo et al., ICML 2017, arXiv:1706.04599"

    def __post_init__(self) -> None:
        if self.temperature != "tuned" and not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; it is positive and finite, or 'tuned'")

    def __call__(self, model: nn.Module, calibration: Split, seed: int) -> nn.Module:
        """The served model: deterministic, each row by itself.

        Raises:
            ConfigError: the temperature is to be tuned and there are no calibration images.
        """
        temperature = self.temperature
        if temperature == "tuned":
            temperature = best_temperature(*calibration_logits(model, calibration), self.objective)
        return Tempered(model, temperature).eval()


class Tempered(nn.Module):
    """``model`` with its logits divided by a constant."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, x: Tensor) -> Tensor:
        """The logits (B, K) of ``x`` (B, C, H, W) over the temperature."""
        logits: Tensor = self.model(x)
        return logits / self.temperature


def best_temperature(logits: Tensor, labels: Tensor, objective: Objective) -> float:
    """The temperature, of 201 from 0.1 to 10, at which the ``objective`` is smallest.

    Args:
        logits, labels: (N, K) and (N,) of held-out samples.
    """
    exact, correct = logits.double(), logits.argmax(dim=1) == labels

    def error(temperature: float) -> float:
        if objective == "nll":
            return F.cross_entropy(exact / temperature, labels).item()
        return calibration_error(top_confidence(exact, temperature).cpu().numpy(), correct.cpu().numpy())

    return min(TEMPERATURES, key=error)
