"""HopSkipJump: a plain search of one sample, distances on linear models, and the constants of its rounds."""

import math

import pytest
import torch
from torch import nn

from attacks.hop_skip_jump import HopSkipJump
from bench.errors import ConfigError
from bench.norms import lp_norm
from bench.oracle import NEVER
from bench.rng import SampleRng
from tests.problems import Recorded, attack_with, curved, linear_problem, referee


def run(attack, model, x, y, **settings):
    oracle = referee(model, x, y, access="labels", minimal=True, **settings)
    return attack_with(attack, oracle, x, y), oracle.ledger


def plain_search(model, x, y, stream, norm, eps, budget, attack):
    """HopSkipJump on one image (C, H, W), with loops; returns its queries and the nearest misclassified distance."""
    d, queries, nearest = x.numel(), [], [math.inf]
    theta = attack.gamma / (d * math.sqrt(d) if norm == "l2" else d * d)

    class Over(Exception):
        pass

    def length(delta, norm):
        return (delta**2).sum().sqrt().item() if norm == "l2" else delta.abs().max().item()

    def misclassified(query):
        if len(queries) == budget:
            raise Over
        queries.append(query)
        wrong = model(query[None]).argmax(1).item() != y
        if wrong:
            nearest[0] = min(nearest[0], length(query - x, norm))
            if length(query - x, norm) <= eps + 1e-6:
                raise Over
        return wrong

    def draw(purpose):
        here = stream.fork(purpose).fork(len(queries))
        if purpose == "probe" and norm == "l2":
            return here.normal(*x.shape)[0].double()
        return here.uniform(*x.shape)[0].double()

    def bisect(point, low, high, width):
        while high - low > width:
            middle = (low + high) / 2
            if misclassified(point(middle)):
                high = middle
            else:
                low = middle
        return point(high)

    def to_boundary(w):
        far = length(w - x, norm)
        if norm == "l2":
            return bisect(lambda a: (1 - a) * x + a * w, 0.0, 1.0, theta), far
        return bisect(lambda a: w.clamp(x - a, x + a), 0.0, far, min(theta, theta * far)), far

    try:
        noise = draw("start")
        while not misclassified(noise):
            noise = draw("start")
        u, dist = to_boundary(bisect(lambda a: (1 - a) * x + a * noise, 0.0, 1.0, 1e-3))
        t = 1
        while True:
            delta = 0.1 if t == 1 else (math.sqrt(d) if norm == "l2" else d) * theta * dist
            signs, offsets = [], []
            for _ in range(min(int(attack.init_evals * math.sqrt(t)), attack.max_evals)):
                n = draw("start") * 2 - 1 if norm == "linf" else draw("probe")
                p = (u + delta * n / length(n, "l2")).clamp(0, 1)
                signs.append(1 if misclassified(p) else -1)
                offsets.append((p - u) / delta)
            mean = sum(signs) / len(signs)
            if abs(mean) == 1:
                mean = 0
            v = sum((sign - mean) * offset for sign, offset in zip(signs, offsets, strict=True))
            v = v / length(v, "l2") if norm == "l2" else v.sign()
            step, tries = length(u - x, norm) / math.sqrt(t), 1
            while not misclassified((u + step * v).clamp(0, 1)):
                step, tries = step / 2, tries + 1
                if tries > 30:
                    step = 0
                    break
            u, dist = to_boundary((u + step * v).clamp(0, 1))
            t += 1
    except Over:
        return queries, nearest[0]


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.0), ("l2", 0.25), ("linf", 0.0), ("linf", 0.1)])
def test_a_plain_search_of_one_sample_at_a_time_asks_the_same(norm, eps):
    x = torch.rand(8, 1, 5, 5, generator=torch.Generator().manual_seed(4)).double()
    y, attack = curved()(x).argmax(1), HopSkipJump(gamma=0.7, init_evals=12, max_evals=20)
    model, settings = Recorded(curved()), {"norm": norm, "eps": eps, "budget": 250}
    _, ledger = run(attack, model, x, y, **settings)
    for i in range(8):
        stream = SampleRng.create(0, torch.tensor([i]), "attack")
        queries, nearest = plain_search(curved(), x[i], y[i].item(), stream, **settings, attack=attack)
        assert ledger.forwards[i] == len(queries)
        assert ledger.best_distance[i].item() == pytest.approx(nearest)
        if eps == 0:  # no sample drops out
            assert torch.allclose(torch.stack(model.asked)[:, i], torch.stack(queries), atol=1e-9)
    hits = (ledger.first_hit != NEVER).sum()
    assert 2 < hits < 8 if eps else hits == 0  # a radius that some fall to


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_on_a_linear_model_the_distance_comes_near_the_exact_one(norm):
    model, x, y, exact = linear_problem(norm=norm)
    _, ledger = run(HopSkipJump(), model, x, y, norm=norm, eps=0.0, budget=700)
    assert (ledger.best_distance >= exact).all()  # nobody can
    assert (ledger.best_distance <= 1.1 * exact).all()


class Noisiness(nn.Module):
    """Wrong where the l2 norm of the distance to grey exceeds ``share`` of what uniform noise has on average."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        wrong = ((x.double() - 0.5).square().mean(dim=(1, 2, 3)) * 12 > self.share**2).double()
        return torch.stack((1 - wrong, wrong), dim=1)


@pytest.mark.parametrize(
    ("norm", "side", "halvings"), [("l2", 32, 18), ("linf", 32, 24), ("l2", 224, 26), ("linf", 224, 35)]
)
def test_a_bisection_takes_the_published_number_of_queries_in_float32(norm, side, halvings):
    model = Recorded(Noisiness(0.6))
    x = torch.full((1, 3, side, side), 0.5)
    run(HopSkipJump(), model, x, torch.tensor([0]), norm=norm, eps=0.0, budget=11 + halvings + 2)
    assert (model.asked[0] - x).abs().max() > 0.49  # noise, and 10 halvings towards the image
    blends = torch.cat(model.asked[1:11])
    share = lp_norm(blends - x, "l2") / lp_norm(model.asked[0] - x, "l2")
    assert share[:4].tolist() == pytest.approx([0.5, 0.75, 0.625, 0.5625])
    wrong = [query for query in model.asked[: 11 + halvings] if model.model(query).argmax(1).item() == 1]
    probes = torch.cat(model.asked[11 + halvings :])
    assert len(probes) == 2
    assert lp_norm(probes - wrong[-1], "l2").tolist() == pytest.approx([0.1, 0.1], rel=1e-3)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_probes_after_the_first_round_follow_the_distance_before_the_bisection(norm):
    model, x, y, _ = linear_problem(n=2, norm=norm)
    recorded = Recorded(model)
    run(HopSkipJump(init_evals=6), recorded, x[:1], y[:1], norm=norm, eps=0.0, budget=120)
    asked = torch.cat(recorded.asked)
    wrong = model(asked).argmax(1) != y[0]
    halvings, d = {"l2": 6, "linf": 8}[norm], 16
    start = wrong.nonzero()[0].item() + 11 + halvings  # the first probe
    for evals in (6, 8, 10, 12):  # int(6 sqrt(t))
        step = start + evals + wrong[start + evals :].nonzero()[0].item()  # the first misclassified step
        before = lp_norm(asked[step : step + 1] - x[0], norm)
        nearer = asked[step : step + 1 + halvings][wrong[step : step + 1 + halvings]][-1]
        start = step + 1 + halvings
        assert lp_norm(asked[start : start + 1] - nearer, "l2").item() == pytest.approx(before.item() / d)


def test_a_step_that_never_succeeds_is_halved_thirty_times_and_no_more():
    class Once(nn.Module):
        """Wrong for the first image and all that lie on the way from it to grey, until probes begin."""

        def __init__(self):
            super().__init__()
            self.passes = 0

        def forward(self, x):
            self.passes += 1
            wrong = torch.full((len(x),), float(self.passes <= 1 + 10 + 7), dtype=torch.float64)
            return torch.stack((1 - wrong, wrong), dim=1)

    model, x = Recorded(Once()), torch.full((1, 1, 5, 5), 0.5, dtype=torch.float64)
    run(HopSkipJump(init_evals=5), model, x, torch.tensor([0]), norm="l2", eps=0.0, budget=61)
    asked = torch.cat(model.asked)
    u = asked[17]
    steps = lp_norm(asked[23:53] - u, "l2")
    assert steps.tolist() == pytest.approx([lp_norm(u[None] - x, "l2").item() / 2**k for k in range(30)])
    assert torch.allclose(asked[53], (u + x[0]) / 2)  # bisects from where it stood
    assert lp_norm(asked[60:] - u, "l2").item() == pytest.approx(lp_norm(u[None] - x, "l2").item() / 25)  # probes again


def test_without_a_misclassified_image_only_noise_is_asked():
    model, x = Recorded(Noisiness(math.inf)), torch.full((2, 1, 3, 3), 0.5, dtype=torch.float64)
    x_adv, ledger = run(HopSkipJump(), model, x, torch.tensor([0, 0]), eps=0.1, budget=40)
    asked = torch.stack(model.asked)
    assert asked.shape == (40, 2, 1, 3, 3)
    assert len(asked.flatten(0, 1).flatten(1).unique(dim=0)) == 80
    assert abs(asked.mean().item() - 0.5) < 4 / math.sqrt(12 * asked.numel())
    assert torch.equal(x_adv, x)
    assert ledger.best_distance.isinf().all()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"gamma": 0.0}, "gamma is"), ({"gamma": math.inf}, "gamma is"), ({"gamma": math.nan}, "gamma is"),
        ({"init_evals": 0}, "init_evals=0"), ({"init_evals": 30, "max_evals": 20}, "max_evals=20"),
    ],
)  # fmt: skip
def test_what_estimates_nothing_is_refused(parameters, message):
    with pytest.raises(ConfigError, match=message):
        HopSkipJump(**parameters)
