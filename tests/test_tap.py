"""TAP: targeted descent from noise against one trained network, equal to a slow reference."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.learners.standard import Standard
from bench.data.digits import Digits
from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.models import resolve
from bench.protocols import Job
from bench.registry import defenses
from bench.rng import SampleRng
from bench.training import augment
from defenses.checkpoints import recognised, stepwise, train_checkpoints
from defenses.tap import RELEASED, TargetedPoisons


@pytest.fixture(scope="module")
def digits() -> Dataset:
    whole = Digits()(None)
    return replace(whole, train=whole.train.subset(slice(400)))


@pytest.mark.parametrize("shift", [0, 1])
def test_images_are_those_of_a_loop_over_single_images(shift, digits):
    few = replace(digits, train=digits.train.subset(slice(40)), flip=shift > 0, shift=shift)
    defense, job = TargetedPoisons(steps=6, rel_step=0.3, epochs=2, network="cnn(width=4)", shift=3), Job(seed=5)
    released = defense(few, job)

    recipe = stepwise(few, 2, RELEASED)
    (network,) = train_checkpoints(few, "cnn(width=4)", recipe, job, lambda epoch, _: epoch == 1)
    eps, differing = 8 / 255, 0
    for row in range(12):
        rng = SampleRng.create(5, torch.tensor([row]), "protection")
        clean = few.train.images[row : row + 1] / 255
        target = (few.train.labels[row : row + 1] + 3) % 10
        low, high = (clean - eps).clamp(min=0), (clean + eps).clamp(max=1)
        x = (clean + eps * rng.fork("start").normal(1, 8, 8)).clamp(low, high)
        for step in range(6):
            x.requires_grad_(True)
            view = augment(x, few.flip, few.shift, rng.fork(step))
            (slope,) = torch.autograd.grad(nn.functional.cross_entropy(network(view), target), x)
            x = (x.detach() - 0.3 * eps * slope.sign()).clamp(low, high)
        differing += int(((255 * x[0]).round() != released.images[row]).sum())
    assert differing <= 12 * 64 / 1000  # float32 may round a level, or a gradient near zero, the other way


def test_the_poison_reaches_its_target_inside_the_ball(digits):
    defense = TargetedPoisons(eps=64 / 255, steps=40, epochs=10, network="cnn(width=8)", shift=4)
    released = defense(digits, Job())
    change = released.images.int() - digits.train.images.int()
    assert change.abs().max() == 64
    assert torch.equal(released.labels, digits.train.labels)
    recipe = stepwise(digits, 10, RELEASED)
    (network,) = train_checkpoints(digits, "cnn(width=8)", recipe, Job(), lambda epoch, _: epoch == 9)
    target = (digits.train.labels + 4) % 10
    assert recognised([network], released.images.float(), target).float().mean() > 0.8
    assert recognised([network], digits.train.images.float(), digits.train.labels).float().mean() > 0.8

    def accuracy(data: Dataset) -> float:
        learned = Standard(epochs=10)(lambda: resolve("cnn(width=8)")(10, (1, 8, 8), None), data, Job())
        return recognised([learned], digits.test.images.float(), digits.test.labels).float().mean().item()

    assert accuracy(digits) > 0.9
    assert accuracy(digits.released(released)) < 0.8


def test_only_the_share_is_poisoned_and_another_seed_starts_elsewhere(digits):
    first, second = (
        TargetedPoisons(steps=1, epochs=1, network="cnn(width=4)", share=0.1)(digits, Job(seed=seed)) for seed in (0, 1)
    )
    changed = [(part.images != digits.train.images).flatten(1).any(dim=1) for part in (first, second)]
    assert [int(rows.sum()) for rows in changed] == [40, 40]
    assert not torch.equal(*changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("eps=0.01", "grey levels"), ("steps=0", "steps is 0"), ("rel_step=0", "rel_step is 0"), ("share=2", "share is 2"),
     ("epochs=0", "epochs is 0")],
)  # fmt: skip
def test_what_cannot_be_meant_is_an_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        defenses.create(f"tap({arguments})")
