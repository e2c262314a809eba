"""RayS: exact distances on linear models, agreement with a plain search, and its first queries."""

import math

import pytest
import torch
from torch import nn

from attacks.rays import RayS
from bench.errors import ConfigError
from bench.norms import lp_norm
from bench.oracle import NEVER
from tests.problems import Recorded, attack_with, curved, images, linear_problem, referee


def run(attack, model, x, y, **settings):
    oracle = referee(model, x, y, access="labels", minimal=True, **settings)
    return attack_with(attack, oracle, x, y), oracle.ledger


def test_on_a_linear_model_the_distance_is_the_margin_over_the_l1_norm():
    model, x, y, exact = linear_problem()
    assert ((exact > 0.02) & (exact < 0.1)).all()
    _, ledger = run(RayS(tol=1e-7), model, x, y, eps=0.0, budget=800)
    assert (ledger.first_hit == NEVER).all()
    assert torch.allclose(ledger.best_distance, exact, rtol=1e-4)
    assert (ledger.best_distance >= exact).all()  # nobody can


@pytest.mark.parametrize(("factor", "falls"), [(1.05, True), (0.95, False)])
def test_the_ball_beyond_the_exact_distance_falls_and_the_one_within_never_does(factor, falls):
    model, x, y, exact = linear_problem()
    for i in range(len(x)):
        eps = factor * exact[i].item()
        x_adv, ledger = run(RayS(), model, x[i : i + 1], y[i : i + 1], eps=eps, budget=400)
        assert (ledger.first_hit != NEVER).item() == falls
        assert (model(x_adv).argmax(1) != y[i]).item() == falls
        assert lp_norm(x_adv - x[i], "linf") <= eps + 1e-9


def plain_search(model, x, y, eps, budget, tol):
    """RayS on one image (C, H, W), with loops; returns its queries and the nearest misclassified distance."""
    flat, size = x.flatten(), x.numel()
    queries, nearest = [], [math.inf]

    class Over(Exception):
        pass

    def misclassified(signs, radius):
        if len(queries) == budget:
            raise Over
        query = torch.tensor([
            min(max(value + sign * min(radius, 1.0), 0.0), 1.0)
            for value, sign in zip(flat.tolist(), signs, strict=True)
        ]).double()  # fmt: skip
        queries.append(query)
        wrong = model(query.view(1, *x.shape)).argmax(1).item() != y
        distance = (query - flat).abs().max().item()
        if wrong:
            nearest[0] = min(nearest[0], distance)
            if distance <= eps + 1e-6:
                raise Over
        return wrong

    signs, reached, level = [1] * size, math.inf, 0
    try:
        while True:
            block = math.ceil(size / 2**level)
            for start in range(0, size, block):
                tried = [-s if start <= i < start + block else s for i, s in enumerate(signs)]
                if not misclassified(tried, reached):
                    continue
                low, high = 0.0, min(reached, 1.0)
                while high - low > tol / math.sqrt(size):
                    middle = (low + high) / 2
                    if misclassified(tried, middle):
                        high = middle
                    else:
                        low = middle
                if high < reached:
                    signs, reached = tried, high
            level += 1
    except Over:
        return queries, nearest[0]


@pytest.mark.parametrize("eps", [0.0, 0.06])
def test_a_plain_search_of_one_sample_at_a_time_asks_the_same(eps):
    x, budget = torch.rand(10, 1, 5, 5, generator=torch.Generator().manual_seed(4)).double(), 150
    y = curved()(x).argmax(1)
    hits = 0
    for i in range(10):
        model = Recorded(curved())
        _, ledger = run(RayS(tol=0.01), model, x[i : i + 1], y[i : i + 1], eps=eps, budget=budget)
        queries, nearest = plain_search(curved(), x[i], y[i].item(), eps, budget, 0.01)
        assert len(model.asked) == len(queries)
        assert torch.allclose(torch.cat(model.asked).flatten(1), torch.stack(queries), atol=1e-12)
        assert ledger.forwards.item() == len(queries)
        assert ledger.best_distance.item() == pytest.approx(nearest)
        hits += ledger.first_hit.item() != NEVER
    assert 2 < hits < 10 if eps else hits == 0  # a radius that some fall to


def test_samples_at_different_stages_share_a_batch():
    x = torch.rand(10, 1, 5, 5, generator=torch.Generator().manual_seed(4)).double()
    model = curved()
    y = model(x).argmax(1)
    settings = {"eps": 0.06, "budget": 250}
    x_adv, whole = run(RayS(), model, x, y, **settings)
    alone = [run(RayS(), model, x[i : i + 1], y[i : i + 1], **settings) for i in range(10)]
    assert torch.equal(torch.cat([ledger.first_hit for _, ledger in alone]), whole.first_hit)
    assert torch.allclose(torch.cat([ledger.best_distance for _, ledger in alone]), whole.best_distance)
    assert torch.allclose(torch.cat([one for one, _ in alone]), x_adv)


def test_black_comes_first_and_then_blocks_from_coarse_to_fine():
    class Never(nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, 0.0]]).double().repeat(len(x), 1)

    model = Recorded(Never())
    x = images(2, (1, 2, 3))
    x_adv, ledger = run(RayS(), model, x, torch.zeros(2, dtype=torch.int64), budget=22)
    ends = torch.cat([query[:1] for query in model.asked]).flatten(1)
    assert set(ends.unique().tolist()) == {0.0, 1.0}  # without a boundary only corners of the cube are asked about
    blocks = [(row == 0).nonzero().flatten().tolist() for row in ends]
    halves, pairs, ones = [[0, 1, 2], [3, 4, 5]], [[0, 1], [2, 3], [4, 5]], [[i] for i in range(6)]
    assert blocks == [[*range(6)], *halves, *pairs, *ones, *ones, *ones[:4]]
    assert torch.equal(x_adv, x)
    assert ledger.best_distance.isinf().all()


def test_the_first_boundary_costs_the_published_number_of_queries():
    """1 query and log2(sqrt(d) / tol) rounded up: 16 halvings on a CIFAR image."""
    class BlackIsWrong(nn.Module):
        def forward(self, x):  # wrong along the first ray alone, from radius 0.3 on
            right = (x.flatten(1) > 0.2).any(dim=1)
            return torch.stack((right.double(), 1 - right.double()), dim=1)

    model = Recorded(BlackIsWrong())
    x = torch.full((1, 3, 32, 32), 0.5, dtype=torch.float64)
    y = torch.zeros(1, dtype=torch.int64)
    _, ledger = run(RayS(), model, x, y, eps=0.0, budget=18)
    radii = [(query - x).abs().max().item() for query in model.asked]
    assert radii[:4] == [0.5, 0.5, 0.25, 0.375]
    assert math.ceil(math.log2(math.sqrt(3072) / 1e-3)) == 16
    assert 0 <= ledger.best_distance.item() - 0.3 <= 1e-3 / math.sqrt(3072)
    lower = (model.asked[17] - x) < 0
    assert lower.flatten().sum().item() == 1536  # the 18th tries the first half flipped back


def test_no_answer_changes_nothing():
    from attacks.rays import _Rays

    rays, row = _Rays(images(1, (1, 4, 4)), 1e-3), torch.tensor([0])
    yes, no = torch.tensor([True]), torch.tensor([False])
    rays.learn(row, yes, yes)
    before = rays.query(row)
    rays.learn(row, yes, no)
    assert torch.equal(rays.query(row), before)
    rays.learn(row, no, yes)
    assert not torch.equal(rays.query(row), before)


@pytest.mark.parametrize("tol", [0.0, -1.0, math.inf, math.nan])
def test_a_tolerance_that_ends_no_bisection_is_refused(tol):
    with pytest.raises(ConfigError, match="tol is"):
        RayS(tol=tol)
