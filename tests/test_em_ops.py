"""CIFAR-10-S: noise everywhere, and the pixel of the clean images' own search over it."""

import pytest
import torch

from bench.data.digits import Digits
from bench.dataset import Dataset
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


def test_impossible_parameters_are_refused():
    with pytest.raises(ConfigError, match="pixels is 0"):
        ErrorMinimisingOnePixel(pixels=0)
    with pytest.raises(ConfigError, match="one grey level"):
        ErrorMinimisingOnePixel(noise_eps=0)
    with pytest.raises(ConfigError, match="share is 2"):
        ErrorMinimisingOnePixel(share=2)
