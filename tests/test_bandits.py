"""Bandits: its probes, its prior, a plain reference, and linear models whose distances are known."""

import math

import pytest
import torch
from torch import nn

from attacks.bandits import PRESETS, Bandits
from bench.errors import ConfigError
from bench.losses import LOSSES, margin
from bench.oracle import NEVER
from bench.rng import SampleRng
from bench.threat import Threat
from tests.problems import Linear, Scripted, attack_with, images, referee


def run(attack, x, y, model, **settings):
    oracle = referee(model, x, y, **settings)
    return attack_with(attack, oracle, x, y), oracle.ledger


class Slope(nn.Module):
    """The margin is lead + weight * (x - 0.5): linear, and never below zero near the middle. Keeps its queries."""

    def __init__(self, weight, lead=100):
        super().__init__()
        self.weight, self.lead, self.queries = weight, lead, []

    def forward(self, x):
        self.queries.append(x)
        lead = self.lead + ((x - 0.5) * self.weight).flatten(1).sum(dim=1)
        return torch.stack((lead, torch.zeros_like(lead)), dim=1)


def slope(shape=(3, 8, 8)):
    return Slope(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))


class TestProbes:
    def test_a_step_asks_two_probes_eta_long_and_its_result(self):
        model, x = slope(), images(4)
        run(Bandits(eta=0.02), x, torch.zeros(4, dtype=torch.int64), model, eps=0.1, budget=6)
        assert [len(queries) for queries in model.queries] == [8, 4, 8, 4]
        centre = x
        for probes, after in (model.queries[:2], model.queries[2:]):
            length = (probes.view(4, 2, 3, 8, 8) - centre[:, None]).flatten(2).norm(dim=2)
            assert torch.allclose(length, torch.tensor(0.02).double(), atol=1e-9)
            centre = after
        first = model.queries[0].view(4, 2, 3, 8, 8)
        assert torch.allclose(first.sum(dim=1), 2 * x, atol=1e-9)  # without a prior they are opposite
        assert torch.allclose((model.queries[1] - x).abs(), torch.tensor(0.025).double(), atol=1e-9)

    def test_at_the_surface_of_the_linf_ball_they_stay_as_long_and_as_different(self):
        model, x = slope(), images(4)
        attack = Bandits(eta=0.02, rel_step=1.0, exploration=0.1, prior_rate=10.0)
        run(attack, x, torch.zeros(4, dtype=torch.int64), model, eps=0.1, budget=6)
        assert torch.allclose((model.queries[1] - x).abs(), torch.tensor(0.1).double(), atol=1e-9)
        plus, minus = model.queries[2].view(4, 2, 3, 8, 8).unbind(dim=1)
        prior, noise, centre = first_prior(attack, model), attack_noise(attack, 4, step=1), model.queries[1]
        ways = torch.stack((prior + noise, prior - noise))
        ways = 0.02 * ways / ways.flatten(2).norm(dim=2)[..., None, None, None]
        assert torch.allclose(plus - minus, ways[0] - ways[1], atol=1e-9)
        assert ((plus - centre).abs() <= 2 * ways.abs().amax(dim=0) + 1e-9).all()  # moved no further than needed

    def test_noise_is_of_the_length_that_each_source_gives_it(self):
        """BlackboxBench: 0.1 in each value of the prior; SignHunter and the authors divide by its root size."""
        for settings, size, each in [
            (PRESETS[None]["linf"], 3 * 20 * 20, 0.1),
            (PRESETS[None]["l2"], 3 * 20 * 20, 0.1 / math.sqrt(1200)),
            (PRESETS["iclr2019"]["linf"], 3 * 50 * 50, 1 / math.sqrt(7500)),
        ]:
            assert settings["exploration"] / math.sqrt(size) == pytest.approx(each)

    def test_the_prior_moves_as_far_as_in_each_source(self):
        """For a unit normal draw z, and losses one apart; the two codes put z, or z / root size, in the estimate."""
        linf, l2 = PRESETS[None]["linf"], PRESETS[None]["l2"]
        root = math.sqrt(1200)
        assert linf["prior_rate"] / (linf["eta"] * root) == pytest.approx(0.1 / 255 / (0.01 * 0.1))
        assert l2["prior_rate"] / (l2["eta"] * root) == pytest.approx(1e-5 / 255 / (0.01 * 0.1) / root)


def attack_noise(attack, n, step, shape=(3, 8, 8)):
    rng = SampleRng.create(0, torch.arange(n), "attack").fork(step)
    return attack.exploration * rng.normal(*shape).double() / math.sqrt(math.prod(shape))


def first_prior(attack, model):
    """The linf prior after the first step, from the queries of that step."""
    plus, minus = model.queries[0].view(4, 2, 3, 8, 8).unbind(dim=1)
    fall = ((minus - plus) * model.weight).sum(dim=(1, 2, 3), keepdim=True) / (0.02 * attack.exploration)
    return (attack.prior_rate * fall * attack_noise(attack, 4, step=0)).tanh()


def reference(attack, model, x, y, norm, eps, budget, rng):
    """The first hit of one image (C, H, W), by the book: the prior's own multiplicative update, nearest upsampling."""
    s = attack._settings(norm)
    height, width = x.shape[1:]
    rows, columns = min(s["side"], height), min(s["side"], width)
    v = torch.zeros(x.shape[0], rows, columns, dtype=torch.float64)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)

    def up(prior):
        image = torch.empty_like(x)
        for i in range(height):
            for j in range(width):
                image[:, i, j] = prior[:, i * rows // height, j * columns // width]
        return image

    def legal(image):
        if norm == "linf":
            return torch.minimum(torch.maximum(image, low), high)
        delta = image - x
        return (x + delta * min(1.0, eps / (delta.norm().item() + 1e-12))).clamp(0, 1)

    def ask(image):
        nonlocal queries, hit
        logits = model(image[None])
        queries += 1
        if hit == NEVER and margin(logits, y).item() < 0:
            hit = queries
        return LOSSES[s["loss"]](logits, y).item()

    u, queries, hit, step = x, 0, NEVER, 0
    while queries < budget and hit == NEVER:
        if budget - queries >= 3:
            n = s["exploration"] * rng.fork(step).normal(*v.shape)[0].double() / math.sqrt(v.numel())
            ways = [s["eta"] * up(v + sign * n) / (up(v + sign * n).norm() + 1e-12) for sign in (1, -1)]
            base = u
            if norm == "linf":
                reach = torch.maximum(ways[0].abs(), ways[1].abs())
                base = torch.minimum(torch.maximum(u, low + reach), high - reach)
                base = torch.where(low + reach > high - reach, (low + high) / 2, base)
            plus, minus = (ask(legal(base + way)) for way in ways)
            g = (minus - plus) / (s["eta"] * s["exploration"]) * n
            if norm == "linf":
                a, k = (v + 1) / 2, s["prior_rate"]
                v = 2 * a * (k * g).exp() / (a * (k * g).exp() + (1 - a) * (-k * g).exp()) - 1
            else:
                v = v + s["prior_rate"] * g
        way = up(v).sign() if norm == "linf" else up(v) / (up(v).norm() + 1e-12)
        u = legal(u + s["rel_step"] * eps * way)
        ask(u)
        step += 1
    return hit


@pytest.mark.parametrize(
    ("norm", "eps", "settings"),
    [
        ("linf", 0.03, {"side": 3}),
        ("linf", 0.03, {"loss": "ce", "eta": 0.1, "prior_rate": 1.0}),
        ("l2", 0.15, {"side": 2}),
        ("l2", 0.11, {"preset": "iclr2019"}),
    ],
)
def test_it_agrees_with_a_plain_reference(norm, eps, settings):
    attack = Bandits(**settings)
    model, x, budget = Linear((3, 4, 5), 5), images(8, (3, 4, 5)), 150
    x[:2] = x[:2].round()  # some at the box
    y = model(x).argmax(1)
    _, ledger = run(attack, x, y, model, norm=norm, eps=eps, budget=budget)
    streams = [SampleRng.create(0, torch.tensor([i]), "attack") for i in range(8)]
    expected = [reference(attack, model, x[i], y[i : i + 1], norm, eps, budget, streams[i]) for i in range(8)]
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
    attack = Bandits(eta=0.001, exploration=0.1, prior_rate=1e-4)
    _, ledger = run(attack, x, y, model, norm=norm, eps=eps, budget=1500)
    assert (ledger.first_hit[0] != NEVER) == falls


@pytest.mark.parametrize("preset", [None, "iclr2019", "unig"])
def test_a_confident_network_leaves_a_finite_prior(preset):
    """Losses far apart at k = 100: where the update of the paper would divide infinity by infinity."""
    model, x = Slope(slope().weight * 1e6, lead=1e9), images(2)
    attack, y = Bandits(preset=preset, loss="margin"), torch.zeros(2, dtype=torch.int64)
    x_adv, ledger = run(attack, x, y, model, eps=1e-5, budget=30)
    assert x_adv.isfinite().all()
    assert (x_adv != x).any()
    assert ledger.forwards.tolist() == [30, 30]


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 60])
def test_the_budget_is_spent_exactly(budget):
    x = images(3, (1, 2, 2))
    _, ledger = run(Bandits(), x, torch.zeros(3, dtype=torch.int64), slope((1, 2, 2)), budget=budget)
    assert ledger.forwards.tolist() == [budget] * 3


@pytest.mark.parametrize(("call", "hit"), [(1, 1), (2, 3), (3, 4), (4, 6)])
def test_a_hit_is_counted_where_it_happens(call, hit):
    """A step makes two calls, for two probes and for the image they lead to."""
    x = images(2, (1, 2, 2))
    _, ledger = run(Bandits(), x, torch.zeros(2, dtype=torch.int64), Scripted(call), budget=60)
    assert ledger.first_hit.tolist() == [hit] * 2


def test_a_prior_larger_than_the_image_is_as_large_as_the_image():
    x, y = images(3), torch.zeros(3, dtype=torch.int64)
    pictures = [run(Bandits(side=side), x, y, slope(), eps=0.1, budget=30)[0] for side in (7, 8, 50)]
    assert torch.equal(pictures[1], pictures[2])
    assert not torch.equal(pictures[0], pictures[1])


def test_no_answer_moves_nothing():
    class Mute(Linear):
        def forward(self, query):
            return super().forward(query) * math.nan

    x = images(2)
    x_adv, ledger = run(Bandits(), x, torch.zeros(2, dtype=torch.int64), Mute(), budget=60)
    assert torch.equal(x_adv, x)
    assert ledger.invalid.all()


def test_presets_are_those_of_the_sources():
    linf = Bandits(preset="iclr2019")._settings("linf")
    assert linf == {"eta": 0.1, "rel_step": 0.2, "prior_rate": 100, "exploration": 1, "side": 50, "loss": "ce"}
    unig = Bandits(preset="unig")
    assert unig.norms == {"linf"}
    assert unig._settings("linf")["rel_step"] * Threat("linf", 8 / 255, "scores", 1).eps == pytest.approx(0.01)
    assert Bandits(preset="unig", loss="margin", eta=0.3)._settings("linf") == {
        **unig._settings("linf"), "loss": "margin", "eta": 0.3
    }  # fmt: skip


def test_a_wrong_parameter_is_told_what_is_right():
    for settings, message in [
        ({"preset": "icml"}, "iclr2019, unig"),
        ({"eta": 0.0}, "above 0"),
        ({"rel_step": -1.0}, "fraction of eps"),
        ({"prior_rate": -1.0}, "zero or more"),
        ({"exploration": 0.0}, "above 0"),
        ({"side": 0}, "at least one row"),
        ({"loss": "hinge"}, "margin, ce"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Bandits(**settings)
