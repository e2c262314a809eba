"""SignHunter: the schedule of its flips, a plain reference, and linear models whose distances are known."""

import math
from itertools import islice

import pytest
import torch

from attacks.sign_hunter import SignHunter, blocks, passes
from bench.errors import ConfigError
from bench.losses import LOSSES, margin
from bench.oracle import NEVER
from tests.problems import Linear, Scripted, attack_with, images, referee


def run(attack, x, y, model, **settings):
    oracle = referee(model, x, y, **settings)
    return attack_with(attack, oracle, x, y), oracle.ledger


def test_blocks_halve_from_the_whole_image_to_single_values():
    assert list(blocks(1)) == [(0, 1)]
    assert list(blocks(5)) == [(0, 5), (0, 3), (3, 5), (0, 2), (2, 4), (4, 5), *((i, i + 1) for i in range(5))]
    lengths = [last - first for first, last in blocks(3072)]
    assert lengths[:7] == [3072, 1536, 1536, 768, 768, 768, 768]
    assert lengths[-3072:] == [1] * 3072
    assert list(islice(passes(2), 8)) == [None, (0, 2), (0, 1), (1, 2), None, (0, 2), (0, 1), (1, 2)]


def test_a_wrong_parameter_is_told_what_is_right():
    with pytest.raises(ConfigError, match="use one of margin, ce"):
        SignHunter(loss="hinge")
    with pytest.raises(ConfigError, match="use hwc or chw"):
        SignHunter(layout="whc")


@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_flips_follow_the_layout(layout):
    """A model that never improves shows the blocks themselves, each against the start of the pass."""
    seen = []

    class Watch(Linear):
        def forward(self, query):
            seen.append(query)
            lead = 1.0 if len(seen) == 1 else 2.0
            return torch.tensor([[lead, 0.0]]).double().repeat(len(query), 1)

    x = images(1, (3, 2, 2))
    run(SignHunter(layout=layout), x, torch.zeros(1, dtype=torch.int64), Watch(), budget=1 + len(list(blocks(12))))
    for query, (first, last) in zip(seen[1:], blocks(12), strict=True):
        changed = (query != seen[0])[0]
        order = changed.permute(1, 2, 0).flatten() if layout == "hwc" else changed.flatten()
        assert order.nonzero().flatten().tolist() == list(range(first, last))


def reference(model, x, y, norm, eps, budget, loss):
    """The first hit of one image (C, H, W), by the book."""
    channels, height, width = x.shape
    places = [(c, i, j) for i in range(height) for j in range(width) for c in range(channels)]
    length = eps if norm == "linf" else eps / math.sqrt(len(places))

    def ask(base, signs):
        delta = base - x + length * signs
        if norm == "linf":
            delta = delta.clamp(-eps, eps)
        else:
            delta = delta * min(1.0, eps / (delta.norm().item() + 1e-12))
        image = (x + delta).clamp(0, 1)
        logits = model(image[None])
        return image, LOSSES[loss](logits, y).item(), margin(logits, y).item() < 0

    base, queries = x, 0
    while True:
        signs = torch.ones_like(x)
        best_image, best, hit = ask(base, signs)
        queries += 1
        if hit or queries == budget:
            return queries if hit else NEVER
        level = 0
        while level <= math.ceil(math.log2(len(places))):
            length_of_block = math.ceil(len(places) / 2**level)
            i = 0
            while i * length_of_block < len(places):
                block = places[i * length_of_block : (i + 1) * length_of_block]
                for place in block:
                    signs[place] *= -1
                image, value, hit = ask(base, signs)
                queries += 1
                if hit or queries == budget:
                    return queries if hit else NEVER
                if value <= best:
                    best_image, best = image, value
                else:
                    for place in block:
                        signs[place] *= -1
                i += 1
            level += 1
        base = best_image


@pytest.mark.parametrize(("norm", "eps", "loss"), [("linf", 0.02, "margin"), ("linf", 0.012, "ce"), ("l2", 0.15, "ce")])
def test_it_agrees_with_a_plain_reference(norm, eps, loss):
    model, x, budget = Linear((3, 4, 4), 5), images(8, (3, 4, 4)), 200  # nearly two passes
    x[:2] = x[:2].round()  # some at the box
    y = model(x).argmax(1)
    _, ledger = run(SignHunter(loss=loss), x, y, model, norm=norm, eps=eps, budget=budget)
    expected = [reference(model, x[i], y[i : i + 1], norm, eps, budget, loss) for i in range(8)]
    assert ledger.first_hit.tolist() == expected
    assert len(set(expected)) > 3
    assert NEVER in expected


@pytest.mark.parametrize(("factor", "falls"), [(1.05, True), (0.95, False)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_boundary_is_reached_and_never_beaten(norm, factor, falls):
    """One pass decides every sign by itself; in l2, where all steps are equally long, of weights equally large."""
    model = Linear()
    if norm == "l2":
        model.weight = model.weight.sign()
        model.weight[1] = -model.weight[0]
    x = images(1)
    y = model(x).argmax(1)
    weight = (model.weight[0] - model.weight[1]).norm(p={"linf": 1, "l2": 2}[norm])
    eps = factor * (margin(model(x), y) / weight).item()
    _, ledger = run(SignHunter(), x, y, model, norm=norm, eps=eps, budget=1 + 2 * len(list(blocks(192))))
    assert (ledger.first_hit[0] != NEVER) == falls


def test_a_start_and_each_flip_cost_one_query_in_every_pass():
    x = images(3, (1, 2, 2))
    _, ledger = run(SignHunter(), x, torch.zeros(3, dtype=torch.int64), Scripted(math.inf), budget=31)
    assert ledger.forwards.tolist() == [31] * 3
    _, ledger = run(SignHunter(), x, torch.zeros(3, dtype=torch.int64), Scripted(19), budget=31)
    assert ledger.first_hit.tolist() == [19] * 3


def test_no_answer_is_never_an_improvement():
    class Mute(Linear):
        def forward(self, query):
            return super().forward(query) * math.nan

    x = images(2)
    x_adv, ledger = run(SignHunter(), x, torch.zeros(2, dtype=torch.int64), Mute(), budget=20)
    assert torch.equal(x_adv, x)
    assert ledger.invalid.all()
