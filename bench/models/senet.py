"""SENet-18 for small images."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from bench.models.normalise import usual
from bench.models.small import SmallImageNetwork
from bench.registry import models

WIDTHS = (64, 128, 256, 512)  # of the stages, two blocks each
REDUCTION = 16


class Block(nn.Module):
    """Two 3x3 convolutions, batch-norm before each, their channels rescaled by a gate, beside a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.squeeze = nn.Conv2d(outside, outside // REDUCTION, 1)
        self.excite = nn.Conv2d(outside // REDUCTION, outside, 1)
        self.projects = stride != 1 or inside != outside
        if self.projects:
            self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, outside, H / stride, W / stride) from (B, inside, H, W)."""
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        gate = self.excite(F.relu(self.squeeze(out.mean((2, 3), keepdim=True)))).sigmoid()  # (B, outside, 1, 1)
        features: Tensor = out * gate + (self.shortcut(active) if self.projects else x)
        return features


class SENet(nn.Module):
    """A 3x3 convolution and two blocks of each width, each stage at half the resolution."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.normalise = usual(channels)
        inside = WIDTHS[0]
        layers: list[nn.Module] = [
            nn.Conv2d(channels, inside, 3, padding=1, bias=False), nn.BatchNorm2d(inside), nn.ReLU(),
        ]  # fmt: skip
        for stage, width in enumerate(WIDTHS):
            layers += Block(inside, width, 1 if stage == 0 else 2), Block(width, width, 1)
            inside = width
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        features: Tensor = self.features(self.normalise(x))  # (B, 512, H / 8, W / 8)
        logits: Tensor = self.linear(features.mean((2, 3)))
        return logits


@models("senet18")
@dataclass(frozen=True)
class SENet18(SmallImageNetwork):
    """SENet-18 for small images: a pre-activation ResNet-18 with squeeze-and-excitation in every block."""

    paper: ClassVar[str] = "Hu et al., CVPR 2018, arXiv:1709.01507"

    def network(self, classes: int, channels: int) -> nn.Module:
        """The network with its initial weights."""
        return SENet(channels, classes)
