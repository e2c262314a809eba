"""Networks whose blocks normalise and activate before they convolve: PreActResNet-18 and WideResNet-28-10."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from bench.models.normalise import usual
from bench.models.small import SmallImageNetwork
from bench.registry import models


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch-norm and ReLU (He et al., 2016, figure 4e).

    Where size or width change, the shortcut is a 1x1 convolution of what the first convolution is given; ``shortcut``
    is what published weights call it.
    """

    def __init__(self, inside: int, outside: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.projects = shortcut if stride != 1 or inside != outside else ""
        if self.projects:
            projection = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.add_module(shortcut, nn.Sequential(projection) if shortcut == "shortcut" else projection)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, outside, H / stride, W / stride) from (B, inside, H, W)."""
        active = F.relu(self.bn1(x))
        kept = self.get_submodule(self.projects)(active) if self.projects else x
        features: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active)))) + kept
        return features


def stages(blocks: Sequence[int], widths: Sequence[int], shortcut: str) -> list[nn.Sequential]:
    """``blocks[i]`` blocks of ``widths[i + 1]`` channels, each stage but the first at half the resolution."""
    made = []
    for stage, count in enumerate(blocks):
        inside, outside = widths[stage], widths[stage + 1]
        layers = [PreActBlock(inside, outside, 1 if stage == 0 else 2, shortcut)]
        layers += [PreActBlock(outside, outside, 1, shortcut) for _ in range(count - 1)]
        made.append(nn.Sequential(*layers))
    return made


def initialise(network: nn.Module) -> None:
    """He's normal weights for the convolutions."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class PreActResNet(nn.Module):
    """A 3x3 convolution, four stages, batch-norm and ReLU, the mean over the pixels, a linear layer."""

    def __init__(self, blocks: Sequence[int], channels: int, classes: int) -> None:
        super().__init__()
        self.normalise = usual(channels)
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages(blocks, (64, 64, 128, 256, 512), "shortcut")
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(self.normalise(x))))))
        logits: Tensor = self.linear(F.relu(self.bn(out)).mean((2, 3)))
        return logits


class _Stage(nn.Module):
    """A stage under the name that published weights of wide networks have for it."""

    def __init__(self, layer: nn.Sequential) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layer(x)
        return features


class WideResNet(nn.Module):
    """Three stages of (depth - 4) / 6 blocks, of 16, 32 and 64 channels times ``widen``."""

    def __init__(self, depth: int, widen: int, channels: int, classes: int) -> None:
        super().__init__()
        self.normalise = usual(channels)
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks, widths = [(depth - 4) // 6] * 3, (16, 16 * widen, 32 * widen, 64 * widen)
        self.block1, self.block2, self.block3 = map(_Stage, stages(blocks, widths, "convShortcut"))
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        out = self.block3(self.block2(self.block1(self.conv1(self.normalise(x)))))
        logits: Tensor = self.fc(F.relu(self.bn1(out)).mean((2, 3)))
        return logits


@models("preact-resnet18")
@dataclass(frozen=True)
class PreActResNet18(SmallImageNetwork):
    """PreActResNet-18 for small images: stages of 2 blocks, 64-128-256-512 channels, a last batch-norm.

    Layers are named as in the public codes of adversarial training, so that their weights fit.
    """

    paper: ClassVar[str] = "He et al., 2016, arXiv:1603.05027"

    def network(self, classes: int, channels: int) -> nn.Module:
        """The network with its initial weights."""
        return PreActResNet((2, 2, 2, 2), channels, classes)


@models("wide-resnet28-10")
@dataclass(frozen=True)
class WideResNet28x10(SmallImageNetwork):
    """WideResNet-28-10 for small images, without dropout; layers are named as in the public codes."""

    paper: ClassVar[str] = "Zagoruyko and Komodakis, 2016, arXiv:1605.07146"

    def network(self, classes: int, channels: int) -> nn.Module:
        """The network with its initial weights."""
        return WideResNet(28, 10, channels, classes)
