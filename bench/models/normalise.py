"""Normalisation as a layer, so that every network takes pixels in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as torchvision and timm publish them


class Normalise(nn.Module):
    """Shift and scale each channel: ``(x - mean) / std`` for images (B, C, H, W).

    The two constants are no part of the state dict, so weights published for the bare network fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)  # (C, 1, 1)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised images, shaped like ``x``."""
        return (x - self.mean) / self.std


def usual(channels: int) -> Normalise:
    """ImageNet's constants for colour images, and mean 0.5, standard deviation 0.25 for any other channels."""
    if channels == 3:
        return Normalise(IMAGENET_MEAN, IMAGENET_STD)
    return Normalise([0.5] * channels, [0.25] * channels)
