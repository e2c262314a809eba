"""Distances, projections and steepest directions, per sample over (C, H, W)."""

import torch
from torch import Tensor

from bench.errors import ConfigError
from bench.threat import Norm, Threat

TINY = 1e-12  # keeps a zero direction from dividing by zero


def lp_norm(delta: Tensor, norm: Norm) -> Tensor:
    """The norm of each perturbation.

    Args:
        delta: (B, C, H, W) on the pixel scale.
        norm: ``l0`` counts pixels, whatever the number of channels that changed in each.

    Returns:
        (B,) in the dtype of ``delta``.
    """
    if norm == "l0":
        return (delta != 0).any(dim=1).flatten(1).sum(dim=1).to(delta.dtype)
    if norm == "l1":
        return delta.flatten(1).abs().sum(dim=1)
    if norm == "l2":
        return delta.flatten(1).square().sum(dim=1).sqrt()
    if norm == "linf":
        low, high = delta.flatten(1).aminmax(dim=1)  # one pass, no |delta| in memory
        return torch.maximum(high, -low)
    raise ConfigError(f"norm is {norm!r}; use one of l0, l1, l2, linf")


def box(x: Tensor, threat: Threat) -> tuple[Tensor, Tensor]:
    """The lowest and highest values (B, C, H, W) that each pixel can take in the linf ball and the box [0, 1]."""
    return (x - threat.eps).clamp(min=0), (x + threat.eps).clamp(max=1)


def project(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """The point of the ball around ``x`` and the box [0, 1] that stands for ``x_adv``.

    Exact for linf. For l2 the ball comes first and the box second; clamping moves every pixel towards ``x``, so the
    result stays in the ball.

    Args:
        x_adv, x: (B, C, H, W).
        threat: ``linf`` or ``l2``.

    Raises:
        ConfigError: another norm.
    """
    if threat.norm == "linf":
        low, high = box(x, threat)
        return torch.minimum(torch.maximum(x_adv, low), high)
    if threat.norm == "l2":
        delta = x_adv - x
        scale = (threat.eps / (lp_norm(delta, "l2") + TINY)).clamp(max=1)
        return (x + delta * per_sample(scale)).clamp(0, 1)
    raise ConfigError(f"no projection onto the {threat.norm} ball; use linf or l2")


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The direction of unit norm that rises fastest along ``gradient`` (B, C, H, W): its sign for linf, else scaled."""
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        return gradient / per_sample(lp_norm(gradient, "l2") + TINY)
    raise ConfigError(f"no steepest direction for {norm}; use linf or l2")


def per_sample(values: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1), to broadcast over images."""
    return values[:, None, None, None]
