"""Noise: a plain reference, the law of its draws, and the share of them that a linear model lets through."""

import math

import pytest
import torch
from torch import nn

from attacks.noise import Noise
from bench.norms import lp_norm
from bench.oracle import NEVER
from bench.rng import SampleRng
from tests.problems import Linear, attack_with, images, referee


class Recorder(nn.Module):
    """Another model, and what it was asked."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked = model, []

    def forward(self, x):
        self.asked.append(x.clone())
        return self.model(x)


class Sure(nn.Module):
    def forward(self, x):
        return torch.tensor([[1.0, 0.0]], dtype=x.dtype).expand(len(x), -1)


def draws(attack, norm, eps, n=20, budget=50):
    """All queries (budget, n, C, H, W) as perturbations, of a model that nothing beats."""
    model, x = Recorder(Sure()), images(n)
    oracle = referee(model, x, torch.zeros(n, dtype=torch.int64), norm=norm, eps=eps, access="labels", budget=budget)
    x_adv = attack_with(attack, oracle, x, torch.zeros(n, dtype=torch.int64))
    assert torch.equal(x_adv, model.asked[-1])
    return torch.stack(model.asked) - x


@pytest.mark.parametrize(("kind", "norm"), [("uniform", "linf"), ("corner", "linf"), ("uniform", "l2")])
def test_a_plain_loop_over_samples_and_queries_finds_the_same(kind, norm):
    model, x, eps, budget = Linear(), images(30), {"linf": 0.05, "l2": 0.6}[norm], 25
    y = model(x).argmax(1)
    oracle = referee(model, x, y, norm=norm, eps=eps, access="labels", budget=budget)
    x_adv = attack_with(Noise(kind=kind), oracle, x, y)
    for i in range(30):
        rng, first = SampleRng.create(0, torch.tensor([i]), "attack"), NEVER
        for query in range(budget):
            stream = rng.fork(query)
            if norm == "l2":
                delta = stream.normal(3, 8, 8).double()
                delta /= delta.norm()
            else:
                delta = 2 * (stream.uniform(3, 8, 8) if kind == "uniform" else stream.coins(3, 8, 8)).double() - 1
            u = (x[i] + eps * delta[0]).clamp(0, 1)
            if model(u[None]).argmax() != y[i]:
                first = query + 1
                break
        assert oracle.ledger.first_hit[i].item() == first
        torch.testing.assert_close(x_adv[i], u, rtol=0, atol=1e-12)
    assert 0 < (oracle.ledger.first_hit != NEVER).sum() < 30


def test_draws_follow_their_law_and_are_independent():
    n = 50 * 20 * 192
    uniform, corner = draws(Noise(), "linf", 0.1) / 0.1, draws(Noise(kind="corner"), "linf", 0.1) / 0.1
    assert torch.allclose(corner.abs(), torch.ones_like(corner))
    for values, variance, kurtosis in ((uniform, 1 / 3, 1 / 5), (corner, 1.0, 1.0)):
        assert abs(values.mean()) < 4 * math.sqrt(variance / n)
        assert abs(values.square().mean() - variance) <= 4 * math.sqrt((kurtosis - variance**2) / n) + 1e-9
        repeated = (values[1:] * values[:-1]).mean(), (values[:, 1:] * values[:, :-1]).mean()  # by query, by sample
        assert all(abs(product) < 4 * variance / math.sqrt(0.9 * n) for product in repeated)


def test_l2_draws_lie_on_the_sphere_in_all_directions():
    delta = draws(Noise(), "l2", 0.5).flatten(0, 1)
    torch.testing.assert_close(lp_norm(delta, "l2"), torch.full((1000,), 0.5).double())
    unit = delta.flatten(1) / 0.5
    assert abs(unit.mean()) < 4 / math.sqrt(unit.numel() * 192)
    cosines = (unit[1:] * unit[:-1]).sum(dim=1)
    assert abs(cosines.square().mean() * 192 - 1) < 4 * math.sqrt(2 / 999)


@pytest.mark.parametrize("kind", ["uniform", "corner"])
def test_one_draw_beats_a_linear_model_as_often_as_the_normal_law_says(kind):
    """The margin moves by a sum of 192 independent terms of known variance."""
    n, eps, model = 4000, 0.1, Linear()
    x, y = torch.full((n, 3, 8, 8), 0.5, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
    weight = model.weight[0] - model.weight[1]
    deviation = eps * weight.norm().item() * (math.sqrt(1 / 3) if kind == "uniform" else 1)
    bias = torch.tensor([0.5 * deviation, 0.0], dtype=torch.float64)  # the lead of the true class

    class Shifted(nn.Module):
        def forward(self, x):
            return model(x) + bias

    oracle = referee(Shifted(), x, y, eps=eps, access="labels", budget=1)
    attack_with(Noise(kind=kind), oracle, x, y)
    p = 0.5 * math.erfc(0.5 / math.sqrt(2))
    assert abs((oracle.ledger.first_hit == 1).double().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_noise_near_the_box_stays_inside():
    x = torch.zeros(5, 3, 8, 8, dtype=torch.float64)
    oracle = referee(Sure(), x, torch.zeros(5, dtype=torch.int64), eps=0.1, access="labels", budget=3)
    x_adv = attack_with(Noise(), oracle, x, torch.zeros(5, dtype=torch.int64))  # the oracle refuses what is outside
    assert 0.4 < (x_adv == 0).double().mean() < 0.6
