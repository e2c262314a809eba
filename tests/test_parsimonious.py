"""Parsimonious: a plain reference with heaps, query by query, its blocks, and a linear model of known distance."""

import heapq
import math

import pytest
import torch
from torch import nn

from attacks.parsimonious import Parsimonious, _Plan
from bench.errors import ConfigError
from bench.losses import LOSSES, margin
from bench.oracle import NEVER
from bench.rng import SampleRng
from tests.problems import Linear, Scripted, attack_with, images, referee


def run(attack, x, y, model, **settings):
    oracle = referee(model, x, y, **settings)
    return attack_with(attack, oracle, x, y), oracle.ledger


class Waves(nn.Module):
    """A margin around ``lead`` that is far from linear, so that gains change as blocks move. Keeps its queries."""

    def __init__(self, shape, lead, steps=None):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.inner = torch.randn(math.prod(shape), 12, dtype=torch.float64, generator=generator)
        self.outer = torch.randn(12, dtype=torch.float64, generator=generator)
        self.lead, self.steps, self.queries = lead, steps, []

    def forward(self, x):
        self.queries.append(x)
        waves = (6 * (x.flatten(1) - 0.5) @ self.inner).sin() @ self.outer
        if self.steps:
            waves = (waves * self.steps).round() / self.steps  # many ties
        return torch.stack((self.lead + waves, torch.zeros_like(waves)), dim=1)


class Finished(Exception):
    """The plain search has spent its budget or has fooled the model."""


def reference(attack, model, x, y, eps, budget, rng):
    """What the search of one image (C, H, W) asks, with a heap, and its first hit."""
    channels, height, width = x.shape
    down, across = min(attack.grid or height, height), min(attack.grid or width, width)
    high = torch.zeros_like(x, dtype=torch.bool)
    queries, hit, taken = [], NEVER, []

    def flip(block):
        flipped = high.clone()
        flipped[block] = ~flipped[block]
        return flipped

    def ask(high):
        nonlocal hit
        if len(queries) == budget or hit != NEVER:
            raise Finished
        queries.append(torch.where(high, (x + eps).clamp(max=1), (x - eps).clamp(min=0)))
        logits = model(queries[-1][None])
        if margin(logits, y).item() < 0:
            hit = len(queries)
        return LOSSES[attack.loss](logits, y).item()

    def cut(side):
        blocks = []
        for c in range(channels):
            for top in range(0, down, side):
                for left in range(0, across, side):
                    mask = torch.zeros_like(x, dtype=torch.bool)
                    for i in range(height):
                        for j in range(width):
                            inside_rows = top <= i * down // height < top + side
                            mask[c, i, j] = inside_rows and left <= j * across // width < left + side
                    blocks.append(mask)
        return blocks

    def search(group):
        nonlocal high
        base = ask(high)
        for wanted in (False, True):
            heap = []
            for number, block in enumerate(group):
                if high[block][0] == wanted:
                    heapq.heappush(heap, (ask(flip(block)) - base, number))
            if heap and (attack.first == "reference" or heap[0][0] < 0):
                gain, number = heapq.heappop(heap)
                base, high = base + gain, flip(group[number])
                taken.append(gain)
            else:
                heap = []
            while heap:
                _, number = heapq.heappop(heap)
                value = ask(flip(group[number]))
                if heap and value - base > heap[0][0]:
                    heapq.heappush(heap, (value - base, number))
                    taken.append("again")
                elif value - base > 0:
                    taken.append("stop")
                    break
                else:
                    base, high = value, flip(group[number])
                    taken.append("moved")

    side, turn = attack.block, 0
    try:
        while True:
            blocks = cut(side)
            order = rng.fork(turn).words(len(blocks))[0].argsort().tolist()
            for start in range(0, len(blocks), attack.group):
                search([blocks[number] for number in order[start : start + attack.group]])
            side, turn = max(1, side // 2), turn + 1
    except Finished:
        return queries, hit, taken


@pytest.mark.parametrize(
    ("shape", "settings", "steps"),
    [
        ((3, 4, 4), {"block": 2, "group": 8}, None),
        ((3, 4, 4), {"block": 4, "group": 7, "first": "reference"}, None),
        ((2, 5, 7), {"block": 4, "group": 5, "first": "reference", "loss": "ce"}, None),
        ((2, 5, 7), {"block": 2, "group": 64, "grid": 4}, None),
        ((3, 4, 4), {"block": 2, "group": 16}, 2),
        ((3, 4, 4), {"block": 1, "group": 1}, 2),
    ],
)
def test_every_query_is_that_of_a_plain_search_with_heaps(shape, settings, steps):
    attack, model, n, budget = Parsimonious(**settings), Waves(shape, 30, steps), 5, 230
    x, y = images(n, shape), torch.zeros(n, dtype=torch.int64)
    x[:2] = x[:2].round()  # some at the box
    run(attack, x, y, model, eps=0.08, budget=budget)
    asked, events = torch.stack(model.queries, dim=1), []                                # (n, budget, C, H, W)
    for i in range(n):
        rng = SampleRng.create(0, torch.tensor([i]), "attack")
        queries, hit, taken = reference(attack, model, x[i], y[i : i + 1], 0.08, budget, rng)
        assert torch.equal(asked[i], torch.stack(queries))
        assert hit == NEVER
        events += taken
    if settings["group"] > 1:
        assert {"again", "stop", "moved"} <= set(events)  # all branches were met
        gains = [event for event in events if not isinstance(event, str)]
        assert (max(gains) > 0) == (attack.first == "reference")


@pytest.mark.parametrize("first", ["improving", "reference"])
def test_it_falls_where_a_plain_search_does(first):
    shape, budget = (3, 4, 4), 150
    attack, model = Parsimonious(block=2, group=8, first=first), Waves(shape, 7.5)
    x, y = images(12, shape), torch.zeros(12, dtype=torch.int64)
    _, ledger = run(attack, x, y, model, eps=0.02, budget=budget)
    streams = [SampleRng.create(0, torch.tensor([i]), "attack") for i in range(12)]
    expected = [reference(attack, model, x[i], y[i : i + 1], 0.02, budget, streams[i])[1] for i in range(12)]
    assert ledger.first_hit.tolist() == expected
    assert len(set(expected)) > 4
    assert NEVER in expected


def test_each_round_has_every_block_once_and_the_budget_ends_the_plan():
    x = torch.zeros(3, 3, 8, 8)
    plan = _Plan(x, SampleRng.create(0, torch.arange(3), "a"), 4, 10, None, 400)
    rounds = {4: [10, 2], 2: [10] * 4 + [8], 1: [10] * 19 + [2] + [10] * 11}
    assert plan.size.tolist() == [size for sizes in rounds.values() for size in sizes]
    assert plan.side.tolist() == [side for side, sizes in rounds.items() for _ in sizes]
    assert (plan.size + 1).sum() == 400  # with the base of each group
    for first, count in [(0, 12), (12, 48), (60, 192)]:
        part = plan.order[:, first : first + count].sort(dim=1).values
        assert torch.equal(part, part[:1].expand(3, -1))
        assert len(part[0].unique()) == count
    assert not torch.equal(plan.order[0], plan.order[1])  # an order for each sample by itself


@pytest.mark.parametrize(("factor", "falls"), [(1.05, True), (0.95, False)])
def test_a_linear_boundary_is_reached_and_never_beaten(factor, falls):
    """Pixel by pixel to the corner that the weights ask for, once blocks have become pixels."""
    model, x = Linear((1, 4, 4)), images(1, (1, 4, 4))
    y = model(x).argmax(1)
    weight = (model.weight[0] - model.weight[1]).abs().sum()
    eps = factor * (margin(model(x), y) / weight).item()
    _, ledger = run(Parsimonious(), x, y, model, eps=eps, budget=200)
    assert (ledger.first_hit[0] != NEVER) == falls


def test_the_budget_is_spent_exactly_and_a_hit_is_counted_where_it_happens():
    x, y = images(3, (1, 3, 3)), torch.zeros(3, dtype=torch.int64)
    for first in ("improving", "reference"):
        _, ledger = run(Parsimonious(first=first, group=4), x, y, Scripted(math.inf), budget=97)
        assert ledger.forwards.tolist() == [97] * 3
    _, ledger = run(Parsimonious(), x, y, Scripted(23), budget=97)
    assert ledger.first_hit.tolist() == [23] * 3


def test_no_answer_moves_nothing():
    class Mute(Linear):
        def forward(self, query):
            return super().forward(query) * math.nan

    x, y = images(2), torch.zeros(2, dtype=torch.int64)
    x_adv, ledger = run(Parsimonious(first="reference"), x, y, Mute(), eps=0.05, budget=120)
    assert torch.equal(x_adv, x - 0.05)  # where it starts
    assert ledger.forwards.tolist() == [120] * 2
    assert ledger.invalid.all()


def test_a_wrong_parameter_is_told_what_is_right():
    for settings, message in [
        ({"block": 6}, "power of two"),
        ({"block": 0}, "power of two"),
        ({"group": 0}, "at least one block"),
        ({"grid": 0}, "at least one row"),
        ({"first": "always"}, "improving or reference"),
        ({"loss": "hinge"}, "margin, ce"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Parsimonious(**settings)
