"""Image shortcut squeezing: one fixed map of the released images, before any training."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from bench.dataset import Dataset, Split, grey_levels
from bench.errors import ConfigError
from bench.protocols import Job
from bench.registry import attacks
from bench.threat import Access
from bench.training import Trainer


@attacks("grayscale")
@dataclass(frozen=True, kw_only=True)
class Grayscale(Trainer):
    """Train on the luma of the images, in every channel; images that are no RGB lose nothing but their 8-bit rounding.

    Source:
        Liu et al., ICML 2023, arXiv:2301.13838.
    """

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Liu et al., ICML 2023, arXiv:2301.13838"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        return self.train(build, squeezed(data, lambda images: luma(images).expand_as(images)), job)


@attacks("bit-depth")
@dataclass(frozen=True, kw_only=True)
class BitDepth(Trainer):
    """Train on the highest ``bits`` bits of each value, the others zero.

    Source:
        Liu et al., ICML 2023, arXiv:2301.13838.
    """

    bits: int = 2

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Liu et al., ICML 2023, arXiv:2301.13838"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"bits is {self.bits}; a value has 8, keep 1 to 8 of them")

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        kept = 256 - (1 << (8 - self.bits))
        return self.train(build, squeezed(data, lambda images: images & kept), job)


@attacks("jpeg")
@dataclass(frozen=True, kw_only=True)
class Jpeg(Trainer):
    """Train on what is left of the images after JPEG compression, each by itself, as Pillow does it by default.

    Args:
        quality: 1 to 95, Pillow's scale.

    Source:
        Liu et al., ICML 2023, arXiv:2301.13838.
    """

    quality: int = 10

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Liu et al., ICML 2023, arXiv:2301.13838"

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise ConfigError(f"quality is {self.quality}; JPEG has 1 to 95")

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``.

        Raises:
            ConfigError: the images are neither grey nor RGB.
        """
        return self.train(build, squeezed(data, lambda images: compressed(images, self.quality)), job)


@attacks("gaussian-blur")
@dataclass(frozen=True, kw_only=True)
class GaussianBlur(Trainer):
    """Train on blurred images, in float; the border is mirrored.

    APBench's ``sigma`` of 0.1 pixels is the identity but for rounding; the default blurs.

    Args:
        kernel: width in pixels, odd.
        sigma: standard deviation in pixels.

    Source:
        the blur of APBench, Qin et al., 2023, arXiv:2308.03258, with another ``sigma``.
    """

    kernel: int = 3
    sigma: float = 1.0

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Qin et al., TMLR 2024, arXiv:2308.03258"

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"kernel is {self.kernel}; it is an odd number of pixels")
        if not 0 < self.sigma < math.inf:
            raise ConfigError(f"sigma is {self.sigma}; it is a number of pixels, positive and finite")

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        if self.kernel // 2 >= min(data.train.shape[1:]):
            raise ConfigError(f"kernel {self.kernel} does not fit images of {data.train.shape[1:]}; take a smaller one")
        return self.train(build, data, job, prepare=self.prepare)

    def prepare(self, x: Tensor) -> Tensor:
        """The blurred images (B, C, H, W)."""
        reach, channels = self.kernel // 2, x.shape[1]
        distance = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
        weights = torch.softmax(-distance.square() / (2 * self.sigma**2), dim=0)
        window = torch.outer(weights, weights).expand(channels, 1, -1, -1)
        return F.conv2d(F.pad(x, (reach,) * 4, mode="reflect"), window, groups=channels)


def squeezed(data: Dataset, change: Callable[[Tensor], Tensor]) -> Dataset:
    """``data`` with ``change`` made to its training images, uint8 (N, C, H, W)."""
    return data.released(Split(change(grey_levels(data.train)), data.train.labels))


def luma(images: Tensor) -> Tensor:
    """The luma (N, 1, H, W) of RGB ``images`` (N, 3, H, W) uint8, as Pillow rounds it; other images as they are."""
    if images.shape[1] != 3:
        return images
    red, green, blue = images.int().split(1, dim=1)
    rounded: Tensor = 19595 * red + 38470 * green + 7471 * blue + (1 << 15) >> 16  # 0.299, 0.587, 0.114 by 2^16
    return rounded.to(torch.uint8)


def compressed(images: Tensor, quality: int) -> Tensor:
    """``images`` (N, C, H, W) uint8, grey or RGB, written as JPEG files of ``quality`` and read again."""
    if images.shape[1] not in (1, 3):
        raise ConfigError(f"JPEG takes 1 or 3 channels, the images have {images.shape[1]}; choose another learner")
    pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()  # (N, H, W, C)
    read = np.empty_like(pixels)
    for row, image in enumerate(pixels):
        file = io.BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(file, "JPEG", quality=quality)
        read[row] = np.asarray(Image.open(file)).reshape(image.shape)
    return torch.from_numpy(read).permute(0, 3, 1, 2).contiguous().to(images.device)
