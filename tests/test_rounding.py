"""Rounding: on the grid, as near as it says, and no trace of what was dropped."""

import pytest
import torch
from torch import nn

from bench.errors import ConfigError
from bench.registry import defenses
from tests.served import NOTHING, Echo


def rounded(logits: torch.Tensor, spec: str) -> torch.Tensor:
    return defenses.create(spec)(Echo(), NOTHING, 0)(logits[:, None, None])


@pytest.fixture
def logits() -> torch.Tensor:
    return 10 * torch.randn(500, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("decimals", [0, 1, 3, 6])
@pytest.mark.parametrize(("mode", "error"), [("nearest", 0.5), ("truncate", 1.0)])
def test_scores_lie_on_the_grid_and_no_further_than_a_step(decimals, mode, error, logits):
    out = rounded(logits, f"rounding(decimals={decimals}, mode={mode})")
    steps = out * 10**decimals
    assert ((steps - steps.round()).abs() < 1e-6).all()
    assert ((out - logits).abs() <= error * 10**-decimals + 1e-9).all()
    assert torch.equal(rounded(out, f"rounding(decimals={decimals})"), out)


def test_known_values():
    given = torch.tensor([[-1.27, -0.04, 0.04, 1.25, 1.27]], dtype=torch.float64)
    assert rounded(given, "rounding").tolist() == [[-1.3, -0.0, 0.0, 1.2, 1.3]]
    assert rounded(given, "rounding(mode=truncate)").tolist() == [[-1.2, -0.0, 0.0, 1.2, 1.2]]


def test_changes_below_half_a_step_are_not_reported():
    centres = torch.arange(10, dtype=torch.float64)[None] / 10
    inside = centres + 0.0499 * (2 * torch.rand(200, 10, dtype=torch.float64) - 1)
    assert len(rounded(inside, "rounding").unique(dim=0)) == 1


def test_decisions_change_only_where_the_best_two_round_alike(logits):
    out = rounded(logits, "rounding(decimals=0)")
    best = out.amax(dim=1, keepdim=True)
    tied = (out == best).sum(dim=1) > 1
    assert torch.equal(out.argmax(1)[~tied], logits.argmax(1)[~tied])
    assert (out.gather(1, logits.argmax(1, keepdim=True)) == best).all()
    assert 0 < tied.double().mean() < 0.2


def test_gradients_are_those_of_the_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    x, weights = torch.rand(5, 3, 2, 2, requires_grad=True), torch.randn(5, 10)
    served = defenses.create("rounding")(network, NOTHING, 0)
    (through,) = torch.autograd.grad((served(x) * weights).sum(), x)
    (plain,) = torch.autograd.grad((network(x) * weights).sum(), x)
    assert torch.equal(through, plain)


def test_decimals_that_cannot_be_meant_are_refused():
    for text in ("decimals=-1", "decimals=7", "decimals=half", "mode=up"):
        with pytest.raises(ConfigError):
            defenses.create(f"rounding({text})")
