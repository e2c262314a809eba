"""APGD: the same points as a scalar version that follows the paper line by line, and its costs."""

import math

import pytest
import torch

from attacks.apgd import APGD, checkpoints, start
from attacks.apgd_t import TargetedAPGD, rivals
from bench.errors import ConfigError
from bench.losses import log_likelihood, targeted_dlr
from bench.norms import lp_norm
from bench.oracle import NEVER
from bench.rng import SampleRng
from bench.threat import Threat
from tests.problems import Linear, Noisy, Recorded, Scripted, asks_for, attack_with, curved, images, referee


def test_step_sizes_are_looked_at_where_the_paper_says():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(10) == [2, 3, 4, 5, 6, 7, 8, 9, 10]


def ball(u, x, norm, eps):
    """The nearest point by plain arithmetic; l1 by bisection of the cut."""
    if norm == "linf":
        return torch.clamp(torch.minimum(torch.maximum(u, x - eps), x + eps), 0, 1)
    if norm == "l2":
        length = (u - x).norm().item()
        return torch.clamp(x + (u - x) * min(1.0, eps / (length + 1e-12)), 0, 1)
    room = torch.where(u > x, 1 - x, x)

    def left(cut):
        return torch.minimum(((u - x).abs() - cut).clamp(min=0), room)

    if left(0).sum() <= eps:
        return x + (u - x).sign() * left(0)
    low, high = 0.0, (u - x).abs().max().item()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle).sum() > eps else (low, middle)
    return x + (u - x).sign() * left(high)


def reference(model, x, y, loss, norm, eps, steps, u):
    """Every point of one run on one image (C, H, W), by Algorithm 1 of arXiv:2003.01690 in plain loops."""

    def ask(u):
        u = u.clone().requires_grad_(True)
        value = loss(model(u[None]), y[None])[0]
        return -value.item(), -torch.autograd.grad(value, u)[0]

    def unit(g):
        return g.sign() if norm == "linf" else g / (g.norm() + 1e-12)

    asked, (f, g) = [u], ask(u)
    values, best, f_best, g_best, size, before = [f], u, f, g, 2 * eps, u
    marks = list[int]()
    gap, at = max(int(0.22 * steps), 1), 0
    while at + gap <= steps:
        at += gap
        marks.append(at)
        gap = max(gap - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    sizes, bests, last = [size], [f_best], 0
    for k in range(1, steps + 1):
        z = ball(u + size * unit(g), x, norm, eps)
        step = z if k == 1 else ball(u + 0.75 * (z - u) + 0.25 * (u - before), x, norm, eps)
        before, u = u, step
        f, g = ask(u)
        asked.append(u)
        values.append(f)
        if f > f_best:
            best, f_best, g_best = u, f, g
        if k in marks:
            rises = sum(values[i + 1] > values[i] for i in range(last, k))
            halve = rises <= 0.75 * (k - last) or (len(sizes) > 1 and sizes[-1] == sizes[-2] and f_best <= bests[-1])
            sizes.append(size / 2 if halve else size)
            bests.append(f_best)
            last = k
            if halve:
                size, u, g = size / 2, best, g_best
    return asked


def sparse_reference(model, x, y, loss, eps, steps, u, wide=False):
    """As :func:`reference`, for the sparse steps of arXiv:2103.01208, and the best point; ``u`` is in a wide start."""

    def ask(u):
        u = u.clone().requires_grad_(True)
        value = loss(model(u[None]), y[None])[0]
        return -value.item(), -torch.autograd.grad(value, u)[0]

    d = x.numel()
    asked, (f, g) = [u], ask(u)
    best, f_best, g_best, size, share, moved = u, f, g, eps, 0.2, d
    if wide:
        moved = int((u != x).sum())
        share = moved / d / 1.5
    every = max(int(0.04 * steps), 1)
    for k in range(1, steps + 1):
        ranked = sorted(g.abs().flatten().tolist())
        least = ranked[min(max(int((1 - share) * d), 0), d - 1)]
        signs = torch.where(g.abs() >= least, g.sign(), 0)
        u = ball(u + size * signs / signs.abs().sum().clamp(min=1), x, "l1", eps)
        f, g = ask(u)
        asked.append(u)
        if f > f_best:
            best, f_best, g_best = u, f, g
        if k % every == 0:
            now = int((best != x).sum())
            share = now / d / 1.5
            if now < 0.95 * moved:
                size, u, g = eps, best, g_best
            else:
                size = max(size / 1.5, eps / 10)
            moved = now
    return asked, best


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.002), ("l2", 0.008), ("l1", 0.02)])
@pytest.mark.parametrize("targeted", [False, True])
def test_every_point_is_that_of_the_plain_algorithm(norm, eps, targeted):
    """At a radius where nothing falls; in l1 until points come back, where a rounding error says which was better."""
    model, x = curved(), images(3, (1, 5, 5))
    y, steps, compared = model(x).argmax(1), 32, 9 if norm == "l1" else 33
    recorded = Recorded(model)
    oracle = referee(recorded, x, y, norm=norm, eps=eps, access="gradients", budget=1000)
    attack = TargetedAPGD(steps=steps, targets=1) if targeted else APGD(steps=steps)
    attack_with(attack, oracle, x, y)
    stood = (oracle.ledger.first_hit == NEVER).nonzero().squeeze(1)
    assert len(stood) == 3
    rng = SampleRng.create(0, torch.arange(3), "attack").fork(0)
    rng = rng.fork(0) if targeted else rng
    begun = start(x, Threat(norm, eps, "gradients", 1), rng)
    target = model(x).scatter(1, y[:, None], -math.inf).argmax(1)
    asked = recorded.asked[1:] if targeted else recorded.asked
    assert len(asked) == steps + 1
    for i in range(3):
        loss = log_likelihood
        if targeted:
            loss = lambda z, labels, aim=target[i : i + 1]: targeted_dlr(z, labels, aim)  # noqa: E731
        if norm == "l1":
            expected = sparse_reference(model, x[i], y[i], loss, eps, steps, begun[i])[0]
        else:
            expected = reference(model, x[i], y[i], loss, norm, eps, steps, begun[i])
        met = torch.stack([batch[i] for batch in asked[:compared]])
        torch.testing.assert_close(met, torch.stack(expected[:compared]), rtol=0, atol=1e-8)


def test_a_wide_start_goes_through_three_balls():
    """Its points are those of three plain runs, each from the best point of the one before."""
    model, x, eps, steps = curved(), images(3, (1, 5, 5)), 0.004, 20
    y = model(x).argmax(1)
    recorded = Recorded(model)
    attack = APGD(steps=steps, wide_start=True)
    oracle = referee(recorded, x, y, norm="l1", eps=eps, budget=1000, **asks_for(attack, model))
    attack_with(attack, oracle, x, y)
    assert (oracle.ledger.first_hit == NEVER).all()
    assert oracle.ledger.forwards.tolist() == [attack.most_queries] * 3 == [23] * 3
    assert oracle.ledger.backwards.tolist() == [20] * 3
    rng = SampleRng.create(0, torch.arange(3), "attack").fork(0)
    begun = start(x, Threat("l1", 3 * eps, "gradients", 1), rng)
    asked = torch.stack(recorded.asked, dim=1)
    assert len(asked[0]) == 7 + 7 + 9
    for i in range(3):
        u, first = begun[i], 0
        for radius, share in ((3 * eps, 6), (2 * eps, 6), (eps, 8)):
            expected, _ = sparse_reference(
                model, x[i], y[i], log_likelihood, radius, share, ball(u, x[i], "l1", radius), wide=True
            )
            met = asked[i, first : first + share + 1]
            torch.testing.assert_close(met[:3], torch.stack(expected[:3]), rtol=0, atol=1e-8)
            with torch.no_grad():
                u, first = met[log_likelihood(model(met), y[i].repeat(len(met))).argmin()], first + share + 1
    with pytest.raises(ConfigError, match="a wide start goes through 3 radii"):
        APGD(steps=2, wide_start=True)


def test_cost_is_as_stated_and_the_budget_holds():
    x, y = images(3), torch.zeros(3, dtype=torch.int64)
    attack = APGD(steps=6, restarts=2)
    oracle = referee(Scripted(10**6), x, y, access="gradients", budget=100)
    attack_with(attack, oracle, x, y)
    assert oracle.ledger.forwards.tolist() == [attack.most_queries] * 3 == [14] * 3
    assert oracle.ledger.backwards.tolist() == [12] * 3
    model = Linear(classes=5)
    y = model(x).argmax(1)
    attack = TargetedAPGD(steps=3, targets=9)
    oracle = referee(model, x, y, access="gradients", eps=1e-6, budget=100)
    attack_with(attack, oracle, x, y)
    assert oracle.ledger.forwards.tolist() == [1 + 4 * 4] * 3  # of five classes, four are wrong


def test_targets_are_the_likeliest_wrong_classes():
    model, x = Linear(classes=5), images(6)
    logits = model(x)
    y = logits.argmax(1)
    oracle = referee(model, x, y, access="gradients")
    assert torch.equal(rivals(oracle.oracle, x, y, 3).T, logits.argsort(dim=1, descending=True)[:, 1:4])


def test_draws_of_a_random_model_are_averaged():
    """With mean gradients of 30 draws, the margin comes out as without noise; of one draw it does not."""
    model, x = curved(), images(20, (1, 5, 5))
    y = model(x).argmax(1)
    reached = {}
    for name, eot, served in (("plain", 1, model), ("once", 1, Noisy(model, 0.3)), ("mean", 30, Noisy(model, 0.3))):
        attack = APGD(steps=12, eot=eot)
        oracle = referee(
            served, x, y, eps=0.004, access="gradients", budget=1000, random=served is not model,
            rules=attack.rules,
        )  # fmt: skip
        final = attack_with(attack, oracle, x, y)
        top = model(final).topk(2, dim=1).values
        reached[name] = (top[:, 0] - top[:, 1]).mean().item()
    assert reached["mean"] <= reached["plain"] * 1.05 + 1e-3
    assert oracle.ledger.forwards.max() == 13 * 30
    assert oracle.ledger.backwards.max() == 12 * 30


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_starts_are_at_the_surface_of_the_ball(norm):
    x = torch.full((50, 1, 4, 4), 0.5, dtype=torch.float64)
    far = lp_norm(start(x, Threat(norm, 0.3, "gradients", 1), SampleRng.create(0, torch.arange(50), "start")) - x, norm)
    assert torch.allclose(far, torch.full_like(far, 0.3), atol=1e-9)


def test_too_few_classes_are_refused():
    with pytest.raises(ConfigError, match="loss=dlr compares 4 classes, and the data have 3; use loss=ce"):
        TargetedAPGD().check(3, (1, 8, 8))
    with pytest.raises(ConfigError, match="loss=dlr compares 3 classes"):
        APGD(loss="dlr").check(2, (1, 8, 8))
    TargetedAPGD(loss="ce").check(2, (1, 8, 8))


@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted"])
def test_as_strong_as_the_authors_code_for_no_more_passes(loss):
    base = pytest.importorskip("pyautoattack.autopgd_base")
    model, x, eps, steps = curved().float(), images(40, (1, 5, 5)).float(), 0.09, 20
    y = model(x).argmax(1)
    recorded = Recorded(model)
    settings = {"norm": "Linf", "eps": eps, "n_iter": steps, "seed": 0, "device": "cpu"}
    if loss == "targeted":
        attack, theirs = TargetedAPGD(steps=steps, targets=3), base.APGDAttack_targeted(recorded, **settings)
        theirs.n_target_classes = 3
    else:
        attack, theirs = APGD(steps=steps, loss=loss), base.APGDAttack(recorded, loss=loss, **settings)
    beaten = (model(theirs.perturb(x, y)).argmax(1) != y).sum().item()
    oracle = referee(model, x, y, eps=eps, budget=1000, **asks_for(attack, model))
    attack_with(attack, oracle, x, y)
    fallen = (oracle.ledger.first_hit != NEVER).sum().item()
    assert 0 < beaten < 40
    assert fallen >= beaten - (beaten * (1 - beaten / 40)) ** 0.5
    assert oracle.ledger.forwards.sum() <= sum(len(batch) for batch in recorded.asked)
