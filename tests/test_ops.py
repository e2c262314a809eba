"""OPS: the one-pass search equals brute force, writes just its pixels, and spoils training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from attacks.learners.standard import Standard
from bench.data.digits import Digits
from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.norms import lp_norm
from bench.protection import protected_rows
from bench.protocols import Job
from defenses.ops import OnePixelShortcut, colours, find_shortcuts, stability


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return Digits()(None)


def brute_force(images: torch.Tensor) -> np.ndarray:
    """Mean over standard deviation of |colour - x|, as published: a loop over positions and colours."""
    x = images.numpy() / 255  # (n, C, H, W)
    channels, height, width = x.shape[1:]
    scores = np.zeros((height * width, 2**channels))
    for position in range(height * width):
        row, column = divmod(position, width)
        for code in range(2**channels):
            colour = [float(digit) for digit in f"{code:0{channels}b}"]
            change = np.abs(np.array(colour) - x[:, :, row, column])
            deviation = change.std()
            scores[position, code] = 0 if change.max() == 0 else change.mean() / deviation if deviation else np.inf
    return scores


def random_levels(count: int, channels: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 37, 1500])
def test_one_pass_scores_equal_brute_force_on_random_levels(count, channels):
    images = random_levels(count, channels)
    expected = brute_force(images)
    np.testing.assert_allclose(stability(images).numpy(), expected, rtol=1e-9)
    assert int(stability(images).argmax()) == expected.argmax()


def test_one_pass_search_equals_greedy_brute_force_on_digits(digits):
    images, labels = digits.train.images[:, :, 2:6, 2:6], digits.train.labels  # the middle, where every pixel varies
    found = find_shortcuts(images, labels, 10)
    used: list[tuple[int, int]] = []
    for label in range(10):
        scores = brute_force(images[labels == label])
        for pair in used:
            scores[pair] = 0
        used.append(divmod(int(scores.argmax()), 2))
    assert list(zip(found.position.flatten().tolist(), found.colour.flatten().tolist(), strict=True)) == used


def test_still_pixels_score_infinity_and_unmoved_ones_zero():
    images = random_levels(6, 3)
    images[:, :, 0, 0] = 0
    images[:, :, 0, 1] = 100
    scores = stability(images)
    assert scores[0, 0] == 0                   # black is black already
    assert scores[0, 7] == torch.inf           # white: every channel moves by 255
    assert scores[0, 1:7].isfinite().all()     # some channels move, some do not
    assert scores[1, 0] == torch.inf
    assert torch.equal(stability(torch.zeros(0, 3, 2, 2, dtype=torch.uint8)), torch.zeros(4, 8, dtype=torch.float64))


def test_ties_go_to_the_first_position_then_the_first_colour():
    images, labels = torch.full((4, 1, 2, 2), 100, dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    found = find_shortcuts(images, labels, 3)
    pairs = list(zip(found.position.flatten().tolist(), found.colour.flatten().tolist(), strict=True))
    assert pairs == [(0, 0), (0, 1), (1, 0)]


def test_colour_codes_are_red_green_blue():
    assert colours(3)[[0, 1, 2, 4, 7]].int().tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("pixels", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_released_images_differ_in_just_the_pixels_of_their_class(pixels, channels):
    images = random_levels(200, channels).clamp(1, 254)  # no pixel has an extreme colour already
    labels = torch.arange(200) % 4
    found = find_shortcuts(images, labels, 4, pixels)
    written = found.write(images, labels)

    changed = (written != images).any(dim=1).flatten(1)  # (N, H W)
    assert (changed.sum(dim=1) == pixels).all()
    for label in range(4):
        places = found.position[label]
        assert len(set(places.tolist())) == pixels
        assert changed[labels == label][:, places].all()
        shown = written.flatten(2)[labels == label][:, :, places]  # (n, C, P)
        assert torch.equal(shown, (255 * colours(channels)[found.colour[label]].T).to(shown).expand_as(shown))
    pairs = set(zip(found.position.flatten().tolist(), found.colour.flatten().tolist(), strict=True))
    assert len(pairs) == 4 * pixels
    assert (found.score.diff(dim=1) <= 0).all()


def test_the_defense_keeps_its_threat_and_the_labels(digits):
    defense = OnePixelShortcut(pixels=2)
    released = defense(digits, Job())
    assert released.images.dtype == torch.uint8
    assert torch.equal(released.labels, digits.train.labels)
    assert defense.norm == "l0"
    assert (lp_norm(released.pixels() - digits.train.pixels(), "l0") <= defense.eps).all()


def test_a_share_of_the_images_has_the_pixels_of_its_own_search(digits):
    released = OnePixelShortcut(pixels=2, share=0.3)(digits, Job())
    changed = (released.images != digits.train.images).flatten(1).any(dim=1)
    rows = protected_rows(digits.train, 0.3, Job())
    alone = digits.released(digits.train.subset(rows))
    assert torch.equal(released.images[rows], OnePixelShortcut(pixels=2)(alone, Job()).images)
    assert changed.sum() <= len(rows) == 300
    assert changed[rows].sum() == changed.sum()


def test_float_images_are_taken_as_their_nearest_levels(digits):
    floats = replace(digits, train=Split(digits.train.pixels(), digits.train.labels))
    assert torch.equal(OnePixelShortcut()(floats, Job()).images, OnePixelShortcut()(digits, Job()).images)


def test_more_pixels_than_there_are_is_an_error(digits):
    with pytest.raises(ConfigError, match="no free pixel for a shortcut of 65 in 8x8 images"):
        OnePixelShortcut(pixels=65)(digits, Job())
    with pytest.raises(ConfigError, match="pixels is 0"):
        OnePixelShortcut(pixels=0)


def test_training_on_released_digits_fails_on_clean_ones_and_follows_the_pixels(digits):
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 10),
        )

    def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
        with torch.no_grad():
            return (model(images / 255).argmax(1) == labels).float().mean().item()

    pixels = 8  # one alone costs a learner of digits two points: so few and so plain images are learned beside it
    defense, learner = OnePixelShortcut(pixels=pixels), Standard(epochs=10)
    test, labels = digits.test.images, digits.test.labels
    wrong = (labels + 1) % 10
    shortcuts = find_shortcuts(digits.train.images, digits.train.labels, 10, pixels)

    clean = learner(build, digits, Job())
    spoiled = learner(build, digits.released(defense(digits, Job())), Job())

    assert accuracy(clean, test, labels) > 0.93
    assert accuracy(spoiled, test, labels) < 0.5
    assert accuracy(spoiled, shortcuts.write(test, wrong), wrong) > 0.8
