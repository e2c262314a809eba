"""Fewer digits: small changes of a score, which a score-based attack feeds on, are not reported."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from bench.dataset import Split
from bench.errors import ConfigError
from bench.protocols import Stage
from bench.registry import defenses
from defenses.logits import straight_through

Mode = Literal["nearest", "truncate"]

DIGITS = 6  # decimals that float32 still holds for a logit near 10


@defenses("rounding")
@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Report each logit with ``decimals`` decimals: the ``nearest``, half to even, or cut off (``truncate``).

    It costs decisions: where the two best classes round to the same value, the first of them is predicted. Gradients
    pass as if nothing had happened (BPDA, Athalye et al., 2018), so a white-box attack meets the network itself.

    Raises:
        ConfigError: decimals below 0, or above the 6 that float32 holds.
    """

    decimals: int = 1
    mode: Mode = "nearest"

    stage: ClassVar[Stage] = "output"
    random: ClassVar[bool] = False
    outside: ClassVar[bool] = True
    knows: ClassVar[tuple[str, ...]] = ("rays",)  # classes are all that it keeps
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "ours, a baseline"

    def __post_init__(self) -> None:
        if not 0 <= self.decimals <= DIGITS:
            raise ConfigError(f"decimals is {self.decimals}; float32 scores hold 0 to {DIGITS}")

    def __call__(self, model: nn.Module, calibration: Split, seed: int) -> nn.Module:
        """The served model: deterministic, each row by itself; nothing is tuned."""
        return Rounded(model, self.decimals, self.mode).eval()


class Rounded(nn.Module):
    """``model`` with fewer digits in its logits."""

    def __init__(self, model: nn.Module, decimals: int, mode: Mode) -> None:
        super().__init__()
        self.model, self.decimals, self.mode = model, decimals, mode

    def forward(self, x: Tensor) -> Tensor:
        """The rounded logits (B, K) of ``x`` (B, C, H, W), with the gradient of the unrounded ones."""
        logits: Tensor = self.model(x)
        shifted = logits.detach() * 10**self.decimals
        whole = shifted.round() if self.mode == "nearest" else shifted.trunc()
        return straight_through(logits, whole / 10**self.decimals)
