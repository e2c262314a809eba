"""Perturbations in whole grey levels: bounds hold exactly, and no more is given away than rounding costs."""

import pytest
import torch

from bench.errors import ConfigError
from defenses.levels import moved, rounded_in_l2, whole_levels


def test_whole_levels_survive_the_division_by_255():
    assert [whole_levels(level / 255) for level in range(1, 256)] == list(range(1, 256))
    for eps in (0.0, 0.9 / 255, 0.1, 8.5 / 255, 1.01, float("nan")):
        with pytest.raises(ConfigError, match="one grey level"):
            whole_levels(eps)


def test_moving_stops_at_black_and_white():
    images = torch.tensor([0, 3, 250, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    assert moved(images, torch.full((4, 1, 1, 1), 8.0)).flatten().tolist() == [8, 11, 255, 255]
    assert moved(images, torch.full((4, 1, 1, 1), -8)).flatten().tolist() == [0, 0, 242, 247]


def test_rounding_stays_in_the_l2_ball_and_near_its_border():
    delta = torch.randn(50, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    radius = 1000.0
    delta *= radius / delta.flatten(1).norm(dim=1)[:, None, None, None]
    whole = rounded_in_l2(delta, radius / 255)
    size = whole.flatten(1).norm(dim=1)
    assert torch.equal(whole, whole.round())
    assert (size <= radius).all()
    assert (size > 0.995 * radius).all()
    assert (whole - delta).abs().max() < 1.5  # half a level of rounding, and what the scale takes


def test_rounding_leaves_what_is_well_inside():
    delta = torch.tensor([3.4, -2.6, 0.2, 0.0], dtype=torch.float64).view(1, 1, 2, 2)
    assert rounded_in_l2(delta, 10 / 255).flatten().tolist() == [3, -3, 0, 0]
