"""VGG networks for small images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bench.models.normalise import usual
from bench.models.small import SmallImageNetwork
from bench.registry import models


class VGG(nn.Module):
    """3x3 convolutions with batch-norm, a pooling after each stage, the mean over what is left, a linear layer.

    ``stages[i]`` has the channels of each convolution of a stage.
    """

    def __init__(self, stages: Sequence[Sequence[int]], channels: int, classes: int) -> None:
        super().__init__()
        self.normalise = usual(channels)
        layers: list[nn.Module] = []
        inside = channels
        for stage in stages:
            for width in stage:
                layers += nn.Conv2d(inside, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
                inside = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        features: Tensor = self.features(self.normalise(x))  # (B, inside, H // 2 ** stages, W // 2 ** stages)
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class _SmallImageVGG(SmallImageNetwork):
    """What the registered ones share."""

    stages: ClassVar[tuple[tuple[int, ...], ...]]
    paper: ClassVar[str] = "Simonyan and Zisserman, ICLR 2015, arXiv:1409.1556"

    def network(self, classes: int, channels: int) -> nn.Module:
        """The network with its initial weights."""
        return VGG(self.stages, channels, classes)


@models("vgg16")
class VGG16(_SmallImageVGG):
    """VGG-16 with batch-norm for images of at least 32 pixels a side, one linear layer instead of three."""

    smallest = 32
    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # table 1, column D


@models("small-vgg")
class SmallVGG(_SmallImageVGG):
    """Four stages of one convolution each, 24-48-96-192 channels: a network without shortcuts that a CPU trains."""

    smallest = 16
    stages = ((24,), (48,), (96,), (192,))
