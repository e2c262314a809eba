"""Where the balls of a batch end, and which of them can be confused."""

import torch
from torch import Tensor

from bench.norms import lp_norm
from bench.threat import Norm

TOLERANCE = 1e-6  # what float32 rounding may add to a distance; grows with radii above 1
ORDERS: dict[Norm, float] = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}


def limit(radius: float) -> float:
    """The largest distance that passes for ``radius``."""
    return radius + TOLERANCE * max(1.0, radius)


def inside(x: Tensor, clean: Tensor, norm: Norm, radius: float) -> Tensor:
    """Which images ``x`` (n, C, H, W) are in the ball of ``radius`` around theirs of ``clean``, and in the box."""
    low, high = x.flatten(1).aminmax(dim=1)
    return (lp_norm(x - clean, norm) <= limit(radius)) & (low >= -TOLERANCE) & (high <= 1 + TOLERANCE)


def distances(x: Tensor, others: Tensor, norm: Norm) -> Tensor:
    """From each of ``x`` (n, C, H, W) to each of ``others`` (m, C, H, W): (n, m)."""
    return torch.cdist(x.flatten(1), others.flatten(1), p=ORDERS[norm], compute_mode="donot_use_mm_for_euclid_dist")


def apart(x: Tensor, norm: Norm, radius: float) -> list[Tensor]:
    """The rows of ``x`` (B, C, H, W) in as few groups as a greedy choice finds, no two balls of a group touching.

    An image inside a ball of its group then belongs to one sample of it and to no other.
    """
    touching = (distances(x, x, norm) <= 2.01 * limit(radius)).cpu() if norm in ORDERS else None
    groups: list[list[int]] = []
    for row in range(len(x)):
        free = (group for group in groups if touching is not None and not touching[row, group].any())
        group = next(free, None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    return [torch.tensor(group, device=x.device) for group in groups]
