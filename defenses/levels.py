"""Perturbations in whole grey levels, as data defenses release them."""

import torch
from torch import Tensor

from bench.errors import ConfigError
from bench.norms import per_sample

ROUNDING = 1e-6  # grey levels that a radius may be off, from divisions by 255
HALVINGS = 12  # the scale of an l2 perturbation is found to 2^-12


def whole_levels(eps: float) -> int:
    """The grey levels in a linf radius ``eps`` on the pixel scale: 8 in 8/255.

    Raises:
        ConfigError: it is no whole number of levels, at least one and at most all 255.
    """
    levels = eps * 255
    if not (1 - ROUNDING < levels < 255 + ROUNDING and abs(levels - round(levels)) < ROUNDING):
        raise ConfigError(
            f"eps is {eps:g}; released images are grey levels, so write 1/255, which is one grey level, 2/255, ... or 1"
        )
    return round(levels)


def moved(images: Tensor, delta: Tensor) -> Tensor:
    """``images`` (N, C, H, W) uint8 plus ``delta`` in whole grey levels, cut off at black and white."""
    return (images + delta.round().short()).clamp(0, 255).byte()


def rounded_in_l2(delta: Tensor, eps: float) -> Tensor:
    """``delta`` (N, C, H, W) in whole grey levels, each image's scaled down as little as its l2 ball asks for.

    The norm of ``round(scale * delta)`` never falls as the scale grows, so halving finds the largest scale up to 1.
    Images whose norm is not above ``eps`` are rounded as they are, if they stay inside.

    Args:
        delta: in grey levels, before rounding.
        eps: the radius on the pixel scale.
    """
    def fits(scale: Tensor) -> Tensor:
        squares = (per_sample(scale) * delta).round().square().flatten(1).sum(dim=1, dtype=torch.float64)
        return squares <= (255 * eps) ** 2 + 1e-6

    whole = delta.new_ones(len(delta))
    low, high = torch.where(fits(whole), whole, 0), whole
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        inside = fits(middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return (per_sample(low) * delta).round()
