"""How a defense edits margins, learned from answers on a line: found, exact where published, and paid for."""

import math

import pytest
import torch
from torch import nn

from attacks.decode_square import DecodeSquare
from attacks.decoding import Edit, learned, scan
from attacks.square import Square
from bench.dataset import Split
from bench.errors import ConfigError
from bench.oracle import NEVER
from bench.rules import rules_of
from defenses.aaa import linear_target
from defenses.dld import DashedLineDefense, dashed
from tests.problems import Linear, Recorded, attack_with, images, referee

NOTHING = Split(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64))


def way(n: int) -> torch.Tensor:
    """Margins (n, 25) that run from somewhere above 2 down to just below 0, not quite straight."""
    generator = torch.Generator().manual_seed(0)
    top = 2 + 10 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    bow = torch.rand(n, 1, generator=generator, dtype=torch.float64) - 0.5
    t = torch.linspace(0, 1, 25, dtype=torch.float64)
    return top * (1 - 1.1 * t + 0.6 * bow * torch.sin(math.pi * t))


def edited(true: torch.Tensor, interval: float, height: float, offset: float) -> torch.Tensor:
    shown = linear_target(true, interval, 1.0, offset) if height == 1 else dashed(true, interval, height, 0.04, 0.5)
    return torch.where(true < 0, true, shown)


@pytest.mark.parametrize(
    ("interval", "height", "offset", "exact"),
    [(6, 1, 0, 0.9), (6, 0.3, 0, 0.9), (5, 0.5, 0, 0.8), (5, 1, 2.3, 0.8)],
)
def test_an_edit_is_found_and_undone(interval, height, offset, exact):
    true = way(24)
    edit = learned(edited(true, interval, height, offset))
    assert (~edit.interval.isnan()).double().mean() > 0.95
    each = Edit(*(part[:, None] for part in vars(edit).values()))
    off = (each.undone(edited(true, interval, height, offset)) - true).abs()
    assert (off < 0.1).double().mean() > exact


def test_published_edits_are_found_to_the_last_bit():
    for known in ((6.0, 1.0, 0.0), (6.0, 0.3, 0.0)):
        edit = learned(edited(way(20), *known))
        same = torch.stack(tuple(vars(edit).values()), dim=1) == torch.tensor(known, dtype=torch.float64)
        assert same.all(dim=1).double().mean() > 0.6


def test_margins_that_nobody_edits_stay_as_they_are():
    edit = learned(way(20))
    assert edit.interval.isnan().all()
    assert torch.equal(edit.undone(torch.ones(20)), torch.ones(20))


def test_each_sample_learns_by_itself():
    shown = edited(way(8), 6, 0.3, 0)
    whole, part = learned(shown), learned(shown[3:5])
    pairs = zip(vars(whole).values(), vars(part).values(), strict=True)
    assert all(torch.equal(one[3:5], other) for one, other in pairs)


def test_the_line_ends_past_the_boundary_and_is_paid_from_the_ledger():
    model, x = Linear(classes=4), images(6)
    y = model(x).argmax(1)
    oracle = referee(model, x, y, budget=100, rules=rules_of(DecodeSquare(interval="learned")))
    found = scan(oracle, x, y)
    assert oracle.ledger.forwards.tolist() == [33] * 6
    assert (found[:, 0] > 0).all()
    assert (found[:, -1] < 0).double().mean() > 0.5
    assert (oracle.ledger.first_hit == NEVER).all()  # whatever was misclassified out there


@pytest.mark.slow
def test_it_takes_dld_away_while_square_fails():
    class Steep(nn.Module):
        def forward(self, x):
            return 6 * Linear(classes=4)(x)

    x = images(24)
    y = Steep()(x).argmax(1)
    served = DashedLineDefense()(Steep(), NOTHING, 0)
    left = {}
    for name, attack, model in (
        ("bare", Square(p_init=0.3), Steep()), ("square", Square(p_init=0.3), served),
        ("told", DecodeSquare(height=0.3), served), ("learned", DecodeSquare(interval="learned"), served),
    ):  # fmt: skip
        oracle = referee(model, x, y, eps=0.012, budget=150, rules=rules_of(attack))
        attack_with(attack, oracle, x, y)
        left[name] = (oracle.ledger.first_hit == NEVER).double().mean().item()
    assert left["square"] > left["bare"] + 0.2
    assert abs(left["told"] - left["bare"]) < 0.15
    assert abs(left["learned"] - left["bare"]) < 0.2


def test_no_question_repeats_what_another_sample_decides():
    model = Recorded(Linear(classes=4))
    x = images(3)
    y = Linear(classes=4)(x).argmax(1)
    attack = DecodeSquare(interval="learned")
    alone = []
    for rows in ([0, 1, 2], [1]):
        oracle = referee(model, x[rows], y[rows], eps=0.005, budget=60, ids=torch.tensor(rows), rules=rules_of(attack))
        alone.append(attack_with(attack, oracle, x[rows], y[rows], ids=torch.tensor(rows)))
    assert torch.equal(alone[0][1], alone[1][0])


def test_what_is_learned_is_not_told():
    with pytest.raises(ConfigError, match="interval=learned learns height and offset, too; leave them out"):
        DecodeSquare(interval="learned", height=0.3)
