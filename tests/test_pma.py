"""PMA: its steps as released, and PMA+ with APGD-T after it."""

import math

import pytest
import torch

from attacks.pma import PMA, PMAPlus
from bench.rng import SampleRng
from tests.problems import Recorded, Scripted, asks_for, attack_with, curved, images, referee


def test_sizes_fall_twice():
    sizes = [PMA(steps=10)._size(step) for step in range(10)]
    expected = [1 + math.cos(math.pi * k / 5) for k in (-1, 0, 1, 2, 3, 4, 0, 1, 2, 3)]
    assert sizes == pytest.approx(expected)


def test_every_point_is_that_of_the_plain_algorithm():
    model, x, eps, steps = curved(), images(3, (1, 5, 5)), 0.004, 8
    y = model(x).argmax(1)
    recorded = Recorded(model)
    attack = PMA(steps=steps)
    oracle = referee(recorded, x, y, eps=eps, budget=100, **asks_for(attack, model))
    attack_with(attack, oracle, x, y)
    assert len(recorded.asked) == 2 * (steps + 1)
    for i in range(3):
        met = iter(batch[i] for batch in recorded.asked)
        for run in range(2):
            rng = SampleRng.create(0, torch.tensor([i]), "attack").fork(run)
            u = (x[i] + eps * (2 * rng.uniform(1, 5, 5)[0].double() - 1)).clamp(0, 1)
            for step in range(steps + 1):
                torch.testing.assert_close(next(met), u, rtol=0, atol=1e-9)
                u = u.clone().requires_grad_(True)
                p = model(u[None])[0].softmax(dim=0)
                true, rival = p[y[i]], max(p[j] for j in range(4) if j != y[i])
                rises = true if step == 0 else rival - true if step >= steps / 2 else -true if run == 0 else rival
                (g,) = torch.autograd.grad(rises, u)
                done = step - 1 if step <= steps / 2 else step - steps / 2 - 1
                size = 2 * eps * 0.5 * (1 + math.cos(done / (steps - steps / 2) * math.pi))
                u = torch.clamp((u + size * g.sign()).detach(), x[i] - eps, x[i] + eps).clamp(0, 1)


def test_costs_are_as_stated():
    x, y = images(3), torch.zeros(3, dtype=torch.int64)
    attack = PMA(steps=5)
    oracle = referee(Scripted(10**6), x, y, budget=100, **asks_for(attack, None))
    attack_with(attack, oracle, x, y)
    assert oracle.ledger.forwards.tolist() == [attack.most_queries] * 3 == [12] * 3
    assert oracle.ledger.backwards.tolist() == [10] * 3
    assert PMAPlus().most_queries == 202 + 910
