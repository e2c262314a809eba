"""The network of theorems: one hidden layer of ReLUs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from bench.registry import models


class TwoLayerNetwork(nn.Module):
    """``width`` ReLUs of all pixels as they are, and a linear layer on them; neither has a bias."""

    def __init__(self, inside: int, width: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inside, width, bias=False)
        self.linear = nn.Linear(width, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        logits: Tensor = self.linear(F.relu(self.hidden(x.flatten(1))))
        return logits


@models("two-layer")
@dataclass(frozen=True)
class TwoLayer:
    """A hidden layer of ``width`` ReLUs without biases on the pixels as they are; untrained."""

    width: Annotated[int, Field(ge=1, le=65536)] = 128

    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    trained: ClassVar[bool] = False

    def __call__(self, classes: int, shape: tuple[int, int, int], model_dir: Path | None) -> nn.Module:
        """Build it, in eval mode; see ``Architecture``."""
        channels, height, width = shape
        return TwoLayerNetwork(channels * height * width, self.width, classes).eval()
