"""UEraser: its plasma against a loop, and that it trains on the worst draw and leaves the network alone."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.learners.ueraser import UEraser, _doubled, plasma, plasma_brightness, plasma_contrast
from bench.errors import ConfigError
from bench.rng import SampleRng


def streams(count: int, seed: int = 0) -> SampleRng:
    return SampleRng.create(seed, torch.arange(count), "test")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, 4)]
    return nn.Sequential(*layers).train()


def doubled(field: Tensor, weight: float, noise: Tensor) -> Tensor:
    """One doubling of one channel (R, S), point by point."""
    rows, columns = noise.shape
    fine = torch.zeros(rows, columns)
    for r in range(0, rows, 2):
        for c in range(0, columns, 2):
            fine[r, c] = field[r // 2, c // 2]
    for r in range(1, rows, 2):
        for c in range(1, columns, 2):
            near = [fine[r - 1, c - 1], fine[r - 1, c + 1], fine[r + 1, c - 1], fine[r + 1, c + 1]]
            fine[r, c] = (1 - weight) * sum(near) / 4 + weight * noise[r, c]
    for r in range(rows):
        for c in range(1 - r % 2, columns, 2):
            near = [
                fine[r + down, c + right]
                for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1))
                if 0 <= r + down < rows and 0 <= c + right < columns
            ]
            fine[r, c] = (1 - weight) * sum(near) / len(near) + weight * noise[r, c]
    return fine


class TestPlasma:
    def test_a_doubling_is_that_of_a_loop(self):
        field, weight, rng = torch.rand(2, 3, 3, 4), torch.tensor([0.3, 0.8]), streams(2)
        out, noise = _doubled(field, weight[:, None, None, None], rng), rng.uniform(3, 5, 7)
        for row in range(2):
            for channel in range(3):
                expected = doubled(field[row, channel], float(weight[row]), noise[row, channel])
                torch.testing.assert_close(out[row, channel], expected)

    @pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 33, 17), (3, 5, 40), (1, 2, 2)])
    def test_it_covers_every_size_within_its_range(self, shape):
        x = torch.zeros(20, *shape)
        field = plasma(x, streams(20))
        assert field.shape == x.shape
        assert field.min() >= 0
        assert field.max() <= 1
        assert field.mean().item() == pytest.approx(0.5, abs=0.1)
        torch.testing.assert_close(plasma(x[5:7], streams(20)[torch.tensor([5, 6])]), field[5:7])

    def test_neighbours_are_alike_and_far_points_are_not(self):
        field = plasma(torch.zeros(50, 3, 33, 33), streams(50))
        near = (field[..., 1:] - field[..., :-1]).abs().mean()
        far = (field[..., 16:] - field[..., :-16]).abs().mean()
        assert near < 0.5 * far

    def test_brightness_and_contrast_by_their_formulas(self):
        x, rng = torch.rand(30, 3, 16, 16), streams(30)
        field, intensity = plasma(x, rng), 0.5 + 0.5 * rng.fork("intensity").uniform()
        bright, contrast = plasma_brightness(x, 1.0, rng), plasma_contrast(x, 1.0, rng)
        for row in range(30):
            expected = (x[row] + intensity[row] * (2 * field[row] - 1)).clamp(0, 1)
            torch.testing.assert_close(bright[row], expected)
            torch.testing.assert_close(contrast[row], ((x[row] - 0.5) * 4 * field[row] + 0.5).clamp(0, 1))
        assert torch.equal(plasma_brightness(x, 0.0, rng), x)

    def test_the_probability_is_that_of_each_sample(self):
        count, p = 1000, 0.3
        x = torch.full((count, 1, 4, 4), 0.5)
        changed = (plasma_brightness(x, p, streams(count)) != x).flatten(1).any(1).float().mean().item()
        assert changed == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count))


class TestUEraser:
    def test_the_worst_draw_of_each_image_is_taken(self):
        learner, model, rng = UEraser(), network().eval(), streams(10)
        x, y = torch.rand(10, 3, 16, 16), torch.arange(10) % 4
        chosen = learner.perturb(model, x, y, rng, draws=5)
        for row in range(10):
            one = slice(row, row + 1)
            tries = [learner.augment(x[one], rng[torch.tensor([row])].fork(draw)) for draw in range(5)]
            losses = [F.cross_entropy(model(image), y[one]).item() for image in tries]
            torch.testing.assert_close(chosen[one], tries[losses.index(max(losses))])
        assert len(set(losses)) == 5

    def test_the_network_is_left_as_it_was(self):
        model = network()
        before = copy.deepcopy(model.state_dict())
        UEraser().perturb(model, torch.rand(6, 3, 16, 16), torch.zeros(6, dtype=torch.int64), streams(6), draws=3)
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_augmentations_are_levels_in_the_box_and_belong_to_samples(self):
        x, rng, rows = torch.rand(40, 3, 12, 12), streams(40), torch.tensor([30, 4])
        out = UEraser().augment(x, rng)
        assert out.min() >= 0
        assert out.max() <= 1
        torch.testing.assert_close(out * 255, (out * 255).round(), rtol=0, atol=1e-3)
        torch.testing.assert_close(UEraser().augment(x[rows], rng[rows]), out[rows])
        assert not torch.equal(UEraser().augment(x, streams(40, seed=1)), out)

    def test_later_epochs_take_one_draw(self):
        model, x, y, rng = network().eval(), torch.rand(8, 3, 16, 16), torch.arange(8) % 4, streams(8)
        lite, mixed = UEraser(worst_epochs=0), UEraser(worst_epochs=2)
        single = lite.augment(x, rng.fork(0))
        worst = mixed.perturb(model, x, y, rng, draws=5)
        assert torch.equal(lite.perturb_at(0)(model, x, y, rng), single)
        assert torch.equal(mixed.perturb_at(1)(model, x, y, rng), worst)
        assert torch.equal(mixed.perturb_at(2)(model, x, y, rng), single)
        assert torch.equal(UEraser().perturb_at(1000)(model, x, y, rng), worst)

    @pytest.mark.parametrize("wrong", [{"draws": 0}, {"worst_epochs": -1}, {"plasma": 1.5}])
    def test_impossible_settings_are_refused(self, wrong):
        with pytest.raises(ConfigError):
            UEraser(**wrong)
