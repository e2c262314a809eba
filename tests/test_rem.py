"""REM: noise keeps the loss small after augmentation and attack, where it would rise without."""

import pytest
import torch
from torch.nn import functional as F

from bench.data.digits import Digits
from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.norms import lp_norm, project
from bench.protection import protected_rows
from bench.protocols import Job
from bench.rng import SampleRng
from bench.threat import Threat
from bench.training import Recipe, augment
from defenses.rem import RobustErrorMinimising
from tests.problems import curved, images, linear_problem

PLAIN = Recipe(epochs=1, batch_size=8, optimizer="adam", lr=1e-3, schedule="cosine")
MOVING = Recipe(epochs=1, batch_size=8, optimizer="adam", lr=1e-3, schedule="cosine", flip=True, shift=1)
QUICK = {"network": "cnn(width=8)", "epochs": 1, "steps": 2, "draws": 1, "adv_steps": 1, "rel_step": 0.5}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    data = Digits()(None)
    return data.released(data.train.subset(slice(0, 200)))


def streams(n: int, seed: int = 0) -> SampleRng:
    return SampleRng.create(seed, torch.arange(n), "test")


def test_on_a_linear_network_the_noise_is_the_whole_ball_towards_the_true_class():
    model, x, y, _ = linear_problem()
    noisy = RobustErrorMinimising(draws=2).minimise(model, x, y, streams(len(x)), PLAIN)
    towards = (model.weight[y] - model.weight[1 - y]).sign().view_as(x)
    torch.testing.assert_close(noisy - x, 8 / 255 * towards)  # ten steps of a fifth cross the ball from any start


def test_it_is_that_of_a_plain_loop_over_samples():
    """Equation 4 of the paper: each step draws transformations, attacks each image, and adds up the gradients."""
    model, x, y = curved(), images(5, (1, 5, 5)), torch.arange(5) % 4
    defense = RobustErrorMinimising(eps=20 / 255, steps=3, draws=2, adv_steps=2)
    found = defense.minimise(model, x, y, streams(5), MOVING)
    threat = Threat("linf", 20 / 255, "gradients")
    for row in range(5):
        one, label, rng = x[row : row + 1], y[row : row + 1], streams(5)[torch.tensor([row])]
        noisy = project(one + (2 * rng.fork("start").uniform(1, 5, 5) - 1) * threat.eps, one, threat)
        for step in range(3):
            total = torch.zeros_like(one)
            for draw in range(2):
                stream = rng.fork(step).fork(draw)
                there = augment(noisy, True, 1, stream)
                added = defense.attack(model, there, label, stream) - there
                assert added.abs().max() <= 4 / 255 + 1e-9
                leaf = noisy.clone().requires_grad_(True)
                F.cross_entropy(model(augment(leaf, True, 1, stream) + added), label).backward()
                total += leaf.grad
            noisy = project(noisy - 0.2 * threat.eps * total.sign(), one, threat)
        torch.testing.assert_close(found[row : row + 1], noisy, rtol=0, atol=1e-12)


def test_the_loss_stays_below_that_of_clean_images_under_attack():
    model, x, y = curved(), images(40, (1, 5, 5)), torch.arange(40) % 4
    defense = RobustErrorMinimising()
    noisy = defense.minimise(model, x, y, streams(40), MOVING)

    def attacked_loss(start: torch.Tensor) -> torch.Tensor:
        """The mean over fresh augmentations and attacks."""
        total = torch.zeros(40).double()
        for draw in range(20):
            rng = streams(40, seed=5).fork(draw)
            there = defense.attack(model, augment(start, True, 1, rng), y, rng)
            total += F.cross_entropy(model(there), y, reduction="none").detach()
        return total / 20

    assert (attacked_loss(noisy) < attacked_loss(x)).double().mean() > 0.9


def test_no_adversary_at_radius_zero():
    model, x, y = curved(), images(3, (1, 5, 5)), torch.arange(3)
    assert torch.equal(RobustErrorMinimising(adv_eps=0).attack(model, x, y, streams(3)), x)


def test_the_release_stays_in_the_ball_and_in_its_share(digits):
    released = RobustErrorMinimising(share=0.5, **QUICK)(digits, Job(seed=1))
    assert torch.equal(released.labels, digits.train.labels)
    size = lp_norm(released.images.double() - digits.train.images.double(), "linf")
    assert size.max() == 8
    assert size.nonzero().squeeze(1).tolist() == protected_rows(digits.train, 0.5, Job(seed=1)).tolist()


def test_impossible_parameters_are_refused():
    for settings, message in (
        ({"eps": 0}, "one grey level"),
        ({"adv_eps": -1}, "adv_eps is -1"),
        ({"draws": 0}, "draws is 0"),
        ({"adv_steps": 0}, "adv_steps is 0"),
        ({"adv_rel_step": 0}, "adv_rel_step is 0"),
        ({"network": "resnet18(weights=x.pt)"}, "comes with its weights"),
    ):
        with pytest.raises(ConfigError, match=message):
            RobustErrorMinimising(**settings)
