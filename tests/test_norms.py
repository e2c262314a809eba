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
