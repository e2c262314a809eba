"""NES: its estimate, its probes, a plain reference, and linear models whose distances are known."""

import math

import pytest
import torch
from torch import nn

from attacks.estimation import directions
from attacks.nes import NES
from bench.errors import ConfigError
from bench.losses import LOSSES, margin
from bench.oracle import NEVER
from bench.rng import SampleRng
from tests.problems import Linear, attack_with, images, referee


def run(attack, x, y, model, **settings):
    oracle = referee(model, x, y, **settings)
    return attack_with(attack, oracle, x, y), oracle.ledger


class Bowl(nn.Module):
    """The margin is the squared distance from ``centre``, so its gradient is known everywhere."""

    def __init__(self, centre):
        super().__init__()
        self.centre = centre

    def forward(self, x):
        lead = (x - self.centre).flatten(1).square().sum(dim=1)
        return torch.stack((lead, torch.zeros_like(lead)), dim=1)


class Recording(nn.Module):
    """Another model, which keeps what it was asked; wrong from the ``wrong_at``-th image on."""

    def __init__(self, model, wrong_at=math.inf):
        super().__init__()
        self.model, self.wrong_at, self.queries = model, wrong_at, []

    def forward(self, x):
        number = torch.arange(len(x)) + len(self.queries) + 1
        self.queries += list(x)
        lead = self.model(x)
        return torch.where((number >= self.wrong_at)[:, None], torch.tensor([-1.0, 1.0]).to(lead), lead)


def test_the_estimate_turns_to_the_gradient_as_pairs_are_added():
    """On a quadratic, whose antithetic differences are exact: the cosine is about sqrt(q / (q + d))."""
    x, y = images(6), torch.zeros(6, dtype=torch.int64)
    model, size = Bowl(images(1, seed=9) + 1), 192
    gradient = 2 * (x - model.centre)
    for q in (4, 64, 1024):
        attack = NES(q=q, rel_step=0.1)
        x_adv, _ = run(attack, x, y, model, norm="l2", eps=0.5, budget=2 * q + 1)
        cosine = nn.functional.cosine_similarity((x - x_adv).flatten(1), gradient.flatten(1))
        assert torch.allclose(cosine.mean(), torch.tensor(q / (q + size)).sqrt().double(), atol=0.08)
        assert torch.allclose((x - x_adv).flatten(1).norm(dim=1), torch.tensor(0.05).double(), atol=1e-6)


def test_probes_are_opposite_and_eta_long_and_each_step_asks_for_its_result():
    x, model = images(1), Recording(Bowl(torch.ones(3, 8, 8).double() * 2))
    run(NES(eta=0.02, q=5), x, torch.zeros(1, dtype=torch.int64), model, norm="linf", eps=0.1, budget=22)
    first, second = model.queries[:11], model.queries[11:]
    for centre, probes in [(x[0], first[:10]), (first[10], second[:10])]:
        for plus, minus in zip(probes[::2], probes[1::2], strict=True):
            assert torch.allclose(plus + minus, 2 * centre, atol=1e-9)
            assert (plus - centre).norm() == pytest.approx(0.02, rel=0.25)  # 1 / sqrt(2 d) is 5 %
    assert ((first[10] - x[0]).abs() - 0.025).abs().max() < 1e-9  # a quarter of the radius in each pixel
    assert len({tuple(query.flatten().tolist()) for query in model.queries}) == 22


def test_directions_depend_neither_on_the_batch_nor_on_the_memory():
    x = torch.zeros(40, 3, 32, 32)
    rng = SampleRng.create(0, torch.arange(40), "attack")
    parts = list(directions(rng, x, 20, 2))
    assert len(parts) == 2  # 17 and 3
    together = torch.cat(parts, dim=1)
    assert torch.allclose(together.flatten(2).norm(dim=2), torch.ones(40, 20), atol=0.06)
    row = torch.tensor([7])
    assert torch.equal(torch.cat(list(directions(rng[row], x[row], 20, 1)), dim=1), together[row])


def reference(model, x, y, norm, eps, budget, q, loss, rng, eta=0.01):
    """The first hit of one image (C, H, W), probe by probe."""

    def legal(image):
        delta = image - x
        delta = delta.clamp(-eps, eps) if norm == "linf" else delta * min(1.0, eps / (delta.norm().item() + 1e-12))
        return (x + delta).clamp(0, 1)

    def ask(image):
        nonlocal queries, hit
        logits = model(image[None])
        queries += 1
        if hit == NEVER and margin(logits, y).item() < 0:
            hit = queries
        return LOSSES[loss](logits, y).item()

    u, queries, hit, step, gradient = x, 0, NEVER, 0, torch.zeros_like(x)
    while queries < budget and hit == NEVER:
        pairs = min(q, (budget - queries - 1) // 2)
        if pairs:
            gradient = torch.zeros_like(x)
        for pair in range(pairs):
            noise = rng.fork(step).fork(pair).normal(*x.shape)[0].double() / math.sqrt(x.numel())
            plus, minus = legal(u + eta * noise), legal(u - eta * noise)
            gradient += (ask(plus) - ask(minus)) / (2 * eta) * (plus - minus) / (2 * eta)
        way = gradient.sign() / 4 if norm == "linf" else gradient / (gradient.norm() + 1e-12) / 2
        u = legal(u - eps * way)
        ask(u)
        step += 1
    return hit


@pytest.mark.parametrize(
    ("norm", "eps", "q", "loss"), [("linf", 0.025, None, "margin"), ("l2", 0.11, None, "ce"), ("linf", 0.025, 7, "ce")]
)
def test_it_agrees_with_a_plain_reference(norm, eps, q, loss):
    model, x, budget = Linear((3, 4, 4), 5), images(8, (3, 4, 4)), 150
    x[:2] = x[:2].round()  # some at the box
    y = model(x).argmax(1)
    _, ledger = run(NES(q=q, loss=loss), x, y, model, norm=norm, eps=eps, budget=budget)
    streams = [SampleRng.create(0, torch.tensor([i]), "attack") for i in range(8)]
    q = q or {"linf": 20, "l2": 4}[norm]
    expected = [reference(model, x[i], y[i : i + 1], norm, eps, budget, q, loss, streams[i]) for i in range(8)]
    assert ledger.first_hit.tolist() == expected
    assert len(set(expected)) > 3
    assert NEVER in expected


@pytest.mark.parametrize(("factor", "falls"), [(1.05, True), (0.95, False)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_boundary_is_reached_and_never_beaten(norm, factor, falls):
    model, x = Linear((1, 4, 4)), images(1, (1, 4, 4))
    y = model(x).argmax(1)
    weight = (model.weight[0] - model.weight[1]).norm(p={"linf": 1, "l2": 2}[norm])
    eps = factor * (margin(model(x), y) / weight).item()
    _, ledger = run(NES(q=64, eta=0.001), x, y, model, norm=norm, eps=eps, budget=129 * 10)
    assert (ledger.first_hit[0] != NEVER) == falls


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 40, 41, 42, 43, 44, 60])
def test_the_budget_is_spent_exactly(budget):
    x = images(3, (1, 2, 2))
    _, ledger = run(NES(), x, torch.zeros(3, dtype=torch.int64), Bowl(torch.full((1, 2, 2), 2.0)), budget=budget)
    assert ledger.forwards.tolist() == [budget] * 3


@pytest.mark.parametrize("wrong_at", [1, 2, 40, 41, 42, 60])
def test_a_hit_is_counted_where_it_happens(wrong_at):
    x, model = images(1, (1, 2, 2)), Recording(Bowl(torch.full((1, 2, 2), 2.0)), wrong_at)
    _, ledger = run(NES(), x, torch.zeros(1, dtype=torch.int64), model, budget=60)
    assert ledger.first_hit.tolist() == [wrong_at]


def test_no_answer_moves_nothing():
    class Mute(Linear):
        def forward(self, query):
            return super().forward(query) * math.nan

    x = images(2)
    x_adv, ledger = run(NES(), x, torch.zeros(2, dtype=torch.int64), Mute(), budget=60)
    assert torch.equal(x_adv, x)
    assert ledger.invalid.all()


def test_a_wrong_parameter_is_told_what_is_right():
    for settings, message in [
        ({"eta": 0.0}, "above 0"),
        ({"q": 0}, "at least 1"),
        ({"rel_step": -1.0}, "fraction of eps"),
        ({"loss": "hinge"}, "margin, ce"),
    ]:
        with pytest.raises(ConfigError, match=message):
            NES(**settings)
