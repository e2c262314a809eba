"""The transfer family: each method by a plain loop, and what its switch does."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from attacks.mi_fgsm import DIFGSM, MIFGSM, NIFGSM, SIFGSM, TIFGSM, VMIFGSM
from attacks.mi_fgsm import rmse as root_mean_square
from bench.errors import ConfigError
from bench.rng import SampleRng
from tests.problems import asks_for, attack_with, curved, images, referee

EPS, STEPS = 0.03, 4


def final(attack, n=3, shape=(1, 5, 5)):
    model, x = curved(shape), images(n, shape)
    y = model(x).argmax(1)
    oracle = referee(model, x, y, eps=EPS, budget=5, **asks_for(attack, model))
    return attack_with(attack, oracle, x, y), model, x, y, oracle


def gradient(model, u, label):
    u = u.clone().requires_grad_(True)
    return torch.autograd.grad(F.cross_entropy(model(u[None]), label[None]), u)[0]


def plain(attack, model, x, label, rng):
    """One image, as the papers write it."""
    u, g, v, alpha = x, torch.zeros_like(x), torch.zeros_like(x), EPS / attack.steps
    for t in range(attack.steps):
        at = u + alpha * attack.momentum * g if attack.nesterov else u
        raw = torch.zeros_like(x)
        for i in range(attack.scales):
            raw += gradient(lambda z, i=i: model(z / 2**i), at, label) / attack.scales
        slope = raw + v
        g = attack.momentum * g + slope / slope.abs().mean()
        if attack.neighbours:
            around = torch.zeros_like(x)
            for j in range(attack.neighbours):
                noise = rng.fork(t).fork("neighbour").fork(j).uniform(*x.shape)[0].double() * 2 - 1
                around += gradient(model, at + attack.reach * EPS * noise, label) / attack.neighbours
            v = around - raw
        u = torch.clamp(u + alpha * g.sign(), x - EPS, x + EPS).clamp(0, 1)
    return u


@pytest.mark.parametrize("kind", [MIFGSM, NIFGSM, SIFGSM, VMIFGSM])
def test_examples_are_those_of_a_plain_loop(kind):
    attack = kind(steps=STEPS, neighbours=3) if kind is VMIFGSM else kind(steps=STEPS)
    x_adv, model, x, y, oracle = final(attack)
    for i in range(3):
        rng = SampleRng.create(0, torch.tensor([i]), "attack")
        torch.testing.assert_close(x_adv[i], plain(attack, model, x[i], y[i], rng), rtol=0, atol=1e-9)
    assert oracle.ledger.forwards.tolist() == [1] * 3
    assert oracle.ledger.backwards.tolist() == [0] * 3


def test_smoothing_is_a_gaussian_that_keeps_sums():
    spot = torch.zeros(1, 2, 9, 9, dtype=torch.float64)
    spot[0, 0, 4, 4] = 1
    smooth = TIFGSM()._smooth(spot)
    side = torch.exp(torch.tensor(-4.5, dtype=torch.float64)) / (1 + 2 * torch.exp(torch.tensor(-4.5)))
    assert smooth[0, 0, 4, 3].item() == pytest.approx(side.item() / (1 + 2 * torch.exp(torch.tensor(-4.5)).item()))
    assert smooth[0, 0].sum().item() == pytest.approx(1)
    assert smooth[0, 1].abs().sum() == 0
    assert torch.equal(MIFGSM()._smooth(spot), spot)


def test_diverse_images_are_smaller_and_elsewhere_for_each_sample_by_itself():
    x = torch.ones(200, 1, 20, 20, dtype=torch.float64)
    shown = DIFGSM(padded=1.25)._diverse(x, SampleRng.create(0, torch.arange(200), "test"))
    left = (shown == 0).flatten(1).any(dim=1)
    assert 0.3 < left.double().mean() < 0.6  # half of them, of which a few are of full size
    corners = (shown[left][:, 0, [0, 0, -1, -1], [0, -1, 0, -1]] == 0).double().mean(dim=0)
    assert (corners > 0.3).all()
    assert (shown[left].flatten(1).mean(dim=1) >= 0.6).all()
    assert torch.equal(shown[~left], x[~left])


def test_impossible_parameters_are_refused():
    for arguments in ({"kernel": 4}, {"diversity": 1.5}, {"padded": 0.5}):
        with pytest.raises(ConfigError):
            MIFGSM(**arguments)


FAIR = [
    MIFGSM(steps=STEPS), NIFGSM(steps=STEPS), DIFGSM(steps=STEPS, padded=1.25), TIFGSM(steps=STEPS, kernel=3),
    SIFGSM(steps=STEPS), VMIFGSM(steps=STEPS, neighbours=3),
]  # fmt: skip


@pytest.mark.parametrize("attack", FAIR)
def test_at_the_rmse_of_i_fgsm_changes_are_as_large_and_point_the_same_way(attack):
    x_adv, _, x, _, _ = final(attack)
    fair = final(replace(attack, rmse="i-fgsm"))[0]
    plain = final(MIFGSM(steps=STEPS, momentum=0.0))[0]
    wanted, size = root_mean_square(plain - x), root_mean_square(fair - x)
    assert ((fair - x).abs() <= EPS + 1e-9).all()
    least = (fair - x).abs().flatten(1).amin(dim=1) >= EPS - 1e-9  # at every end of the ball, which leaves no more
    assert (((size / wanted - 1).abs() < 0.01) | least).all()
    assert ((fair - x) * (x_adv - x) >= 0).all()


@pytest.mark.parametrize("attack", FAIR)
def test_the_first_step_has_the_rmse_that_is_asked_for(attack):
    x_adv, _, x, _, _ = final(replace(attack, steps=1, rmse="first-step", first=0.5))
    size = root_mean_square(x_adv - x) / EPS
    assert ((size - 0.5).abs() < 0.005).all()


def test_what_is_free_is_what_it_was():
    assert torch.equal(final(MIFGSM(steps=STEPS))[0], final(MIFGSM(steps=STEPS, rmse="free", first=0.3))[0])
