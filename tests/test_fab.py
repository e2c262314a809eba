"""FAB: its projection against general solvers, and the distances that it finds."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from attacks.fab import FAB, TargetedFAB
from attacks.hyperplane import to_hyperplane
from bench.errors import ConfigError
from bench.oracle import NEVER
from tests.problems import Scripted, attack_with, curved, images, linear_problem, referee

DIM = 6


def solved(point, normal, offset, norm):
    """The norm of the smallest move onto the plane inside the box, by scipy; None where there is none."""
    bounds = list(zip(-point, 1 - point, strict=True))
    plane, d = -offset, len(point)  # normal @ move == plane
    sizes = d if norm == "l1" else 1
    bound = np.eye(d) if norm == "l1" else np.ones((d, 1))
    inside = np.block([[np.eye(d), -bound], [-np.eye(d), -bound]])  # |move| <= size
    linear = linprog(
        [0.0] * d + [1.0] * sizes, A_ub=inside, b_ub=np.zeros(2 * d), A_eq=[[*normal, *[0.0] * sizes]], b_eq=[plane],
        bounds=[*bounds, *[(0, None)] * sizes],
    )  # fmt: skip
    if not linear.success or norm != "l2":
        return float(linear.fun) if linear.success else None
    found = minimize(
        lambda move: move @ move, linear.x[:d], jac=lambda move: 2 * move, method="SLSQP", bounds=bounds,
        constraints={"type": "eq", "fun": lambda move: normal @ move - plane, "jac": lambda move: normal},
        options={"ftol": 1e-16, "maxiter": 300},
    )  # fmt: skip
    return float(np.linalg.norm(found.x))


@pytest.mark.parametrize(("norm", "p"), [("linf", torch.inf), ("l2", 2), ("l1", 1)])
def test_the_projection_is_the_one_that_a_solver_finds(norm, p):
    """On random planes near and far, with weights of zero, points at the ends of the box, and planes that miss it."""
    generator = torch.Generator().manual_seed(5)
    point = torch.rand(40, DIM, dtype=torch.float64, generator=generator)
    point[:10] = point[:10].round()
    normal = torch.randn(40, DIM, dtype=torch.float64, generator=generator)
    normal[::4, :2] = 0
    offset = torch.randn(40, dtype=torch.float64, generator=generator) * torch.tensor([0.1, 1.0, 3.0, 0.0]).repeat(10)
    moves = to_hyperplane(point, normal, offset, norm)
    ends = point + moves
    assert ends.min() >= -1e-12
    assert ends.max() <= 1 + 1e-12
    gap = ((normal * moves).sum(dim=1) + offset).abs()
    missed = 0
    for i in range(40):
        smallest = solved(point[i].numpy(), normal[i].numpy(), offset[i].item(), norm)
        if smallest is None:
            missed += 1
            assert gap[i] > 1e-6
        else:
            assert gap[i] < 1e-9
            assert moves[i].norm(p=p).item() == pytest.approx(smallest, abs=2e-6)
    assert 1 <= missed < 20


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_many_values_in_float32(norm):
    generator = torch.Generator().manual_seed(0)
    point, normal = torch.rand(8, 3072, generator=generator), torch.randn(8, 3072, generator=generator)
    offset = torch.linspace(-30, 30, 8)
    moves = to_hyperplane(point, normal, offset, norm)
    assert ((normal.double() * moves.double()).sum(dim=1) + offset).abs().max() < 1e-3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_distance_to_the_boundary_of_a_linear_model_is_found(norm):
    model, x, y, distances = linear_problem(norm=norm)
    for attack in (FAB(steps=15), TargetedFAB(steps=15)):
        oracle = referee(model, x, y, norm=norm, eps=0.0, access="gradients", budget=200, minimal=True)
        attack_with(attack, oracle, x, y)
        assert torch.allclose(oracle.ledger.best_distance, distances, rtol=0.01)
        assert (oracle.ledger.best_distance >= distances).all()


def test_what_is_returned_is_in_the_ball_and_the_success_is_a_query():
    model, x = curved(), images(12, (1, 5, 5))
    y = model(x).argmax(1)
    oracle = referee(model, x, y, eps=0.1, access="gradients", budget=200, minimal=True)
    final = attack_with(FAB(steps=20), oracle, x, y)
    fallen = oracle.ledger.first_hit != NEVER
    assert 0 < fallen.sum() < 12
    assert (model(final).argmax(1) != y)[fallen].all()
    assert torch.equal(oracle.ledger.best_distance <= 0.1 + 1e-6, fallen)


def test_cost_is_as_stated():
    x, y = images(3), torch.zeros(3, dtype=torch.int64)
    for attack, forwards, backwards in (
        (FAB(steps=5, restarts=2), 20, 10), (TargetedFAB(steps=5), 11, 5), (FAB(steps=50), 25, 13),
    ):  # fmt: skip
        oracle = referee(Scripted(10**6), x, y, access="gradients", budget=25, minimal=True)
        attack_with(attack, oracle, x, y)
        assert oracle.ledger.forwards.tolist() == [forwards] * 3
        assert oracle.ledger.backwards.tolist() == [backwards] * 3


def test_a_step_that_falls_short_is_refused():
    with pytest.raises(ConfigError, match=r"eta is 0\.9"):
        FAB(eta=0.9)
