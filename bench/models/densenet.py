"""DenseNet-121 for small images."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.models.normalise import usual
from bench.models.small import SmallImageNetwork
from bench.registry import models

BLOCKS = (6, 12, 24, 16)  # layers of each dense block, table 1
GROWTH = 32  # channels that a layer adds


class Layer(nn.Module):
    """A 1x1 convolution to 4 * GROWTH channels and a 3x3 one to GROWTH, beside all features so far (DenseNet-B)."""

    def __init__(self, inside: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, 4 * GROWTH, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * GROWTH)
        self.conv2 = nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, inside + GROWTH, H, W) from (B, inside, H, W)."""
        out = self.conv1(F.relu(self.bn1(x)))
        return torch.cat((x, self.conv2(F.relu(self.bn2(out)))), dim=1)


class DenseNet(nn.Module):
    """A 3x3 convolution and the dense blocks; between two of them, half the channels and half the resolution."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.normalise = usual(channels)
        inside = 2 * GROWTH
        layers: list[nn.Module] = [nn.Conv2d(channels, inside, 3, padding=1, bias=False)]
        for block, count in enumerate(BLOCKS):
            if block > 0:
                layers += nn.BatchNorm2d(inside), nn.ReLU(), nn.Conv2d(inside, inside // 2, 1, bias=False)
                layers.append(nn.AvgPool2d(2))
                inside //= 2
            for _ in range(count):
                layers.append(Layer(inside))
                inside += GROWTH
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(inside), nn.ReLU())
        self.linear = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        features: Tensor = self.features(self.normalise(x))  # (B, 1024, H // 8, W // 8)
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


@models("densenet121")
@dataclass(frozen=True)
class DenseNet121(SmallImageNetwork):
    """DenseNet-121 for images of at least 8 pixels a side, no pooling after the first layer."""

    smallest: ClassVar[int] = 8
    paper: ClassVar[str] = "Huang et al., CVPR 2017, arXiv:1608.06993"

    def network(self, classes: int, channels: int) -> nn.Module:
        """The network with its initial weights."""
        return DenseNet(channels, classes)
