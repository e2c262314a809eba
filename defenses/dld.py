"""DLD: report the margin on one of two lines, which change places many times in each interval of the true one.

On the low line a step towards the decision boundary is reported as a step away from it, on the high line as what it is;
an attacker who has learned a direction meets the other one soon after. Fu et al., AISTATS 2026.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from bench.dataset import Split
from bench.errors import ConfigError
from bench.protocols import Stage
from bench.ranges import Fraction, Share
from bench.registry import defenses
from defenses.aaa import top_margin
from defenses.logits import straight_through


@defenses("dld")
@dataclass(frozen=True, kw_only=True)
class DashedLineDefense:
    """Report a margin m of [k tau, (k + 1) tau) as ``k tau + h tau - h (m - k tau)``, the low line, or as
    ``k tau + h tau + (1 - h) (m - k tau)``, the high one.

    Both lines begin at ``height`` (h, of an interval) above the border; dashes of ``dash`` (s, of an interval) lie on
    the high line at their upper end, for a share ``high`` (r) of their length. The top logit alone is moved, and stays
    the top one.

    The lines never share a value but where they begin, so whoever knows ``interval`` and ``height`` finds each true
    margin in what is reported, and questions on the way to the boundary find these two:
    ``decode-square(interval=learned)``.

    Gradients pass through the edit as if it were the identity (BPDA, Athalye et al., 2018).

    Source:
        Fu et al., AISTATS 2026, arXiv:2602.08679, and the released ``victim.py``, which fixes h at 0.3.

    Raises:
        ConfigError: an interval that is not positive, or a height or a dash outside of the interval.
    """

    interval: float = 6.0
    height: Annotated[float, Field(gt=0, lt=1)] = 0.3
    dash: Share = 0.04
    high: Fraction = 0.5

    stage: ClassVar[Stage] = "output"
    random: ClassVar[bool] = False
    outside: ClassVar[bool] = True
    knows: ClassVar[tuple[str, ...]] = ("decode-square(interval=learned)",)
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Fu et al., AISTATS 2026, arXiv:2602.08679"

    def __post_init__(self) -> None:
        if not 0 < self.interval < math.inf:
            raise ConfigError(f"interval is {self.interval}; it is positive and finite")

    def __call__(self, model: nn.Module, calibration: Split, seed: int) -> nn.Module:
        """The served model: deterministic, each row by itself; nothing is tuned."""
        return Dashed(model, self.interval, self.height, self.dash, self.high).eval()


class Dashed(nn.Module):
    """``model`` with its largest logit moved until it leads by what :func:`dashed` reports."""

    def __init__(self, model: nn.Module, interval: float, height: float, dash: float, high: float) -> None:
        super().__init__()
        self.model, self.interval, self.height, self.dash, self.high = model, interval, height, dash, high

    def forward(self, x: Tensor) -> Tensor:
        """The edited logits (B, K) of ``x`` (B, C, H, W), with the gradient of the unedited ones."""
        logits: Tensor = self.model(x)
        plain = logits.detach()
        shown = dashed(top_margin(plain), self.interval, self.height, self.dash, self.high)
        best, second = plain.argmax(dim=1, keepdim=True), plain.topk(2, dim=1).values[:, 1]
        ahead = torch.nextafter(second, torch.full_like(second, math.inf))  # a tie might turn the decision
        moved = torch.maximum((second + shown).to(plain), ahead)
        return straight_through(logits, plain.scatter(1, best, moved[:, None]))


def dashed(margin: Tensor, interval: float, height: float, dash: float, high: float) -> Tensor:
    """What margins (B,) >= 0 are reported as, in [k tau, (k + 1) tau) as they are themselves; see the class."""
    border = torch.floor(margin / interval) * interval
    above = margin - border
    upper = torch.frac(above / interval / dash) > 1 - high
    return border + height * interval + torch.where(upper, 1 - height, -height) * above
