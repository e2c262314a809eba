"""GoogLeNet for small images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.models.normalise import usual
from bench.models.small import SmallImageNetwork
from bench.registry import models

# Table 1: channels of 1x1; of 3x3, reduced first and then out; of 5x5, reduced and out; and of the pooled branch.
STAGES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)  # fmt: skip


class Inception(nn.Module):
    """Four branches side by side, of the widths of a line of table 1; two 3x3 convolutions stand for the 5x5 one."""

    def __init__(self, inside: int, widths: Sequence[int]) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = widths
        self.branches = nn.ModuleList([
            nn.Sequential(*_layer(inside, one, 1)),
            nn.Sequential(*_layer(inside, reduce3, 1), *_layer(reduce3, three, 3)),
            nn.Sequential(*_layer(inside, reduce5, 1), *_layer(reduce5, five, 3), *_layer(five, five, 3)),
            nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *_layer(inside, pooled, 1)),
        ])  # fmt: skip
        self.width = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, width, H, W) from (B, inside, H, W)."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class GoogLeNet(nn.Module):
    """A 3x3 convolution and the inception modules, a pooling between their stages; no auxiliary classifiers."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.normalise = usual(channels)
        inside = 192
        layers: list[nn.Module] = [*_layer(channels, inside, 3)]
        for number, stage in enumerate(STAGES):
            if number > 0:
                layers.append(nn.MaxPool2d(3, stride=2, padding=1))
            for widths in stage:
                module = Inception(inside, widths)
                layers.append(module)
                inside = module.width
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        features: Tensor = self.features(self.normalise(x))  # (B, 1024, H / 4, W / 4)
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


def _layer(inside: int, outside: int, size: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inside, outside, size, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(outside), nn.ReLU()


@models("googlenet")
@dataclass(frozen=True)
class SmallGoogLeNet(SmallImageNetwork):
    """GoogLeNet with batch-norm for small images, one convolution at full resolution before the first module."""

    paper: ClassVar[str] = "Szegedy et al., CVPR 2015, arXiv:1409.4842"

    def network(self, classes: int, channels: int) -> nn.Module:
        """The network with its initial weights."""
        return GoogLeNet(channels, classes)
