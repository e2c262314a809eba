"""How far released images are from their originals: changed pixels, norms, RMSE, PSNR and SSIM."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.dataset import Split
from bench.norms import lp_norm

CHUNK = 1 << 22  # values compared at a time, to bound memory
WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, in pixels
K1, K2 = 0.01, 0.03  # keep SSIM's quotients from 0 / 0


def perturbation(original: Split, released: Split) -> dict[str, float]:
    """What separates ``released`` from ``original``, image by image, as figures on the pixel scale [0, 1].

    ``changed_pixels_*`` count places, whatever the channels; ``linf_max`` is the largest change of all, ``l2_mean`` the
    mean length of an image's change; ``rmse`` and ``psnr`` (in dB, ``-20 log10 rmse``) are of all pixels together, and
    ``psnr`` is left out where nothing changed, as it would be infinite; ``ssim`` is the mean over the images.

    Args:
        original, released: of one length, at least 1, and one shape.
    """
    changed, largest, length, squares, similar = [], [], [], 0.0, []
    step = max(1, CHUNK // math.prod(original.shape))
    for start in range(0, len(original), step):
        rows = slice(start, start + step)
        x, x_adv = original.pixels(rows), released.pixels(rows)
        delta = x_adv - x
        changed.append(lp_norm(delta, "l0"))
        largest.append(lp_norm(delta, "linf"))
        length.append(lp_norm(delta, "l2"))
        squares += float(delta.double().square().sum())
        similar.append(ssim(x, x_adv))
    rmse = math.sqrt(squares / original.images.numel())
    figures = {
        "changed_pixels_mean": float(torch.cat(changed).mean()),
        "changed_pixels_max": float(torch.cat(changed).max()),
        "linf_max": float(torch.cat(largest).max()),
        "l2_mean": float(torch.cat(length).mean()),
        "rmse": rmse,
        "ssim": float(torch.cat(similar).double().mean()),
    }
    return figures if rmse == 0 else {**figures, "psnr": -20 * math.log10(rmse)}


def in_words(figures: Mapping[str, float]) -> str:
    """What :func:`perturbation` found, in one line."""
    if "psnr" not in figures:
        return "no pixel changed"
    mean, most, levels = figures["changed_pixels_mean"], figures["changed_pixels_max"], 255 * figures["linf_max"]
    return (
        f"pixels changed in an image: {mean:,.1f}, at most {most:,.0f}, by up to {levels:.0f} levels; "
        f"l2 {figures['l2_mean']:.3f}, RMSE {figures['rmse']:.4f}, PSNR {figures['psnr']:.1f} dB, "
        f"SSIM {figures['ssim']:.4f}"
    )


def ssim(x: Tensor, x_adv: Tensor) -> Tensor:
    """The structural similarity of image pairs: 1 where they are equal, towards 0 as structure is lost.

    Local means, variances and the covariance are weighted by a Gaussian of 11x11 pixels; the map is averaged over the
    windows that lie inside the image, and over the channels. Images below 11 pixels take the largest odd window that
    fits, and so do not compare with larger ones.

    Args:
        x, x_adv: (B, C, H, W) float in [0, 1].

    Returns:
        (B,) at most 1; negative where structure is inverted.

    Source:
        Wang et al., IEEE Transactions on Image Processing 2004, equation 13, with their constants and window.
    """
    moments = torch.stack((x, x_adv, x * x, x_adv * x_adv, x * x_adv))  # (5, B, C, H, W)
    mean, mean_adv, square, square_adv, product = _blur(moments)
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean * mean_adv + c1) / (mean**2 + mean_adv**2 + c1)
    variance = (square - mean**2) + (square_adv - mean_adv**2)
    structure = (2 * (product - mean * mean_adv) + c2) / (variance + c2)
    similar: Tensor = (luminance * structure).flatten(1).mean(dim=1)
    return similar


def _blur(images: Tensor) -> Tensor:
    """Gaussian means over the windows inside each image (..., H, W)."""
    height, width = images.shape[-2:]
    side = min(WINDOW, height, width)
    side -= 1 - side % 2
    means: Tensor = _band(height, side).to(images) @ images @ _band(width, side).to(images).T
    return means


def _band(size: int, side: int) -> Tensor:
    """A Gaussian window of ``side`` pixels at each place where it fits, (size - side + 1, size) float64."""
    offset = torch.arange(side, dtype=torch.float64) - side // 2
    weights = torch.softmax(-offset.square() / (2 * SIGMA**2), dim=0)
    return torch.stack([pad(weights, (at, size - side - at)) for at in range(size - side + 1)])
