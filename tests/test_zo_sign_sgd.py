"""ZO-signSGD: its estimate, what each step asks, a plain reference, and linear models whose distances are known."""

import math

import pytest
import torch
from torch import nn

from attacks.zo_sign_sgd import ZOSignSGD
from bench.errors import ConfigError
from bench.losses import LOSSES, margin
from bench.oracle import NEVER
from bench.rng import SampleRng
from tests.problems import Linear, attack_with, images, referee


def run(attack, x, y, model, **settings):
    oracle = referee(model, x, y, **settings)
    return attack_with(attack, oracle, x, y), oracle.ledger


class Slope(nn.Module):
    """The margin is 100 + weight * (x - 0.5): linear, and never below zero near the middle."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        lead = 100 + ((x - 0.5) * self.weight).flatten(1).sum(dim=1)
        return torch.stack((lead, torch.zeros_like(lead)), dim=1)


class Recording(nn.Module):
    """Another model, which keeps what it was asked; wrong from the ``wrong_at``-th image on."""

    def __init__(self, model, wrong_at=math.inf):
        super().__init__()
        self.model, self.wrong_at, self.queries = model, wrong_at, []

    def forward(self, x):
        number = torch.arange(len(x)) + len(self.queries) + 1
        self.queries += list(x)
        return torch.where((number >= self.wrong_at)[:, None], torch.tensor([-1.0, 1.0]).to(x), self.model(x))


def slope(shape=(3, 8, 8)):
    return Slope(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))


def test_the_signs_turn_to_those_of_the_gradient_as_probes_are_added():
    x, y, model = images(6), torch.zeros(6, dtype=torch.int64), slope()
    agreement = []
    for q in (4, 64, 1024):
        x_adv, _ = run(ZOSignSGD(q=q), x, y, model, norm="linf", eps=0.1, budget=q + 2)
        agreement.append(((x - x_adv).sign() == model.weight.sign()).double().mean().item())
    assert 0.5 < agreement[0] < agreement[1] < agreement[2]
    assert agreement[2] > 0.85


def test_at_the_edge_of_the_ball_the_estimate_still_follows_the_gradient():
    """A ball so small that every probe is cut at one side: the mean shift of the probes must not drown the rest."""
    x, y, model = images(6), torch.zeros(6, dtype=torch.int64), slope()
    attack = ZOSignSGD(q=1024, rel_step=1.0)
    x_adv, _ = run(attack, x, y, model, norm="linf", eps=1e-5, budget=1 + 3 * 1025)
    assert (((x - x_adv).sign() == model.weight.sign()).double().mean(dim=(1, 2, 3)) > 0.75).all()


def test_a_step_asks_for_its_base_once_and_for_q_probes():
    x, model = images(1), Recording(slope())
    run(ZOSignSGD(eta=0.02, q=5), x, torch.zeros(1, dtype=torch.int64), model, norm="linf", eps=0.1, budget=13)
    bases = [model.queries[0], model.queries[6], model.queries[12]]
    assert torch.equal(bases[0], x[0])
    for base, probes in zip(bases, (model.queries[1:6], model.queries[7:12]), strict=False):
        for probe in probes:
            assert (probe - base).norm() == pytest.approx(0.02, rel=0.25)  # 1 / sqrt(2 d) is 5 %
    assert ((bases[1] - bases[0]).abs() - 0.025).abs().max() < 1e-9  # a quarter of the radius in each pixel
    assert len({tuple(query.flatten().tolist()) for query in model.queries}) == 13


def test_l2_steps_go_along_the_sign():
    x = images(2)
    x_adv, _ = run(ZOSignSGD(), x, torch.zeros(2, dtype=torch.int64), slope(), norm="l2", eps=0.4, budget=6)
    assert torch.allclose((x_adv - x).abs(), torch.tensor(0.2 / math.sqrt(192)).double(), atol=1e-9)


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

    u, queries, hit, step, signs = x, 0, NEVER, 0, torch.zeros_like(x)
    while queries < budget and hit == NEVER:
        if step > 0:
            length = eps / 4 if norm == "linf" else eps / 2 / (signs.norm() + 1e-12)
            u = legal(u - length * signs)
        base = ask(u)
        probes = min(q, budget - queries - 1)
        if probes >= 2:
            noises = [rng.fork(step).fork(j).normal(*x.shape)[0].double() / math.sqrt(x.numel()) for j in range(probes)]
            rises = [(ask(legal(u + eta * noise)) - base) / eta for noise in noises]
            mean = sum(rises) / probes if norm == "linf" else 0
            signs = sum((rise - mean) * noise for rise, noise in zip(rises, noises, strict=True)).sign()
        step += 1
    return hit


@pytest.mark.parametrize(
    ("norm", "eps", "q", "loss"), [("linf", 0.025, None, "margin"), ("l2", 0.13, None, "ce"), ("linf", 0.025, 7, "ce")]
)
def test_it_agrees_with_a_plain_reference(norm, eps, q, loss):
    model, x, budget = Linear((3, 4, 4), 5), images(8, (3, 4, 4)), 150
    x[:2] = x[:2].round()  # some at the box
    y = model(x).argmax(1)
    _, ledger = run(ZOSignSGD(q=q, loss=loss), x, y, model, norm=norm, eps=eps, budget=budget)
    streams = [SampleRng.create(0, torch.tensor([i]), "attack") for i in range(8)]
    q = q or {"linf": 20, "l2": 4}[norm]
    expected = [reference(model, x[i], y[i : i + 1], norm, eps, budget, q, loss, streams[i]) for i in range(8)]
    assert ledger.first_hit.tolist() == expected
    assert len(set(expected)) > 3
    assert NEVER in expected


@pytest.mark.parametrize(("factor", "falls"), [(1.05, True), (0.95, False)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_boundary_is_reached_and_never_beaten(norm, factor, falls):
    """In l2, where steps go along signs, of weights equally large."""
    model, x = Linear((1, 4, 4)), images(1, (1, 4, 4))
    if norm == "l2":
        model.weight = model.weight.sign()
        model.weight[1] = -model.weight[0]
    y = model(x).argmax(1)
    weight = (model.weight[0] - model.weight[1]).norm(p={"linf": 1, "l2": 2}[norm])
    eps = factor * (margin(model(x), y) / weight).item()
    _, ledger = run(ZOSignSGD(q=128, eta=0.001), x, y, model, norm=norm, eps=eps, budget=129 * 12)
    assert (ledger.first_hit[0] != NEVER) == falls


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 20, 21, 22, 23, 24, 60])
def test_the_budget_is_spent_exactly(budget):
    x = images(3, (1, 2, 2))
    _, ledger = run(ZOSignSGD(), x, torch.zeros(3, dtype=torch.int64), slope((1, 2, 2)), budget=budget)
    assert ledger.forwards.tolist() == [budget] * 3


@pytest.mark.parametrize("wrong_at", [1, 2, 21, 22, 60])
def test_a_hit_is_counted_where_it_happens(wrong_at):
    x, model = images(1, (1, 2, 2)), Recording(slope((1, 2, 2)), wrong_at)
    _, ledger = run(ZOSignSGD(), x, torch.zeros(1, dtype=torch.int64), model, budget=60)
    assert ledger.first_hit.tolist() == [wrong_at]


def test_no_answer_moves_nothing():
    class Mute(Linear):
        def forward(self, query):
            return super().forward(query) * math.nan

    x = images(2)
    x_adv, ledger = run(ZOSignSGD(), x, torch.zeros(2, dtype=torch.int64), Mute(), budget=60)
    assert torch.equal(x_adv, x)
    assert ledger.invalid.all()


def test_a_wrong_parameter_is_told_what_is_right():
    for settings, message in [
        ({"eta": 0.0}, "above 0"),
        ({"q": 1}, "at least 2"),
        ({"rel_step": -1.0}, "fraction of eps"),
        ({"loss": "hinge"}, "margin, ce"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ZOSignSGD(**settings)
