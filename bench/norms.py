"""Distances, projections and steepest directions, per sample over (C, H, W)."""

import torch
from torch import Tensor

from bench.errors import ConfigError
from bench.threat import Norm, Threat

DUAL: dict[Norm, float] = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}  # order of the norm that gradients are measured in
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


def project(x_adv: Tensor, x: Tensor, threat: Threat, radius: Tensor | None = None) -> Tensor:
    """The point of the ball around ``x`` and the box [0, 1] that stands for ``x_adv``.

    The nearest one in l2 for linf and l1. For l2 the ball comes first and the box second; clamping moves every pixel
    towards ``x``, so the result stays in the ball.

    Args:
        x_adv, x: (B, C, H, W).
        threat: ``linf``, ``l2`` or ``l1``.
        radius: (B,) of the balls, in place of ``threat.eps`` for all.

    Raises:
        ConfigError: another norm.
    """
    if threat.norm == "linf":
        far = threat.eps if radius is None else per_sample(radius)
        low, high = (x - far).clamp(min=0), (x + far).clamp(max=1)
        return torch.minimum(torch.maximum(x_adv, low), high)
    if threat.norm == "l2":
        delta = x_adv - x
        scale = ((threat.eps if radius is None else radius) / (lp_norm(delta, "l2") + TINY)).clamp(max=1)
        return (x + delta * per_sample(scale)).clamp(0, 1)
    if threat.norm == "l1":
        clean, far = x.double(), threat.eps if radius is None else radius[:, None]
        delta = _nearest_l1((x_adv - clean).flatten(1), clean.flatten(1), far).view_as(x)
        nearest = (clean + delta).to(x.dtype)
        # Rounding errors of all values add up, so each is rounded towards x.
        return torch.where((nearest - clean).abs() > delta.abs(), nearest.nextafter(x), nearest)
    raise ConfigError(f"no projection onto the {threat.norm} ball; use linf, l2 or l1")


def _nearest_l1(delta: Tensor, x: Tensor, eps: float | Tensor) -> Tensor:
    """The change (B, d) nearest to ``delta`` of l1 norm at most ``eps``, one or (B, 1), that keeps ``x`` in the box.

    By Lagrange, every value loses the same length ``cut`` and is clamped to its room in the box. What is left is
    piecewise linear in ``cut``; each value starts to lose at its excess over the room, and has lost all at its size.
    """
    size = delta.abs()
    room = torch.where(delta > 0, 1 - x, x).clamp(min=0)
    starts = (size - room).clamp(min=0)
    ends, order = torch.cat((starts, size), dim=1).sort(dim=1)                  # the bends of that line, (B, 2 d)
    slope = torch.where(order < delta.shape[1], 1.0, -1.0).to(delta).cumsum(dim=1)  # values that lose between two
    fall = slope[:, :-1] * ends.diff(dim=1)
    total = torch.minimum(size, room).sum(dim=1, keepdim=True)                  # with no cut at all
    lost = torch.cat((torch.zeros_like(total), fall.cumsum(dim=1)), dim=1)      # (B, 2 d), at each bend
    over = (total - eps).clamp(min=0)
    at = ((lost <= over).sum(dim=1, keepdim=True) - 1).clamp(min=0, max=ends.shape[1] - 1)
    cut = ends.gather(1, at) + (over - lost.gather(1, at)) / slope.gather(1, at).clamp(min=1)
    cut = torch.where(over > 0, cut, 0)
    return delta.sign() * torch.minimum((size - cut).clamp(min=0), room)


def steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The direction of unit norm that rises fastest along ``gradient`` (B, C, H, W): its sign for linf, else scaled."""
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        return gradient / per_sample(lp_norm(gradient, "l2") + TINY)
    raise ConfigError(f"no steepest direction for {norm}; use linf or l2")


def choose(taken: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The images ``new`` (n, C, H, W) in the rows that are ``taken`` (n,), else ``old``; in memory of its own."""
    if taken.is_cuda:
        return torch.where(per_sample(taken), new, old)
    rows, chosen = taken.nonzero().squeeze(1), old.clone()  # which copies whole rows, in half of the time
    chosen[rows] = new[rows]
    return chosen


def per_sample(values: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1), to broadcast over images."""
    return values[:, None, None, None]
