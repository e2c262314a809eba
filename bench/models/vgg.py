"""VGG-16 for small images."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bench.models.normalise import usual
from bench.models.small import SmallImageNetwork
from bench.registry import models

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # table 1, column D


class VGG(nn.Module):
    """3x3 convolutions with batch-norm, a pooling after each stage, the mean over what is left, a linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.normalise = usual(channels)
        layers: list[nn.Module] = []
        inside = channels
        for stage in STAGES:
            for width in stage:
                layers += nn.Conv2d(inside, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
                inside = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        features: Tensor = self.features(self.normalise(x))  # (B, 512, H // 32, W // 32)
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


@models("vgg16")
@dataclass(frozen=True)
class VGG16(SmallImageNetwork):
    """VGG-16 with batch-norm for images of at least 32 pixels a side, one linear layer instead of three."""

    smallest: ClassVar[int] = 32
    paper: ClassVar[str] = "Simonyan and Zisserman, ICLR 2015, arXiv:1409.1556"

    def network(self, classes: int, channels: int) -> nn.Module:
        """The network with its initial weights."""
        return VGG(channels, classes)
