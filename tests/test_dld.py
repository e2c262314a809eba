"""The Dashed Line Defense: both lines as published, decisions kept, every true margin to be found again."""

import pytest
import torch
from torch import nn

from bench.errors import ConfigError
from bench.registry import defenses
from defenses.dld import DashedLineDefense, dashed
from tests.served import NOTHING, Echo


def served(logits: torch.Tensor, **settings: float) -> torch.Tensor:
    return DashedLineDefense(**settings)(Echo(), NOTHING, 0)(logits[:, None, None])


def test_known_values():
    """Of an interval of 6, a dash is 0.24 long: low below its middle, high above it."""
    margins = torch.tensor([0.0, 0.06, 0.18, 0.30, 0.42, 5.98, 6.0, 6.06, 6.18], dtype=torch.float64)
    low, high = (lambda m: 1.8 - 0.3 * m), (lambda m: 1.8 + 0.7 * m)
    expected = [low(0.0), low(0.06), high(0.18), low(0.30), high(0.42), high(5.98),
                6 + low(0.0), 6 + low(0.06), 6 + high(0.18)]  # fmt: skip
    assert dashed(margins, 6, 0.3, 0.04, 0.5).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("high", [0.0, 0.2, 0.5, 1.0])
def test_the_share_of_the_high_line(high):
    margins = torch.linspace(0, 60, 100_001, dtype=torch.float64)[:-1]
    shown = dashed(margins, 6, 0.3, 0.04, high)
    above = shown - torch.floor(margins / 6) * 6 > 1.8 + 1e-9
    assert above.double().mean().item() == pytest.approx(high, abs=0.01)


def test_the_lines_share_no_value_so_that_knowing_interval_and_height_gives_the_margin_away():
    generator = torch.Generator().manual_seed(0)
    for interval, height in ((6.0, 0.3), (4.0, 0.5), (2.5, 0.8)):
        true = 30 * torch.rand(20_000, generator=generator, dtype=torch.float64)
        shown = dashed(true, interval, height, 0.04, 0.5)
        border = torch.floor(shown / interval) * interval
        over = shown - border - height * interval
        found = border + torch.where(over > 0, over / (1 - height), -over / height)
        assert torch.allclose(found, true, atol=1e-9)


def test_the_top_logit_alone_moves_and_stays_the_top_one():
    logits = 5 * torch.randn(2_000, 10, generator=torch.Generator().manual_seed(1))
    logits[0, :2] = 9.0  # a tie
    out = served(logits)
    best = logits.argmax(1)
    assert torch.equal(out.argmax(1), best)
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, best[:, None], False)
    assert torch.equal(out[others], logits[others])
    top = out.topk(2, dim=1).values
    assert (top[:, 0] > top[:, 1]).all()
    true = logits.double().topk(2, dim=1).values
    expected = dashed(true[:, 0] - true[:, 1], 6, 0.3, 0.04, 0.5)
    assert torch.allclose((top[:, 0] - top[:, 1]).double(), expected, atol=5e-6)


def test_the_smallest_report_is_no_tie():
    logits = torch.tensor([[17.0, 23.0 - 1e-6, 0.0]])  # a margin just below 6 on the low line: reported as nearly 0
    out = served(logits, high=0.0)
    assert out.argmax(1).item() == 1
    assert out[0, 1] > out[0, 0]


def test_gradients_are_those_of_the_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    x, weights = torch.rand(5, 3, 2, 2, requires_grad=True), torch.randn(5, 10)
    through, plain = (
        torch.autograd.grad((model(x) * weights).sum(), x)[0]
        for model in (DashedLineDefense()(network, NOTHING, 0), network)
    )
    assert torch.equal(through, plain)


def test_what_cannot_be_meant_is_refused():
    for text in ("interval=0", "height=1", "height=0", "dash=0", "high=1.5"):
        with pytest.raises(ConfigError):
            defenses.create(f"dld({text})")
