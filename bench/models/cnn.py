"""A small convolutional network that trains in seconds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from bench.errors import ConfigError
from bench.models.heads import Heads, pooled
from bench.models.normalise import usual
from bench.ranges import Few
from bench.registry import added, models

HALF = 7  # layers up to the first pooling


class SmallCnn(nn.Module):
    """Four 3x3 convolutions with batch-norm, two poolings, and the mean over what is left of the image."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.normalise = usual(channels)
        self.features = nn.Sequential(
            *_layer(channels, width),
            *_layer(width, width),
            nn.MaxPool2d(2),
            *_layer(width, 2 * width),
            *_layer(2 * width, 2 * width),
            nn.MaxPool2d(2),
        )
        self.linear = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        features: Tensor = self.features(self.normalise(x))  # (B, 2 * width, H // 4, W // 4)
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


def _layer(inside: int, outside: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()


@models("cnn")
@dataclass(frozen=True)
class Cnn:
    """A small network of ``width`` to ``2 * width`` channels for images of 8 to 64 pixels a side; untrained.

    With several ``heads``, what follows the first pooling is there so often.
    """

    width: Annotated[int, Field(ge=1, le=4096)] = 32
    heads: Few = added(1)

    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    trained: ClassVar[bool] = False

    def __call__(self, classes: int, shape: tuple[int, int, int], model_dir: Path | None) -> nn.Module:
        """Build it, in eval mode; see ``Architecture``.

        Raises:
            ConfigError: images too small to pool twice.
        """
        if min(shape[1:]) < 4:
            raise ConfigError(f"cnn: images are {shape[2]}x{shape[1]}; it pools twice and needs at least 4x4")
        networks = [SmallCnn(shape[0], classes, self.width) for _ in range(self.heads)]
        if self.heads == 1:
            return networks[0].eval()
        ends = [pooled(*each.features[HALF:], linear=each.linear) for each in networks]
        return Heads(networks[0].normalise, networks[0].features[:HALF], ends).eval()
