"""What separates released images from their originals: closed forms, and figures of independent implementations."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from bench.dataset import Split
from bench.measure.perturbation import perturbation, ssim


def split(images: torch.Tensor) -> Split:
    return Split(images, torch.zeros(len(images), dtype=torch.int64))


def pattern() -> tuple[torch.Tensor, torch.Tensor]:
    """An image of 24x20 pixels and a copy changed by up to 16 levels, both uint8 (1, 3, 24, 20)."""
    c, i, j = np.mgrid[0:3, 0:24, 0:20]
    x = (7 * i + 13 * j + 50 * c) % 256
    x_adv = np.clip(x + ((3 * i + 5 * j + c) % 9 - 4) * 4, 0, 255)
    return torch.from_numpy(x.astype(np.uint8))[None], torch.from_numpy(x_adv.astype(np.uint8))[None]


def reference(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of one channel, with scipy's Gaussian, cut at 3.5 sigma to 11 pixels."""

    def blur(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, sigma=1.5, truncate=3.5)[5:-5, 5:-5]

    covariance = blur(x * y) - blur(x) * blur(y)
    variance = blur(x * x) - blur(x) ** 2 + blur(y * y) - blur(y) ** 2
    top = (2 * blur(x) * blur(y) + 0.01**2) * (2 * covariance + 0.03**2)
    return float((top / ((blur(x) ** 2 + blur(y) ** 2 + 0.01**2) * (variance + 0.03**2))).mean())


def test_figures_of_scikit_image():
    """Of structural_similarity (Wang's window and weights) and peak_signal_noise_ratio in scikit-image 0.26.0."""
    found = perturbation(*map(split, pattern()))
    assert found["ssim"] == pytest.approx(0.9533030325, abs=1e-6)
    assert found["psnr"] == pytest.approx(28.0015237482, abs=1e-6)


def test_each_image_has_the_similarity_of_its_channels():
    x = torch.rand(5, 3, 16, 13, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    y = (x + torch.linspace(0, 0.8, 5)[:, None, None, None] * noise).clamp(0, 1)
    channels = [reference(a.numpy(), b.numpy()) for a, b in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)]
    expected = np.reshape(channels, (5, 3)).mean(axis=1).tolist()
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(ssim(x, y), ssim(y, x))
    assert ssim(x, x).tolist() == pytest.approx([1] * 5)


@pytest.mark.parametrize("size", [1, 4, 8, 10, 11, 40])
def test_flat_images_differ_by_luminance_alone(size):
    a, b = 0.25, 0.75
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    flat = torch.ones(2, 1, size, size + 3, dtype=torch.float64)
    assert ssim(a * flat, b * flat).tolist() == pytest.approx([expected] * 2)


def test_inverted_structure_is_negative():
    x, _ = pattern()
    assert ssim(x / 255, 1 - x / 255).item() < -0.5


@pytest.mark.parametrize("levels", [True, False])
def test_norms_by_hand(levels):
    x = torch.zeros(4, 3, 20, 20, dtype=torch.uint8)
    y = x.clone()
    y[0, :, 3, 4] = torch.tensor([51, 0, 204])  # one pixel, two channels
    y[1, 0, 0, :2] = 255
    if not levels:
        x, y = x / 255, y / 255
    found = perturbation(split(x), split(y))
    squares = 0.2**2 + 0.8**2 + 2
    assert found["changed_pixels_mean"] == pytest.approx(3 / 4)
    assert found["changed_pixels_max"] == 2
    assert found["linf_max"] == pytest.approx(1)
    assert found["l2_mean"] == pytest.approx((math.sqrt(0.68) + math.sqrt(2)) / 4)
    assert found["rmse"] == pytest.approx(math.sqrt(squares / x.numel()))
    assert found["psnr"] == pytest.approx(10 * math.log10(x.numel() / squares))


def test_large_sets_are_compared_in_parts():
    x = torch.randint(0, 256, (3, 3, 700, 900), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[2, 1, 5, 5] ^= 255
    found = perturbation(split(x), split(y))  # two images fit into a part
    assert found["changed_pixels_mean"] == pytest.approx(1 / 3)
    assert found["rmse"] == pytest.approx(float((y.double() - x.double()).square().mean().sqrt()) / 255)


def test_what_did_not_change_has_no_ratio():
    x, _ = pattern()
    found = perturbation(split(x), split(x))
    assert "psnr" not in found
    assert found["ssim"] == pytest.approx(1)
    assert found["rmse"] == found["linf_max"] == found["l2_mean"] == found["changed_pixels_max"] == 0
