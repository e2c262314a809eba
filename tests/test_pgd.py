"""PGD against a linear model, where the distance to the boundary is known."""

import pytest
import torch

from attacks.pgd import PGD
from bench.errors import ConfigError
from bench.losses import margin
from bench.norms import lp_norm
from bench.oracle import NEVER
from tests.problems import Linear, Scripted, attack_with, images, referee


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
@pytest.mark.parametrize(("factor", "falls"), [(1.05, True), (0.95, False)])
@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_the_boundary_of_a_linear_model_is_reached_and_never_beaten(norm, dual, factor, falls, loss):
    model = Linear()
    direction = model.weight[0] - model.weight[1]
    x = 0.5 + 0.002 * direction.sign().view(1, 3, 8, 8)
    y = torch.zeros(1, dtype=torch.int64)
    distance = (margin(model(x), y) / direction.norm(p=dual)).item()
    oracle = referee(model, x, y, norm=norm, eps=factor * distance, access="gradients", budget=200)
    x_adv = attack_with(PGD(steps=100, loss=loss), oracle, x, y)
    assert (oracle.ledger.first_hit != NEVER).all() == falls
    assert (lp_norm(x_adv - x, norm) <= factor * distance + 1e-9).all()


@pytest.mark.parametrize(("budget", "forwards", "backwards"), [(1000, 22, 20), (15, 15, 14), (1, 1, 1)])
def test_cost_is_as_stated_and_the_budget_holds(budget, forwards, backwards):
    x, y = images(3), torch.zeros(3, dtype=torch.int64)
    oracle = referee(Scripted(10**6), x, y, access="gradients", budget=budget)
    pgd = PGD(steps=10, restarts=2)
    attack_with(pgd, oracle, x, y)
    assert pgd.most_queries == 22
    assert oracle.ledger.forwards.tolist() == [forwards] * 3
    assert oracle.ledger.backwards.tolist() == [backwards] * 3


def test_steps_fall_from_twice_the_radius_to_nothing():
    """Constant steps of a tenth leave 28.7 % of 300 digits on an adversarially trained network, these 19.3 %."""
    sizes = [PGD(steps=4)._size(step) for step in range(5)]
    assert sizes == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0])
    assert {PGD(steps=4, rel_step=0.1, schedule="constant")._size(step) for step in range(4)} == {0.1}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball(norm):
    x = torch.full((500, 1, 4, 4), 0.5, dtype=torch.float64)
    from bench.rng import SampleRng
    from bench.threat import Threat

    start = PGD()._start(x, Threat(norm, 0.3, "gradients", 1), SampleRng.create(0, torch.arange(500), "start"))
    radius = lp_norm(start - x, norm) / 0.3
    assert radius.max() <= 1
    # For a uniform point of a d-dimensional ball, radius^d is uniform on [0, 1]: mean 1/2, variance 1/12.
    assert abs((radius**16).mean() - 0.5) < 4 * (1 / 12 / 500) ** 0.5


def test_samples_do_not_see_their_batch():
    model = Linear(classes=5)
    x = images(20)
    y = model(x).argmax(1)

    def attacked(ids):
        oracle = referee(model, x[ids], y[ids], eps=0.01, access="gradients", ids=ids)
        return attack_with(PGD(steps=8, restarts=2), oracle, x[ids], y[ids], ids=ids), oracle.ledger.first_hit

    whole_x, whole_hit = attacked(torch.arange(20))
    parts = [attacked(ids) for ids in torch.arange(20).split(6)]
    assert torch.equal(torch.cat([hit for _, hit in parts]), whole_hit)
    assert torch.allclose(torch.cat([x_adv for x_adv, _ in parts]), whole_x, atol=1e-12)


def test_impossible_parameters_are_refused():
    with pytest.raises(ConfigError, match="above zero"):
        PGD(steps=0)
