"""How a defense edits margins: undone where it is known, and where it is learned from answers that are paid for."""

import math

import pytest
import torch
from torch import nn

from attacks.decode_square import DecodeSquare
from attacks.decoding import Edit
from attacks.square import Square
from bench.dataset import Split
from bench.errors import ConfigError
from bench.oracle import NEVER
from bench.rules import rules_of
from defenses.aaa import linear_target
from defenses.dld import DashedLineDefense, dashed
from tests.problems import Linear, Recorded, attack_with, images, referee

NOTHING = Split(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64))


def edited(true: torch.Tensor, interval: float, height: float, offset: float) -> torch.Tensor:
    shown = linear_target(true, interval, 1.0, offset) if height == 1 else dashed(true, interval, height, 0.04, 0.5)
    return torch.where(true < 0, true, shown)


@pytest.mark.parametrize(("interval", "height", "offset"), [(6, 1, 0), (6, 0.3, 0), (5, 0.5, 0), (5, 1, 2.3)])
def test_an_edit_is_undone(interval, height, offset):
    true = torch.linspace(-2, 20, 441, dtype=torch.float64) + 0.013
    shown = edited(true, interval, height, offset)
    assert torch.allclose(Edit(interval, height, offset).undone(shown), true)
    each = Edit(*(torch.tensor([[part], [math.nan]], dtype=torch.float64) for part in (interval, height, offset)))
    undone = each.undone(shown.expand(2, -1))
    assert torch.allclose(undone[0], true)
    assert torch.equal(undone[1], shown)  # of a sample whose margins nobody edits


def test_what_is_learned_is_paid_from_the_ledger_and_felled_nobody_outside_the_ball():
    model, x = Linear(classes=4), images(6)
    y = model(x).argmax(1)
    attack = DecodeSquare(interval="learned")
    oracle = referee(model, x, y, budget=20, eps=1e-4, rules=rules_of(attack))
    attack_with(attack, oracle, x, y)
    assert oracle.ledger.forwards.tolist() == [20] * 6
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
