"""SimBA: its bases, the length of its steps, a plain reference, and linear models whose distances are known."""

import math

import pytest
import torch

from attacks.simba import SimBA, _add, cosines
from bench.errors import ConfigError
from bench.losses import LOSSES, margin
from bench.norms import lp_norm
from bench.oracle import NEVER
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Threat
from tests.problems import Linear, Scripted, attack_with, images, referee


def run(attack, x, y, model, **settings):
    oracle = referee(model, x, y, **settings)
    return attack_with(attack, oracle, x, y), oracle.ledger


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_the_basis_is_orthonormal(basis):
    blank = torch.zeros(1, 2, 5, 7, dtype=torch.float64).expand(70, -1, -1, -1)
    vectors = _add(blank, torch.arange(70), torch.ones(70).double(), SimBA(basis=basis)._waves(blank)).flatten(1)
    assert torch.allclose(vectors @ vectors.T, torch.eye(70).double(), atol=1e-6)


def test_the_waves_are_the_cosine_transform_of_an_independent_library():
    from scipy.fft import dct

    for size in (1, 2, 7, 32):
        expected = torch.from_numpy(dct(torch.eye(size).double().numpy(), axis=0, norm="ortho"))
        assert torch.allclose(cosines(size), expected, atol=1e-12)


def test_low_frequencies_come_first_then_ring_by_ring():
    x = torch.zeros(3, 2, 12, 10)
    order = SimBA(freq_dims=4, stride=3)._order(x, SampleRng.create(0, torch.arange(3), "a"), 1000)
    assert torch.equal(order.sort(dim=1).values, torch.arange(240).expand(3, -1))
    assert not torch.equal(order[0], order[1])  # an order for each sample by itself
    highest = torch.maximum(order // 10 % 12, order % 10)
    counts = [(0, 32), (4, 2 * (49 - 16)), (7, 2 * (100 - 49)), (10, 2 * 20)]
    start = 0
    for lowest, count in counts:
        ring = highest[:, start : start + count]
        assert ring.min() >= lowest
        assert ring.max() < (lowest + 3 if lowest else 4)
        start += count
    assert start == 240
    pixel = SimBA(basis="pixel", freq_dims=4)._order(x, SampleRng.create(0, torch.arange(3), "a"), 50)
    assert pixel.shape == (3, 50)
    assert torch.maximum(pixel // 10 % 12, pixel % 10)[:, :32].max() >= 4


def test_the_step_is_the_published_one():
    steps = [("linf", 8 / 255, 0.2), ("l2", 0.5, 0.1), ("l2", 1.0, 0.2), ("l2", 5.0, 0.2)]
    for norm, eps, step in steps:
        assert SimBA()._step(Threat(norm, eps, "scores", 1)) == step
    assert SimBA(step=0.3)._step(Threat("l2", 0.5, "scores", 1)) == 0.3


def test_a_wrong_parameter_is_told_what_is_right():
    for settings, message in [
        ({"basis": "wavelet"}, "use pixel or dct"),
        ({"step": 0.0}, "above 0"),
        ({"freq_dims": 0}, "at least 1"),
        ({"loss": "hinge"}, "margin, ce"),
    ]:
        with pytest.raises(ConfigError, match=message):
            SimBA(**settings)


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_the_length_counts_the_accepted_steps(basis):
    """Orthonormal steps away from ball and box: the norm is step * sqrt(accepted), query by query."""
    step, leads, queries = 0.01, [], []

    class Watch(Linear):
        def forward(self, query):
            logits = super().forward(query)
            queries.append(query)
            leads.append(margin(logits, y))
            return logits

    x = images(5)
    y = Linear()(x).argmax(1)
    oracle = referee(Watch(), x, y, norm="l2", eps=5.0, budget=60)
    x_adv = SimBA(basis=basis, step=step)(oracle, x, y, oracle.threat, SampleRng.create(0, torch.arange(5), "a"))
    assert (oracle.ledger.first_hit == NEVER).all()
    best, accepted = leads[0], torch.zeros(5)
    for lead, query in zip(leads[1:], queries[1:], strict=True):
        assert torch.allclose(lp_norm(query - x, "l2"), step * (accepted + 1).sqrt().double(), atol=1e-9)
        accepted += lead < best
        best = torch.minimum(lead, best)
    assert torch.allclose(lp_norm(x_adv - x, "l2"), step * accepted.sqrt().double(), atol=1e-9)
    assert accepted.min() > 20


def reference(attack, model, x, y, norm, eps, budget, rng):
    """The first hit of one image (C, H, W), by the book: it walks unbounded and asks about projections."""
    height, width = x.shape[1:]
    order = attack._order(x[None], rng.fork("order"), budget)[0].tolist()
    step = 0.2 if norm == "linf" else min(0.2, eps / 5)

    def vector(number):
        image = torch.zeros_like(x)
        c, a, b = number // (height * width), number // width % height, number % width
        if attack.basis == "pixel":
            image[c, a, b] = 1
            return image
        for i in range(height):
            for k in range(width):
                scale = math.sqrt((2 if a else 1) / height) * math.sqrt((2 if b else 1) / width)
                down = math.cos(math.pi * (2 * i + 1) * a / (2 * height))
                image[c, i, k] = scale * down * math.cos(math.pi * (2 * k + 1) * b / (2 * width))
        return image

    def ask(image):
        logits = model(image[None])
        return LOSSES[attack.loss](logits, y).item(), margin(logits, y).item() < 0

    u, queries = x, 1
    best, _ = ask(x)
    while True:
        for number in order:
            for sign in (-1, 1):
                if queries == budget:
                    return NEVER
                candidate = u + sign * step * vector(number)
                delta = candidate - x
                delta = delta.clamp(-eps, eps) if norm == "linf" else delta * min(1.0, eps / (delta.norm() + 1e-12))
                value, hit = ask((x + delta).clamp(0, 1))
                queries += 1
                if hit:
                    return queries
                if value < best:
                    u, best = candidate, value
                    break


@pytest.mark.parametrize("basis", ["pixel", "dct"])
@pytest.mark.parametrize(
    ("norm", "eps", "loss"), [("linf", 0.02, "margin"), ("l2", 0.17, "ce"), ("linf", 0.02, "prob")]
)
def test_it_agrees_with_a_plain_reference(basis, norm, eps, loss):
    attack = SimBA(basis=basis, freq_dims=2, stride=1, loss=loss)
    model, x, budget = Linear((3, 4, 4), 5), images(8, (3, 4, 4)), 130  # more than one walk along the basis
    x[:2] = x[:2].round()  # some at the box
    y = model(x).argmax(1)
    _, ledger = run(attack, x, y, model, norm=norm, eps=eps, budget=budget)
    streams = [SampleRng.create(0, torch.tensor([i]), "attack") for i in range(8)]
    expected = [reference(attack, model, x[i], y[i : i + 1], norm, eps, budget, streams[i]) for i in range(8)]
    assert ledger.first_hit.tolist() == expected
    assert len(set(expected)) > 3
    assert NEVER in expected


def test_the_probability_saturates_where_the_margin_still_moves():
    class Sure(Linear):
        def forward(self, query):
            return 1000 * super().forward(query).float()

    x = images(4)
    y = Linear()(x).argmax(1)
    moved = {}
    for loss in ("margin", "prob"):
        oracle = referee(Sure(), x, y, eps=0.005, budget=60)
        moved[loss] = (attack_with(attacks.create(f"simba(loss={loss})"), oracle, x, y) != x).flatten(1).any(dim=1)
    assert moved["margin"].all()
    assert not moved["prob"].any()


@pytest.mark.parametrize(("factor", "falls"), [(1.05, True), (0.95, False)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_boundary_is_reached_and_never_beaten(norm, factor, falls):
    """Pixel by pixel to the corner that the weights ask for; in l2 with 25 equal weights, as many as steps fit in."""
    model = Linear()
    if norm == "l2":
        model.weight = model.weight.sign()
        model.weight[:, 25:] = 0
        model.weight[1] = -model.weight[0]
    x = images(1)
    y = model(x).argmax(1)
    weight = (model.weight[0] - model.weight[1]).norm(p={"linf": 1, "l2": 2}[norm])
    eps = factor * (margin(model(x), y) / weight).item()
    _, ledger = run(SimBA(basis="pixel"), x, y, model, norm=norm, eps=eps, budget=1 + 2 * 192)
    assert (ledger.first_hit[0] != NEVER) == falls


def test_the_budget_is_spent_exactly_and_a_hit_is_counted_where_it_happens():
    x, y = images(3, (1, 3, 3)), torch.zeros(3, dtype=torch.int64)
    _, ledger = run(SimBA(), x, y, Scripted(math.inf), budget=41)
    assert ledger.forwards.tolist() == [41] * 3
    _, ledger = run(SimBA(), x, y, Scripted(23), budget=41)
    assert ledger.first_hit.tolist() == [23] * 3


def test_no_answer_is_never_an_improvement():
    class Mute(Linear):
        def forward(self, query):
            return super().forward(query) * math.nan

    x = images(2)
    x_adv, ledger = run(SimBA(), x, torch.zeros(2, dtype=torch.int64), Mute(), budget=20)
    assert torch.equal(x_adv, x)
    assert ledger.invalid.all()
