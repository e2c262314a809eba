"""Distances, projections and directions."""

import pytest
import torch

from bench.norms import lp_norm, project, steepest
from bench.threat import Threat
from tests.problems import images


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("factor", "moves"), [(0.5, False), (1.0, False), (3.0, True)])
def test_projection_inside_on_and_outside_the_ball(norm, factor, moves):
    x = torch.full((4, 3, 8, 8), 0.5, dtype=torch.float64)
    direction = images(4) - 0.5
    delta = direction / lp_norm(direction, norm)[:, None, None, None] * 0.1 * factor
    projected = project(x + delta, x, Threat(norm, 0.1, "scores", 1))
    assert (lp_norm(projected - x, norm) <= 0.1 + 1e-12).all()
    assert torch.allclose(projected, x + delta, atol=1e-12) != moves
    if moves:
        assert torch.allclose(lp_norm(projected - x, norm), torch.tensor(0.1, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_stays_in_the_box(norm):
    x = images(8).round()  # black and white pixels
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    projected = project(x + noise, x, Threat(norm, 0.9, "scores", 1))
    assert projected.min() >= 0
    assert projected.max() <= 1
    assert (lp_norm(projected - x, norm) <= 0.9 + 1e-9).all()


def test_norms_by_hand():
    delta = torch.zeros(1, 3, 2, 2)
    delta[0, :, 0, 0] = torch.tensor([0.3, -0.4, 0.0])
    delta[0, 0, 1, 1] = 1.2
    assert lp_norm(delta, "l0").item() == 2  # pixels, not values
    assert lp_norm(delta, "l1").item() == pytest.approx(1.9)
    assert lp_norm(delta, "l2").item() == pytest.approx(1.3)
    assert lp_norm(delta, "linf").item() == pytest.approx(1.2)
    assert lp_norm(-delta, "linf").item() == pytest.approx(1.2)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_no_unit_step_rises_faster_than_the_steepest(norm, dual):
    gradient = images(5) - 0.5
    rise = (gradient * steepest(gradient, norm)).flatten(1).sum(dim=1)
    assert torch.allclose(rise, gradient.flatten(1).norm(p=dual, dim=1))
    assert torch.equal(steepest(torch.zeros_like(gradient), norm), torch.zeros_like(gradient))


@pytest.mark.parametrize("scale", [0.02, 0.3, 3.0])
def test_the_l1_projection_is_the_nearest_point(scale):
    """Held against a general solver, at points inside the ball, outside it, and where the box clips."""
    from scipy.optimize import minimize

    x = torch.rand(3, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    aim = x + scale * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    nearest = project(aim, x, Threat("l1", 0.5, "scores", 1))
    assert (lp_norm(nearest - x, "l1") <= 0.5 + 1e-12).all()
    for centre, point, found in zip(x.flatten(1).numpy(), aim.flatten(1).numpy(), nearest.flatten(1), strict=True):

        def parts(change, centre=centre):  # up and down, so that the norm is linear
            return centre + change[:9] - change[9:]

        result = minimize(
            lambda change, point=point, parts=parts: ((parts(change) - point) ** 2).sum(), [0.0] * 18, method="SLSQP",
            bounds=[(0, 1 - c) for c in centre] + [(0, c) for c in centre],
            constraints={"type": "ineq", "fun": lambda change: 0.5 - change.sum()}, options={"ftol": 1e-14},
        )  # fmt: skip
        assert torch.allclose(found, torch.as_tensor(parts(result.x)), atol=1e-5)


def test_rounding_errors_of_many_values_do_not_leave_the_l1_ball():
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    far = project(x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), x, Threat("l1", 5, "scores", 1))
    assert ((far.double() - x.double()).abs().flatten(1).sum(dim=1) <= 5).all()
    assert far.min() >= 0
    assert far.max() <= 1
