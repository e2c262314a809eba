"""Score attacks under a loss that no scale moves: a random scale of the scores is no defense against them."""

import pytest
import torch
from torch import nn

from bench.errors import ConfigError
from bench.registry import attacks
from tests.problems import Linear, attack_with, images, referee

NAMES = ["nes", "bandits", "zo-sign-sgd", "simba", "sign-hunter", "parsimonious"]


class Scaled(nn.Module):
    """All logits of a query times one number of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, rng):
        return self.model(x) * 2 ** (10 * rng.uniform()[:, None].to(x)).floor()  # powers of two keep every digit


def hits(name, model, random):
    x = images(8)
    y = Linear(classes=4)(x).argmax(1)
    oracle = referee(model, x, y, eps=0.03, budget=40, random=random)
    attack_with(attacks.create(name), oracle, x, y)
    return oracle.ledger.first_hit


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_of_each_query_changes_nothing(name):
    model = Linear(classes=4)
    assert torch.equal(hits(f"{name}(loss=dlr)", Scaled(model), True), hits(f"{name}(loss=dlr)", model, False))


def test_a_scale_misleads_who_compares_margins():
    model = Linear(classes=4)
    assert not torch.equal(hits("simba", Scaled(model), True), hits("simba", model, False))


@pytest.mark.parametrize("name", NAMES)
def test_it_wants_three_classes_and_their_scores(name):
    attack = attacks.create(f"{name}(loss=dlr)")
    with pytest.raises(ConfigError, match="loss=dlr compares 3 classes, and the data have 2; use loss=ce"):
        attack.check(2, (3, 8, 8))
    assert not attack.top_scores
    assert attacks.create(name).top_scores
