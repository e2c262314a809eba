"""Boundary attack: a plain walk of one sample, distances on linear models, and how step sizes adapt."""

import math

import pytest
import torch
from torch import nn

from attacks.boundary import SPHERE, Boundary, _Walk
from bench.errors import ConfigError
from bench.norms import lp_norm
from bench.oracle import NEVER
from bench.rng import SampleRng
from tests.problems import Recorded, attack_with, curved, linear_problem, referee


def run(attack, model, x, y, **settings):
    oracle = referee(model, x, y, norm="l2", access="labels", minimal=True, **settings)
    return attack_with(attack, oracle, x, y), oracle.ledger


def plain_adaptation(sph, src, sphere, source, factor):
    """Step sizes and the answers that count from now on, after the answers ``sphere`` and ``source``."""
    if len(sphere) == 100 and not 20 <= sum(sphere) <= 50:
        change = factor if sum(sphere) > 50 else 1 / factor
        sph, src, sphere = sph * change, src * change, []
    if len(source) == 30 and not 3 <= sum(source) <= 7.5:
        src, source = src * (factor if sum(source) > 7.5 else 1 / factor), []
    return sph, src, sphere, source


def plain_walk(model, x, y, stream, eps, budget, attack):
    """The boundary attack on one image (C, H, W), with loops; returns its queries and the nearest distance."""
    queries, nearest = [], [math.inf]

    class Over(Exception):
        pass

    def misclassified(query):
        if len(queries) == budget:
            raise Over
        queries.append(query)
        wrong = model(query[None]).argmax(1).item() != y
        if wrong:
            nearest[0] = min(nearest[0], (query - x).norm().item())
            if (query - x).norm() <= eps + 1e-6:
                raise Over
        return wrong

    def draw(number):
        return stream.fork("start").fork(number).uniform(*x.shape)[0].double()

    try:
        u = draw(0)
        while not misclassified(u):
            u = draw(len(queries))
        noise = u
        for level in range(1, 50):
            blend = x + level / 50 * (noise - x)
            if misclassified(blend):
                u = blend
                break
        sph, src, step, sphere, source = attack.sphere_step, attack.source_step, 1, [], []
        while True:
            r = (u - x).norm()
            e = (x - u) / r
            n = stream.fork("step").fork(step).normal(*x.shape)[0].double()
            n = n - (n * e).sum() * e
            n = n * sph * r / n.norm()
            p = (x + (u - x + n) * (r / (u - x + n).norm())).clamp(0, 1)
            if step % 10 == 0:
                sphere = [*sphere, misclassified(p)][-100:]
            c = (p + src * (x - p)).clamp(0, 1)
            wrong = misclassified(c)
            if wrong and (c - x).norm() < r:
                u = c
            if step % 10 == 0:
                source = [*source, wrong][-30:]
                sph, src, sphere, source = plain_adaptation(sph, src, sphere, source, attack.step_adaptation)
            step += 1
    except Over:
        return queries, nearest[0]


@pytest.mark.parametrize("eps", [0.0, 0.65])
def test_a_plain_walk_of_one_sample_at_a_time_asks_the_same(eps):
    x = torch.rand(6, 1, 5, 5, generator=torch.Generator().manual_seed(4)).double()
    y, attack = curved()(x).argmax(1), Boundary(sphere_step=0.1, source_step=0.05)
    model, settings = Recorded(curved()), {"eps": eps, "budget": 420}  # the first change of a step is at about 330
    _, ledger = run(attack, model, x, y, **settings)
    for i in range(6):
        stream = SampleRng.create(0, torch.tensor([i]), "attack")
        queries, nearest = plain_walk(curved(), x[i], y[i].item(), stream, **settings, attack=attack)
        assert ledger.forwards[i] == len(queries)
        assert ledger.best_distance[i].item() == pytest.approx(nearest)
        if eps == 0:  # no sample drops out
            assert torch.allclose(torch.stack(model.asked)[:, i], torch.stack(queries), atol=1e-9)
    hits = (ledger.first_hit != NEVER).sum()
    assert 1 < hits < 6 if eps else hits == 0  # a radius that some fall to


def test_on_a_linear_model_the_distance_comes_near_the_exact_one():
    model, x, y, exact = linear_problem(norm="l2")
    _, ledger = run(Boundary(sphere_step=0.1, source_step=0.05), model, x, y, eps=0.0, budget=800)
    assert (ledger.best_distance >= exact).all()  # nobody can
    assert (ledger.best_distance <= 1.25 * exact).all()


def test_running_rates_change_the_step_sizes():
    shares = torch.tensor([[0.9, 0.5], [0.05, 0.15], [0.4, 0.05], [0.4, 0.6], [0.15, 0.5], [0.55, 0.2], [0.5, 0.25]])
    attack, n = Boundary(), len(shares)
    x = torch.full((n, 1, 2, 2), 0.5, dtype=torch.float64)
    walk = _Walk(attack, x, torch.zeros(n, dtype=torch.int64), SampleRng.create(0, torch.arange(n), "attack"))
    yes, generator = torch.ones(n, dtype=torch.bool), torch.Generator().manual_seed(0)
    walk.learn(torch.rand_like(x), yes)
    walk.learn(walk.u, yes)
    plain, seen = [(0.01, 0.01, [], [])] * n, set()
    for step in range(1, 4001):
        counts = step % 10 == 0
        assert (walk.phase == SPHERE).all() == counts
        answers = torch.rand(n, 2, generator=generator) < shares
        if counts:
            walk.learn(walk.u, answers[:, 0])
        walk.learn(walk.u, answers[:, 1] if counts else ~answers[:, 1])  # only each tenth step counts
        if counts:
            for i, (sph, src, sphere, source) in enumerate(plain):
                sphere, source = [*sphere, answers[i, 0].item()][-100:], [*source, answers[i, 1].item()][-30:]
                plain[i] = plain_adaptation(sph, src, sphere, source, attack.step_adaptation)
                seen.add((plain[i][0] / sph, plain[i][1] / src))
            assert walk.sphere.tolist() == pytest.approx([row[0] for row in plain])
            assert walk.source.tolist() == pytest.approx([row[1] for row in plain])
    assert {(round(a, 2), round(b, 2)) for a, b in seen} >= {(1.5, 1.5), (0.67, 0.67), (1, 1.5), (1, 0.67), (1, 1)}


def test_a_step_that_does_not_come_closer_is_not_taken():
    x, yes = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64), torch.tensor([True])
    walk = _Walk(Boundary(), x, torch.tensor([0]), SampleRng.create(0, torch.tensor([0]), "attack"))
    for level in (0.4, 0.3, 0.3001, 0.3, 0.2):  # noise, a blend and three steps
        walk.learn(x + level, yes)
    assert torch.equal(walk.u, x + 0.2)
    for level in (0.2, 0.3):
        walk.learn(x - level, yes)
    assert torch.equal(walk.u, x + 0.2)


class Far(nn.Module):
    """Wrong where the l2 distance to grey exceeds ``reach``."""

    def __init__(self, reach):
        super().__init__()
        self.reach = reach

    def forward(self, x):
        wrong = (lp_norm(x - 0.5, "l2") > self.reach).double()
        return torch.stack((1 - wrong, wrong), dim=1)


def test_it_starts_at_the_lowest_misclassified_level_of_noise_and_steps_on_the_sphere():
    model, x = Recorded(Far(0.5)), torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64)
    run(Boundary(sphere_step=0.2, source_step=0.1), model, x, torch.tensor([0]), eps=0.0, budget=40)
    asked = torch.cat(model.asked)
    noise = lp_norm(asked[:1] - x, "l2").item()
    level = math.ceil(50 * 0.5 / noise)
    assert 2 < level < 30
    assert torch.allclose(asked[1 : level + 1], x + torch.arange(1, level + 1).view(-1, 1, 1, 1) / 50 * (asked[:1] - x))
    start, steps = asked[level], asked[level + 1 :]
    assert lp_norm(steps - x, "l2").tolist()[:9] == pytest.approx([0.9 * level / 50 * noise] * 9)  # none is accepted
    assert lp_norm(steps - x, "l2").tolist()[9:11] == pytest.approx([level / 50 * noise, 0.9 * level / 50 * noise])
    sideways = x + (steps[:9] - x) / 0.9
    cosine = ((sideways - x) * (start - x)).flatten(1).sum(dim=1) / (level / 50 * noise) ** 2
    assert cosine.tolist() == pytest.approx([1 / math.sqrt(1 + 0.2**2)] * 9)
    assert len(steps.flatten(1).unique(dim=0)) == len(steps)


def test_a_walk_begins_at_the_noise_itself_where_no_blend_is_misclassified():
    class First(nn.Module):
        """Wrong in the first pass alone."""

        def __init__(self):
            super().__init__()
            self.passes = 0

        def forward(self, x):
            self.passes += 1
            wrong = torch.full((len(x),), float(self.passes == 1), dtype=torch.float64)
            return torch.stack((1 - wrong, wrong), dim=1)

    model, x = Recorded(First()), torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    run(Boundary(), model, x, torch.tensor([0]), eps=0.0, budget=51)
    asked = torch.cat(model.asked)
    share = lp_norm(asked - x, "l2") / lp_norm(asked[:1] - x, "l2")
    assert share[:50].tolist() == pytest.approx([1.0, *[level / 50 for level in range(1, 50)]])
    assert 0.9 < share[50] < 1


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sphere_step": 0.0}, "sphere_step=0"), ({"source_step": 1.0}, "source_step=1"),
        ({"source_step": math.nan}, "source_step=nan"), ({"step_adaptation": 1.0}, "step_adaptation is 1"),
        ({"step_adaptation": math.inf}, "step_adaptation is inf"),
    ],
)  # fmt: skip
def test_a_walk_that_leads_nowhere_is_refused(parameters, message):
    with pytest.raises(ConfigError, match=message):
        Boundary(**parameters)
