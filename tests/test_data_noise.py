"""Random noise on training images: whole levels, all of them alike, of each sample or of each class."""

from dataclasses import replace

import pytest
import torch

from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.protection import protected_rows
from bench.protocols import Job
from defenses.data_noise import DataNoise


@pytest.fixture(scope="module")
def grey() -> Dataset:
    """Mid-grey images, so that nothing is cut off."""
    train = Split(torch.full((1500, 3, 4, 4), 128, dtype=torch.uint8), torch.arange(1500) % 3)
    return Dataset("grey", ("a", "b", "c"), train, train.subset(slice(0)), train.subset(slice(0)))


def noise_of(defense: DataNoise, data: Dataset, seed: int = 0) -> torch.Tensor:
    return defense(data, Job(seed=seed)).images.int() - data.train.images.int()


def test_every_level_is_equally_likely(grey):
    counts = (noise_of(DataNoise(eps=2 / 255), grey) + 2).flatten().bincount(minlength=5)
    draws, p = counts.sum().item(), 1 / 5
    assert len(counts) == 5
    assert ((counts - draws * p).abs() < 4 * (draws * p * (1 - p)) ** 0.5).all()


def test_samples_differ_or_classes_do(grey):
    labels = grey.train.labels
    alone, shared = noise_of(DataNoise(), grey), noise_of(DataNoise(by="class"), grey)
    assert len(alone.flatten(1).unique(dim=0)) == len(labels)
    assert len(shared.flatten(1).unique(dim=0)) == 3
    assert all(len(shared[labels == label].flatten(1).unique(dim=0)) == 1 for label in range(3))


@pytest.mark.parametrize("by", ["sample", "class"])
def test_a_sample_does_not_see_the_others(grey, by):
    rows = protected_rows(grey.train, 0.3, Job(seed=4))
    part, whole = (noise_of(DataNoise(by=by, share=share), grey, seed=4) for share in (0.3, 1.0))
    assert torch.equal(part[rows], whole[rows])
    assert part.flatten(1).any(dim=1).sum() == len(rows)


def test_pixels_stay_in_the_box(grey):
    dark = replace(grey, train=Split(torch.zeros_like(grey.train.images), grey.train.labels))
    assert torch.equal(noise_of(DataNoise(), dark), noise_of(DataNoise(), grey).clamp(min=0))


def test_impossible_parameters_are_refused():
    with pytest.raises(ConfigError, match="one grey level"):
        DataNoise(eps=0.001)
    with pytest.raises(ConfigError, match="share is 0"):
        DataNoise(share=0)
