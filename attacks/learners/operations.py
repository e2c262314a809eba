"""The operations of RandAugment and TrivialAugment for a batch whose every image has its own, at its own level."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.learners.cutout import boxes
from attacks.learners.squeezing import luma
from bench.norms import per_sample
from bench.rng import SampleRng

# The first 14 are TrivialAugment's, all but the first RandAugment's.
OPERATIONS = (
    "identity", "autocontrast", "equalize", "posterize", "solarize", "brightness", "color", "contrast", "sharpness",
    "shear-x", "shear-y", "translate-x", "translate-y", "rotate", "invert", "cutout",
)  # fmt: skip
TRIVIAL = 14

GREY = 128  # fills what an operation uncovers
SHEAR, SHIFT, DEGREES = 0.3, 150 / 331, 30  # at the highest level, as AutoAugment has them
ENHANCE = 0.9  # how far a factor is from 1 at the highest level
HOLE = 20 / 32  # side of the hole at the highest level, as a share of the image's shorter side


def operate(x: Tensor, operation: Tensor, level: Tensor, rng: SampleRng) -> Tensor:
    """Change each image by the operation and at the level that are its own.

    Every operation is computed for the whole batch and the wanted one kept, so nothing waits for the device. Values are
    those of Pillow on 8-bit images; shears, shifts and rotations are about the centre, and bilinear.

    Args:
        x: (B, C, H, W) in [0, 1]; anything but RGB counts as already grey.
        operation: (B,) int64, places in :data:`OPERATIONS`.
        level: (B,) in [0, 1]; at 0 nothing changes but under autocontrast, equalize and invert, which have no levels.
        rng: for signs, and for where the hole lies.

    Returns:
        (B, C, H, W) in [0, 1], whole grey levels.

    Source:
        Cubuk et al., 2020, arXiv:1909.13719, with the ranges of Cubuk et al., 2019, arXiv:1805.09501, table 6.
    """
    grey_level = (x * 255).round()  # (B, C, H, W), whole numbers
    signed = level * (rng.fork("sign").coins().float() * 2 - 1)
    factor = per_sample(1 + ENHANCE * signed)
    grey = luma(grey_level.to(torch.uint8)).float()
    mean = (grey.mean((1, 2, 3), keepdim=True) + 0.5).floor()
    bit = per_sample(2 ** (4 * level).round())
    side = (level * HOLE * min(x.shape[2:])).round().long()
    results = {
        "autocontrast": _autocontrast(grey_level),
        "equalize": _equalize(grey_level),
        "posterize": (grey_level / bit).floor() * bit,
        "solarize": torch.where(grey_level < per_sample(256 * (1 - level)), grey_level, 255 - grey_level),
        "brightness": _blend(torch.zeros_like(grey), grey_level, factor),
        "color": _blend(grey, grey_level, factor),
        "contrast": _blend(mean, grey_level, factor),
        "sharpness": _blend(_smooth(grey_level), grey_level, factor),
        "invert": 255 - grey_level,
        "cutout": grey_level.masked_fill(boxes(x, side, side, rng.fork("hole")), GREY),
    }
    out = grey_level
    for name, result in results.items():
        out = torch.where(per_sample(operation == OPERATIONS.index(name)), result, out)
    moved = _warp(grey_level, operation, signed)
    moves = (operation >= OPERATIONS.index("shear-x")) & (operation <= OPERATIONS.index("rotate"))
    return torch.where(per_sample(moves), moved, out) / 255


def _blend(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """From ``degenerate`` (factor 0) over ``x`` (factor 1) and beyond, rounded down."""
    return (degenerate + factor * (x - degenerate)).clamp(0, 255).floor()


def _smooth(x: Tensor) -> Tensor:
    """Weighted means of 3x3 pixels, the middle one counting five times; the border as it is."""
    weights = torch.ones(3, 3, device=x.device)
    weights[1, 1] = 5
    out = x.clone()
    window = (weights / 13).expand(x.shape[1], 1, 3, 3)
    out[:, :, 1:-1, 1:-1] = (F.conv2d(x, window, groups=x.shape[1]) + 0.5).floor()
    return out


def _autocontrast(x: Tensor) -> Tensor:
    """Each channel stretched to 0 .. 255; one of a single level as it is."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    stretched = ((x - low) * 255 / (high - low).clamp(min=1)).floor()
    return torch.where(high > low, stretched, x)


def _equalize(x: Tensor) -> Tensor:
    """Each channel mapped so that its levels are as evenly filled as their histogram allows, as Pillow does it."""
    flat = x.flatten(2).long()  # (B, C, H W)
    histogram = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=x.device)
    histogram.scatter_add_(2, flat, torch.ones_like(flat))
    last = histogram.gather(2, flat.amax(2, keepdim=True))  # (B, C, 1) pixels of the brightest level
    step = (flat.shape[2] - last) // 255
    below = histogram.cumsum(2) - histogram
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step[..., None] > 0, table.gather(2, flat).view(x.shape).to(x), x)


def _warp(x: Tensor, operation: Tensor, signed: Tensor) -> Tensor:
    """The five affine operations, each about the centre of the image; the others give ``x`` up to rounding."""
    height, width = x.shape[2:]

    def amount(name: str, most: float) -> Tensor:
        return torch.where(operation == OPERATIONS.index(name), most * signed, 0)

    angle = amount("rotate", math.radians(DEGREES))
    rows = (
        (angle.cos(), (amount("shear-x", SHEAR) - angle.sin()) * height / width, 2 * amount("translate-x", SHIFT)),
        ((amount("shear-y", SHEAR) + angle.sin()) * width / height, angle.cos(), 2 * amount("translate-y", SHIFT)),
    )  # where each pixel comes from, in units of half the image
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return (F.grid_sample(x - GREY, grid, align_corners=False) + GREY).round().clamp(0, 255)
