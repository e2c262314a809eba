"""What a service that takes 8-bit images is asked is of whole levels and in the ball, whatever the clean images are."""

import pytest
import torch

from bench.errors import ConfigError
from bench.norms import lp_norm, project
from bench.oracle import NEVER, check_levels
from bench.oracle.quantise import eight_bit
from bench.threat import Threat
from tests.problems import Linear, Recorded, images, referee

ON_GRID = (images(6, (3, 4, 4)) * 255).round() / 255
OFF_GRID = images(6, (3, 4, 4))


def whole(x):
    return torch.allclose(x * 255, (x * 255).round(), atol=1e-6)


@pytest.mark.parametrize("eps", [0.5 / 255, 0.01, 0.03, 8 / 255, 0.3, 1.0])
@pytest.mark.parametrize("clean", [ON_GRID, OFF_GRID, ON_GRID.float(), OFF_GRID.float()])
def test_linf_queries_go_to_the_nearest_level_inside(clean, eps):
    threat = Threat("linf", eps, "scores", 1)
    x = (clean + eps * torch.linspace(-1, 1, 6).view(6, 1, 1, 1)).clamp(0, 1)
    check_levels(clean, threat)
    rounded = eight_bit(x, clean, threat, eps)
    assert torch.allclose(rounded * 255, (rounded * 255).round(), atol=1e-4)
    assert (lp_norm(rounded - clean, "linf") <= eps + 1e-6).all()
    levels = torch.arange(256, dtype=torch.float64)
    inside = (levels - clean.double()[..., None] * 255).abs() <= eps * 255 + 1e-4
    distance = torch.where(inside, (levels - x.double()[..., None] * 255).abs(), torch.inf).amin(dim=-1)
    torch.testing.assert_close((rounded - x).abs().double() * 255, distance, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("norm", "eps"), [("l0", 3.0), ("l1", 0.5), ("l2", 0.2)])
def test_other_norms_go_towards_the_clean_image(norm, eps):
    threat = Threat(norm, eps, "scores", 1)
    check_levels(ON_GRID, threat)
    delta = images(6, (3, 4, 4), seed=2) - 0.5
    if norm == "l0":
        delta[:, :, 1:] = 0
        delta[:, :, :, 3:] = 0
    x = ON_GRID + delta * (1 if norm == "l0" else eps / lp_norm(delta, norm).view(-1, 1, 1, 1))
    rounded = eight_bit(x, ON_GRID, threat, eps)
    assert whole(rounded)
    assert (lp_norm(rounded - ON_GRID, norm) <= eps).all()
    assert (rounded != ON_GRID).any()


@pytest.mark.parametrize("norm", ["l0", "l1", "l2"])
def test_images_off_the_grid_are_refused_where_no_rule_keeps_the_ball(norm):
    with pytest.raises(ConfigError, match="store them as uint8"):
        check_levels(OFF_GRID, Threat(norm, 2.0, "scores", 1))


def test_a_linf_ball_without_a_level_is_refused():
    check_levels(ON_GRID, Threat("linf", 0.0, "scores", 1))
    check_levels(OFF_GRID, Threat("linf", 0.5 / 255, "scores", 1))
    with pytest.raises(ConfigError, match="there is none"):
        check_levels(OFF_GRID, Threat("linf", 0.2 / 255, "scores", 1))
    with pytest.raises(ConfigError, match="there is none"):
        referee(Linear((3, 4, 4)), OFF_GRID, torch.zeros(6, dtype=torch.int64), eps=0.2 / 255, quantise=True)


@pytest.mark.parametrize("minimal", [False, True])
@pytest.mark.parametrize("clean", [ON_GRID, OFF_GRID])
def test_what_an_attack_returns_is_rounded_inside_the_ball_too(clean, minimal):
    """At 0.03, which is 7.65 levels, the nearest level may be outside."""
    model, threat = Recorded(Linear((3, 4, 4))), Threat("linf", 0.03, "scores", 1)
    y = Linear((3, 4, 4))(clean).argmax(1)
    oracle = referee(model, clean, y, eps=0.03, quantise=True, minimal=minimal)
    surface = project(clean + images(6, (3, 4, 4), seed=3) - 0.5, clean, threat)
    oracle.scores(surface)
    final = oracle.finish(surface)
    assert whole(model.asked[0])
    assert whole(final)
    assert (lp_norm(final - clean, "linf") <= 0.03 + 1e-9).all()


def test_a_hit_is_returned_as_it_was_asked():
    clean = ON_GRID.float()
    model = Recorded(Linear((3, 4, 4)).float())
    oracle = referee(model, clean, 1 - model(clean).argmax(1), norm="l2", eps=0.5, quantise=True)
    oracle.scores(clean + 0.05)
    fallen = oracle.ledger.first_hit != NEVER
    assert fallen.any()
    assert torch.equal(oracle.finish(clean)[fallen], model.asked[-1][fallen])
