"""What defenses that edit logits share: those of held-out images, and a gradient past the edit."""

from typing import Any

import torch
from torch import Tensor, nn

from bench.dataset import Split
from bench.errors import ConfigError


def calibration_logits(model: nn.Module, calibration: Split) -> tuple[Tensor, Tensor]:
    """The logits of ``model`` on the calibration split, and its labels, where the model is."""
    if len(calibration) == 0:
        raise ConfigError("temperature is 'tuned' but there are no calibration images; give a number, such as 1.0")
    device = device_of(model)
    split = calibration.to(device)
    with torch.inference_mode():
        batches = torch.split(torch.arange(len(split), device=device), 256)
        logits = torch.cat([model(split.pixels(rows)) for rows in batches])
    return logits, split.labels


def device_of(model: nn.Module) -> torch.device:
    """Where the weights of ``model`` are; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def straight_through(logits: Tensor, edited: Tensor) -> Tensor:
    """``edited`` to the last bit, with the gradient of ``logits``: the edit is taken for the identity (BPDA)."""
    return _StraightThrough.apply(logits, edited)  # type: ignore[no-any-return]


class _StraightThrough(torch.autograd.Function):
    """The value of the second argument with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, edited: Tensor) -> Tensor:
        return edited.view_as(edited)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
