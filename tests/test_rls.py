"""Random Logit Scaling: the scales as published, no decision turned, and the loss that sees past them."""

import math

import pytest
import torch

from bench.errors import ConfigError
from bench.losses import dlr
from bench.registry import defenses
from defenses.rls import RandomLogitScaling, above
from tests.served import NOTHING, Echo, query

N = 20_000


def served(logits: torch.Tensor, number: int = 0, **settings: object) -> torch.Tensor:
    model = RandomLogitScaling(**settings)(Echo(), NOTHING, 0)
    return model(logits[:, None, None], query(number, len(logits)))


def scales(**settings: object) -> torch.Tensor:
    return served(torch.ones(N, 2), **settings)[:, 0].double()


def test_the_uniform_scale():
    drawn = scales()
    assert drawn.min() >= 0.5
    assert drawn.max() <= 10
    assert drawn.mean().item() == pytest.approx(5.25, abs=4 * 9.5 / math.sqrt(12 * N))
    assert drawn.std().item() == pytest.approx(9.5 / math.sqrt(12), rel=0.02)


def test_the_gaussian_scale_is_cut_off_and_not_heaped_up_at_its_bound():
    drawn = scales(distribution="gaussian")
    assert drawn.min() >= 0.2
    assert (drawn < 0.21).double().mean() < 0.001
    density = torch.distributions.Normal(1.0, 100.0)
    tail = 1 - density.cdf(torch.tensor(0.2)).item()
    for bound in (10.0, 70.0, 200.0):
        expected = (density.cdf(torch.tensor(bound)).item() - 1 + tail) / tail
        assert (drawn < bound).double().mean().item() == pytest.approx(expected, abs=4 * 0.5 / N**0.5)


def test_the_quantiles_are_exact_and_finite_at_the_ends():
    found = above(torch.tensor([0.0, 0.5, 1 - 2**-24]), 0.0, 1.0, 0.0)
    assert found[0] == 0
    assert found[1].item() == pytest.approx(0.67449, abs=1e-5)  # the median of a half-normal
    assert found.isfinite().all()


def test_decisions_stay_and_the_dlr_loss_is_that_of_the_network():
    logits = 5 * torch.randn(N, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out, y = served(logits), torch.randint(10, (N,), generator=torch.Generator().manual_seed(2))
    assert torch.equal(out.argmax(1), logits.argmax(1))
    assert not torch.allclose(out, logits)
    assert torch.allclose(dlr(out, y), dlr(logits, y), atol=1e-12, rtol=1e-6)  # up to what float32 holds of a scale
    assert torch.allclose(out / out[:, :1], logits / logits[:, :1])


def test_each_query_and_row_has_its_own_scale_and_a_repeat_the_same():
    logits = torch.ones(8, 3)
    assert torch.equal(served(logits), served(logits))
    assert not torch.equal(served(logits, 1), served(logits))
    assert len(served(logits).unique(dim=0)) == 8
    assert torch.equal(served(logits[:3]), served(logits)[:3])


def test_no_streams_are_refused():
    with pytest.raises(ValueError, match="rls got no random streams for 2 images"):
        RandomLogitScaling()(Echo(), NOTHING, 0)(torch.rand(2, 1, 1, 4))


def test_what_cannot_be_meant_is_refused():
    nothing_left = "distribution=gaussian, low=5, std=0.01"  # its scales would be infinite
    for text in ("low=0", "low=-1", "low=11", "distribution=gaussian, std=0", "distribution=cauchy", nothing_left):
        with pytest.raises(ConfigError):
            defenses.create(f"rls({text})")
