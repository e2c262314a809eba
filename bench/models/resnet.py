"""Residual networks for small images."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from bench.errors import WeightsError
from bench.models.heads import Heads, pooled
from bench.models.normalise import usual
from bench.models.small import SmallImageNetwork
from bench.models.weights import load_weights
from bench.ranges import Few
from bench.registry import added, models


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al., 2016, figure 2)."""

    def __init__(self, inside: int, outside: int, stride: int, *, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module
        if inside == outside and stride == 1:
            self.shortcut = nn.Identity()
        elif projection:  # option B of section 3.3
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        else:
            self.shortcut = ZeroPadded(outside - inside, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, outside, H / stride, W / stride) from (B, inside, H, W)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ZeroPadded(nn.Module):
    """Option A of section 3.3: every ``stride``-th pixel, and ``extra`` channels of zeros, half on either side."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, C + extra, H / stride, W / stride) from (B, C, H, W)."""
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


class ResNet(nn.Module):
    """A 3x3 convolution and ``blocks[i]`` basic blocks of ``widths[i]`` channels, each stage at half the resolution.

    Its layers are named as the public CIFAR networks name them, so that their weights fit. There is no control flow
    that depends on the input, so that torch.fx can trace it and fold the batch-norm.
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], classes: int, *, projection: bool, normalise: nn.Module,
        channels: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.normalise = normalise
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inside = widths[0]
        stages = []
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            layers = []
            for stride in strides:
                layers.append(BasicBlock(inside, width, stride, projection=projection))
                inside = width
            stages.append(nn.Sequential(*layers))
            self.add_module(f"layer{stage + 1}", stages[-1])
        self.stages = len(stages)
        self.linear = nn.Linear(inside, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        out = F.relu(self.bn1(self.conv1(self.normalise(x))))
        for stage in range(self.stages):
            out = self.get_submodule(f"layer{stage + 1}")(out)
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


def with_heads(networks: Sequence[ResNet]) -> Heads:
    """The stages of the first of ``networks`` but the last, under the last stages of all of them."""
    first, last = networks[0], f"layer{networks[0].stages}"
    before = [first.get_submodule(f"layer{stage + 1}") for stage in range(first.stages - 1)]
    trunk = nn.Sequential(first.conv1, first.bn1, nn.ReLU(), *before)
    return Heads(first.normalise, trunk, [pooled(each.get_submodule(last), linear=each.linear) for each in networks])


@dataclass(frozen=True)
class _CifarResNet(SmallImageNetwork):
    """What the registered ResNets share; with several ``heads``, the last stage and what follows are there so often."""

    heads: Few = added(1)

    blocks: ClassVar[tuple[int, ...]]
    widths: ClassVar[tuple[int, ...]] = (16, 32, 64)
    projection: ClassVar[bool] = False
    paper: ClassVar[str] = "He et al., 2016, arXiv:1512.03385"

    def network(self, classes: int, channels: int) -> nn.Module:
        """The network with its initial weights."""
        networks = [
            ResNet(
                self.blocks, self.widths, classes, projection=self.projection, normalise=usual(channels),
                channels=channels,
            )
            for _ in range(self.heads)
        ]  # fmt: skip
        return networks[0] if self.heads == 1 else with_heads(networks)


@models("resnet20")
class ResNet20(_CifarResNet):
    """CIFAR ResNet-20 (section 4.2): 16-32-64 channels, shortcuts without parameters."""

    blocks = (3, 3, 3)


@models("resnet32")
class ResNet32(_CifarResNet):
    """CIFAR ResNet-32 (section 4.2)."""

    blocks = (5, 5, 5)


@models("resnet44")
class ResNet44(_CifarResNet):
    """CIFAR ResNet-44 (section 4.2)."""

    blocks = (7, 7, 7)


@models("resnet56")
class ResNet56(_CifarResNet):
    """CIFAR ResNet-56 (section 4.2)."""

    blocks = (9, 9, 9)


@models("resnet110")
class ResNet110(_CifarResNet):
    """CIFAR ResNet-110 (section 4.2) as randomized smoothing has it: basic blocks, with projection shortcuts."""

    blocks = (18, 18, 18)
    projection = True


@models("resnet18")
class ResNet18(_CifarResNet):
    """ResNet-18 for small images: 64-128-256-512 channels, projection shortcuts, no pooling after the first layer."""

    blocks = (2, 2, 2, 2)
    widths = (64, 128, 256, 512)
    projection = True


@models("robust-resnet18")
@dataclass(frozen=True)
class RobustResNet18:
    """The CIFAR-10 ResNet-18 that the package ``pyautoattack`` brings as an example.

    It does not keep what its name promises: on JPEG-coded test images ten steps of PGD leave 0 of 30 at linf 8/255 and
    4 at 1/255. It was trained on the lossless images, without normalisation.
    """

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Croce and Hein, 2020, arXiv:2003.01690 (the example of its code)"
    trained: ClassVar[bool] = True

    def __call__(self, classes: int, shape: tuple[int, int, int], model_dir: Path | None) -> nn.Module:
        """Build it, in eval mode; see ``Architecture``.

        Raises:
            WeightsError: the package is not there, or ten classes and three channels do not fit the data.
        """
        package = importlib.util.find_spec("pyautoattack")  # found, not imported: only its file is wanted
        if package is None or package.origin is None:
            raise WeightsError("robust-resnet18 needs the weights in pyautoattack; pip install 'parry-bench[foreign]'")
        network = ResNet(
            ResNet18.blocks, ResNet18.widths, classes, projection=True, normalise=nn.Identity(), channels=shape[0]
        )
        file = Path(package.origin).parent / "examples" / "model_test.pt"
        load_weights(network, file, None, f"robust-resnet18 with {classes} classes and {shape[0]} channels")
        return network.eval()
