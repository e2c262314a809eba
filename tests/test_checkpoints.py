"""Checkpoints of one training run: which are taken, what they hold, and the gradients that they give."""

from itertools import combinations

import pytest
import torch
from torch import nn

from attacks.learners.standard import Standard
from bench.data.digits import Digits
from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.models import resolve
from bench.protocols import Job
from bench.training import PUBLISHED, Recipe
from defenses.checkpoints import (
    LevelBox,
    class_means,
    gradient,
    mean_cosine,
    protect,
    recognised,
    select,
    stepwise,
    train_checkpoints,
)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    whole = Digits()(None)
    return Dataset("small", whole.classes, whole.train.subset(slice(300)), whole.calibration, whole.test)


def colour(side: int = 16) -> Dataset:
    levels = torch.zeros(4, 3, side, side, dtype=torch.uint8)
    split = Split(levels, torch.arange(4))
    return Dataset("colour", ("a", "b", "c", "d"), split, split, split, flip=True, shift=4)


def published_selection(checkpoints: list[int], count: int) -> list[int]:
    """The rule as it is told: slide the start down until the slice has the right length."""
    interval, deviation = int(len(checkpoints) / count), 0
    chosen: list[int] = []
    while len(chosen) != count:
        chosen = checkpoints[interval - deviation :: interval]
        deviation += 1
    return chosen


@pytest.mark.parametrize(
    ("count", "epochs"),
    [
        (1, [119]),
        (5, [23, 47, 71, 95, 119]),
        (15, [*range(7, 120, 8)]),
        (30, [*range(3, 120, 4)]),
        (120, [*range(120)]),
    ],
)
def test_checkpoints_of_the_published_run(count, epochs):
    assert select(120, count) == epochs


def test_selection_follows_the_published_rule_for_any_length():
    for length in range(1, 30):
        for count in range(1, length + 1):
            assert select(length, count) == published_selection([*range(length)], count)


def test_more_checkpoints_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match="there are 4 checkpoints, but 5 are asked for"):
        select(4, 5)


def test_the_stepwise_rate_is_the_published_one():
    recipe = stepwise(colour(), None, PUBLISHED["sep"])
    assert recipe.epochs == 120
    epochs = {0: 0.01, 0.5: 0.5, 1: 1, 74.9: 1, 75: 0.1, 89.9: 0.1, 90: 0.01, 119.9: 0.01}
    for epoch, share in epochs.items():
        assert recipe.rate(epoch / 120) == pytest.approx(share)
    shorter = stepwise(colour(), 12, {"epochs": 40, "schedule": "steps"})
    assert (shorter.epochs, shorter.rate(0)) == (12, 1)  # no warm-up where none is asked for
    (group,) = recipe.build_optimizer(nn.Linear(2, 2).parameters()).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.1, 0.9, 5e-4, False)
    assert (recipe.batch_size, recipe.flip, recipe.shift) == (128, True, 4)


def test_small_images_are_trained_on_as_their_data_set_suggests(digits):
    assert stepwise(digits, None, PUBLISHED["sep"]) == Recipe.for_dataset(digits)


def test_checkpoints_are_frozen_copies_in_the_order_of_training(digits):
    seen, reported = [], []

    def keep(epoch: int, network: nn.Module) -> bool:
        seen.append(epoch)
        return epoch in (0, 3, 7)

    job = Job(progress=lambda done, total: reported.append((done, total)))
    networks = train_checkpoints(digits, "cnn(width=8)", Recipe.for_dataset(digits, epochs=8), job, keep)
    assert seen == list(range(8))
    assert reported == [(epoch, 8) for epoch in range(1, 9)]
    x, y = 255 * digits.test.pixels(), digits.test.labels
    right = [recognised([network], x, y).float().mean().item() for network in networks]
    assert len(right) == 3
    assert right[0] < right[1] < right[2]
    assert right[2] > 0.6
    for network in networks:
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_the_protecting_network_is_not_the_one_a_learner_of_the_same_seed_trains(digits):
    (ours,) = train_checkpoints(digits, "cnn(width=8)", Recipe.for_dataset(digits, epochs=1), Job(), lambda *_: True)
    theirs = Standard(epochs=1)(lambda: resolve("cnn(width=8)")(10, (1, 8, 8), None), digits, Job())
    x = digits.test.pixels()
    with torch.no_grad():
        assert (ours(x) - theirs(x)).abs().mean() > 0.1


def test_class_means_are_those_of_a_loop(digits):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 10)).eval()
    means = class_means(network, network[3], digits.train, 10)
    for label in range(10):
        features = [network[:3](image[None] / 255) for image in digits.train.images[digits.train.labels == label]]
        torch.testing.assert_close(means[label], torch.cat(features).mean(dim=0).detach())
    few = digits.train.subset(digits.train.labels != 4)
    with pytest.raises(ConfigError, match="class 4 has no training images"):
        class_means(network, network[3], few, 10)


def test_the_gradient_of_an_image_is_its_own():
    weight = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = torch.arange(24, dtype=torch.float64).view(2, 1, 3, 4)
    slope = gradient(lambda x, target: (x.flatten(1) * weight[target]).sum(dim=1), levels, torch.tensor([2, 0]))
    torch.testing.assert_close(slope.flatten(1), weight[[2, 0]])


def test_the_mean_cosine_is_that_of_all_pairs():
    slopes = list(torch.randn(4, 5, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    pairs = [torch.cosine_similarity(a.flatten(1), b.flatten(1)) for a, b in combinations(slopes, 2)]
    torch.testing.assert_close(mean_cosine(slopes), torch.stack(pairs).mean(dim=0))
    axes = torch.eye(9, dtype=torch.float64).view(9, 1, 1, 3, 3)
    torch.testing.assert_close(mean_cosine(list(axes)), torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(mean_cosine([slopes[0], 2 * slopes[0]]), torch.ones(5, dtype=torch.float64))


def test_the_box_is_the_ball_cut_to_the_grey_levels():
    box = LevelBox.around(torch.tensor([0.0, 100.0, 254.0]), 8 / 255)
    assert box.low.tolist() == [0, 92, 246]
    assert box.high.tolist() == [8, 108, 255]


def test_only_the_share_moves_and_each_image_meets_its_own_target(digits):
    targets = {}

    def craft(levels, target, rng):
        assert len(rng) == len(levels)
        targets.update({tuple(level.flatten().tolist()): int(y) for level, y in zip(levels, target, strict=True)})
        yield LevelBox.around(levels, 2 / 255).project(levels + 1.6)  # rounded to 2 levels where there is room

    released = protect(digits, 0.25, 3, 2 / 255, Job(), craft)
    change = released.images.int() - digits.train.images.int()
    moved = (change != 0).flatten(1).any(dim=1)
    assert moved.sum() == 75
    assert set(change[moved].unique().tolist()) <= {0, 2}
    assert torch.equal(released.labels, digits.train.labels)
    for image, label in zip(digits.train.images[moved], digits.train.labels[moved], strict=True):
        assert targets[tuple(image.flatten().tolist())] == (int(label) + 3) % 10
