"""CIFAR-10-S: noise everywhere, and the pixel of the clean images' own search over it."""

import pytest
import torch
from torch import nn

from attacks.learners.standard import Standard
from bench.data.digits import Digits
from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.protection import protected_rows
from bench.protocols import Job
from defenses.em import ErrorMinimising
from defenses.em_ops import ErrorMinimisingOnePixel
from defenses.ops import colours, find_shortcuts

SETTINGS = {"by": "class", "network": "cnn(width=8)", "rounds": 1}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    data = Digits()(None)
    return data.released(data.train.subset(slice(0, 300)))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_pixel_is_exact_and_everything_else_is_the_noise(digits, share):
    released = ErrorMinimisingOnePixel(share=share, **SETTINGS)(digits, Job()).images
    noisy = ErrorMinimising(share=share, **SETTINGS)(digits, Job()).images
    rows = protected_rows(digits.train, share, Job())
    clean, labels = digits.train.images[rows], digits.train.labels[rows]
    found = find_shortcuts(clean, labels, 10)

    place = torch.zeros(len(digits.train), 64, dtype=torch.bool)
    place[rows] = place[rows].scatter(1, found.position[labels], True)
    assert torch.equal(released.flatten(1)[~place], noisy.flatten(1)[~place])
    shown = 255 * colours(1)[found.colour[labels]].flatten().byte()
    assert torch.equal(released.flatten(1)[place], shown)
    change = (released.int() - digits.train.images.int()).flatten(1)
    assert change[~place].abs().max() <= 8
    assert change[place].abs().max() > 8


@pytest.fixture(scope="module")
def released(digits) -> Split:
    """One pixel and noise of each sample, as in CIFAR-10-S."""
    return ErrorMinimisingOnePixel(**SETTINGS | {"by": "sample"})(digits, Job())


def test_each_class_has_one_pixel_of_an_extreme_colour_and_no_two_the_same(digits, released):
    """Found in the released images alone: where all of a class show one extreme level."""
    found = set()
    clean = find_shortcuts(digits.train.images, digits.train.labels, 10)
    for label in range(10):
        of_class = released.images[digits.train.labels == label].flatten(1)
        place = int(clean.position[label])
        (level,) = of_class[:, place].unique().tolist()
        assert level in (0, 255)
        found.add((place, level))
    assert len(found) == 10
    assert torch.equal(released.labels, digits.train.labels)
    change = (released.images.int() - digits.train.images.int()).abs().flatten(1)
    assert (change > 8).sum(dim=1).max() == 1  # the pixel alone


def test_a_line_through_the_shortcuts_tells_the_classes(digits, released):
    """Least squares on whether each of the ten pixels has its colour: the same probe knows less of clean images."""
    shortcuts = find_shortcuts(digits.train.images, digits.train.labels, 10)
    levels = 255 * shortcuts.colour[:, 0]
    labels = digits.train.labels

    def accuracy(images: torch.Tensor) -> float:
        shown = (images.flatten(1)[:, shortcuts.position[:, 0]] == levels).double()
        probe = torch.cat([shown, torch.ones(len(shown), 1).double()], dim=1)
        weights = torch.linalg.lstsq(probe, torch.eye(10).double()[labels], driver="gelsd").solution
        return float(((probe @ weights).argmax(1) == labels).double().mean())

    assert accuracy(released.images) > 0.95
    assert accuracy(digits.train.images) < 0.8


def test_a_network_learns_the_pixels_and_not_the_digits():
    """Near chance on clean test images, and the class of whatever pixels are written over them."""
    data = Digits()(None)
    pixels = 8  # as in test_ops.py: one is not enough on digits
    protected = data.released(ErrorMinimisingOnePixel(pixels=pixels, **SETTINGS)(data, Job()))
    model = Standard(epochs=10)(
        lambda: nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 10),
        ), protected, Job(),
    )  # fmt: skip
    test, wrong = data.test.images, (data.test.labels + 1) % 10
    written = find_shortcuts(data.train.images, data.train.labels, 10, pixels).write(test, wrong)
    with torch.no_grad():
        assert (model(test / 255).argmax(1) == data.test.labels).float().mean() < 0.4
        assert (model(written / 255).argmax(1) == wrong).float().mean() > 0.8


def test_the_preset_is_the_published_set_and_nothing_else(digits):
    preset = ErrorMinimisingOnePixel(preset="cifar10-s")
    assert preset._noise() == ErrorMinimising(network="resnet18(normalise=false)")
    assert (preset.pixels, preset.share, preset.noise_eps, preset.by) == (1, 1.0, 8 / 255, "sample")
    with pytest.raises(ConfigError, match=r"not of 300 of digits; take cifar10\(calibrate=false\)"):
        preset(digits, Job())
    with pytest.raises(ConfigError, match="leave pixels, share out"):
        ErrorMinimisingOnePixel(preset="cifar10-s", pixels=2, share=0.5)


def test_impossible_parameters_are_refused():
    with pytest.raises(ConfigError, match="pixels is 0"):
        ErrorMinimisingOnePixel(pixels=0)
    with pytest.raises(ConfigError, match="one grey level"):
        ErrorMinimisingOnePixel(noise_eps=0)
    with pytest.raises(ConfigError, match="share is 2"):
        ErrorMinimisingOnePixel(share=2)
