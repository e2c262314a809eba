"""AVATAR: diffusion down and up again, against what is known in closed form."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks.learners import avatar
from attacks.learners.avatar import Avatar, Denoiser, left, noised
from bench.data.digits import Digits
from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.protocols import Job
from bench.scratch import Scratch
from bench.training import TrainingState


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return Digits()(None)


class Known(nn.Module):
    """The best denoiser of pixels that are normal about ``mean``, with a variance."""

    def __init__(self, mean: Tensor, variance: float) -> None:
        super().__init__()
        self.mean, self.variance = mean, variance

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        kept = left(x.device)[time][:, None, None, None]
        centred = x - kept.sqrt() * self.mean
        return (1 - kept).sqrt() * centred / (kept * self.variance + 1 - kept)


def test_the_signal_that_is_left_is_that_of_every_time_by_itself():
    kept, signal = left(torch.device("cpu")), 1.0
    for time in range(1000):
        signal *= 1 - (1e-4 + (0.02 - 1e-4) * time / 999)
        assert float(kept[time]) == pytest.approx(signal, rel=1e-4)
    x = torch.randn(3, 1, 50, 50)
    variance = noised(x, kept[[0, 500, 999]], torch.randn_like(x)).var().item()
    assert variance == pytest.approx(1, abs=6 * (2 / 7500) ** 0.5)


def test_a_model_that_knows_one_image_draws_that_whatever_it_is_given():
    only = torch.linspace(-0.8, 0.8, 64).view(1, 8, 8)
    given = Split(torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
    drawn = Avatar(depth=300).redrawn(Known(only, 0.0), given, Job())
    assert torch.equal(drawn.images, (127.5 * (only + 1)).round().byte().expand(5, 1, 8, 8))


def test_what_is_drawn_has_the_variance_that_the_model_knows():
    """From the end of the diffusion nothing of the given images is left; then pixels are as the model knows them."""
    variance, mean = 0.04, torch.full((1, 8, 8), 0.1)
    given = Split(torch.full((200, 1, 8, 8), 255, dtype=torch.uint8), torch.zeros(200, dtype=torch.int64))
    drawn = Avatar(depth=1000).redrawn(Known(mean, variance), given, Job()).pixels() * 2 - 1
    n = drawn.numel()
    assert drawn.mean().item() == pytest.approx(0.1, abs=5 * math.sqrt(variance / n))
    assert drawn.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n) + 0.02)  # 2 % for finite steps


def test_an_image_is_drawn_alike_whatever_others_are_drawn_with_it(digits, monkeypatch):
    torch.manual_seed(0)
    net, some = Denoiser((1, 8, 8), 16), digits.train.subset(slice(10))
    whole = Avatar(depth=20).redrawn(net, some, Job())
    monkeypatch.setattr(avatar, "CHUNK", 3)
    again = Avatar(depth=20).redrawn(net, some, Job())
    assert (whole.images.int() - again.images.int()).abs().max() <= 1  # a level, by rounding
    other = Avatar(depth=20).redrawn(net, some, Job(seed=1))
    assert not torch.equal(whole.images, other.images)


def test_the_model_learns(digits):
    net = Avatar(steps=400, width=64).diffusion(digits.calibration, Job())
    x = digits.test.pixels(slice(200)) * 2 - 1
    noise, time = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(0, 1000, 5)
    with torch.no_grad():
        error = (net(noised(x, left(x.device)[time], noise), time) - noise).square().mean()
    assert error < 0.35  # 1 is that of one that says nothing


def test_a_training_that_was_cut_off_goes_on_to_the_same(digits, tmp_path, monkeypatch):
    learner, save, saved = Avatar(steps=200, width=8), TrainingState.save, []
    whole = learner.diffusion(digits.calibration, Job()).state_dict()
    monkeypatch.setattr("bench.scratch.PAUSE", 0.0)

    def once(state, *name, **more):
        save(state, *name, **more)
        saved.append(more["steps"])
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", once)
    with pytest.raises(KeyboardInterrupt):
        learner.diffusion(digits.calibration, Job(scratch=Scratch(tmp_path / "job")))
    resumed = learner.diffusion(digits.calibration, Job(scratch=Scratch(tmp_path / "job"))).state_dict()
    assert saved == [50, 100, 150, 200]
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_it_undoes_a_pattern_of_each_class_that_drowns_in_noise(digits):
    """A faint pattern: what is drawn is nearer to the clean images than noise alone would leave it, and has lost it."""
    generator = torch.Generator().manual_seed(0)
    pattern = (torch.randint(0, 2, (10, 1, 8, 8), generator=generator) * 2 - 1) * 24
    labels = digits.train.labels
    released = Split((digits.train.images.int() + pattern[labels]).clamp(0, 255).byte(), labels)
    learner = Avatar(steps=800, depth=150)
    net = learner.diffusion(digits.calibration, Job())
    drawn = learner.redrawn(net, released, Job()).images.float()

    def of_pattern(images: Tensor) -> float:
        """How much of the pattern is left in the changes."""
        change, signs = images.float() - digits.train.images.float(), pattern[labels].float()
        return float((change * signs).sum() / signs.square().sum())

    assert of_pattern(released.images) > 0.6
    assert of_pattern(drawn) < 0.5 * of_pattern(released.images)


def test_large_images_and_data_without_clean_ones_are_refused(digits):
    empty = replace(digits, calibration=digits.calibration.subset(slice(0)))
    with pytest.raises(ConfigError, match=r"avatar\(images=released\)"):
        Avatar()(lambda: nn.Identity(), empty, Job())
    with pytest.raises(ConfigError, match="these have 32"):
        Avatar().check(10, (3, 32, 32))
    with pytest.raises(ConfigError, match="1000 times"):
        Avatar(depth=1001)
