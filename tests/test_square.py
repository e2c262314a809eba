"""Square: the published schedule, the invariants of its search, and agreement with an independent implementation."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from attacks.square import P_INIT, Square, window_side, wrong_classes
from attacks.windows import bump, odd_side
from bench.errors import ConfigError
from bench.losses import margin
from bench.norms import lp_norm
from bench.oracle import NEVER
from bench.registry import describe
from bench.rng import SampleRng
from tests.problems import Linear, Noisy, Scripted, attack_with, images, referee

ROWS = (0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)  # an iteration of each row of the schedule


@pytest.mark.parametrize(
    ("p_init", "size", "sides"),
    [
        (0.05, 32, [7, 5, 4, 3, 2, 1, 1, 1, 1, 1]),
        (0.1, 32, [10, 7, 5, 4, 3, 2, 1, 1, 1, 1]),
        (0.3, 32, [18, 12, 9, 6, 4, 3, 2, 2, 1, 1]),
        (0.8, 32, [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]),
        (0.05, 224, [50, 35, 25, 18, 13, 9, 6, 4, 3, 2]),
        (0.3, 224, [123, 87, 61, 43, 31, 22, 15, 11, 8, 5]),
        (0.8, 224, [200, 142, 100, 71, 50, 35, 25, 18, 13, 9]),
    ],
)
def test_window_sides_are_the_published_ones(p_init, size, sides):
    square = Square()
    assert [window_side(square._share(p_init, row, 99), (size, size)) for row in ROWS] == sides


def test_rescaling_stretches_the_schedule_over_the_budget():
    square = Square(preset="eccv2020")
    assert square.rescaled
    shares = [square._share(0.05, it, 2500) for it in (2, 3, 2499)]
    assert shares == [0.05, 0.05 / 2, 0.05 / 512]
    assert Square(preset="aaa")._share(0.3, 2499, 2500) == 0.3 / 64  # never below, stopped at 2,500 of 10,000


@pytest.mark.parametrize(
    ("p_init", "size", "sides"),
    [
        (0.1, 32, [11, 7, 5, 5, 3]),
        (0.8, 32, [29, 21, 15, 11, 7, 5, 5, 3]),
        (0.1, 224, [71, 51, 35, 25, 19, 13, 9, 7, 5, 3]),
    ],
)
def test_l2_sides_are_the_published_ones(p_init, size, sides):
    square = Square()
    found = [odd_side(window_side(square._share(p_init, row, 99), (size, size)), size) for row in ROWS]
    assert found[: len(sides)] == sides


@pytest.mark.parametrize("side", [1, 3, 5, 7, 11])
def test_bumps_have_unit_norm_and_two_lobes(side):
    assert bump(side, "l1").abs().sum().item() == pytest.approx(1, abs=1e-5)
    pattern = bump(side)
    assert pattern.shape == (side, side)
    assert pattern.norm() == pytest.approx(1, abs=1e-6)
    assert (pattern[: side // 2] > 0).all()
    assert (pattern[side // 2 :] < 0).all()


def test_every_l1_iterate_is_in_the_ball_and_uses_it():
    seen = []

    class Watch(Scripted):
        def forward(self, query):
            seen.append(lp_norm(query - x, "l1"))
            return super().forward(query)

    x = images(5, (3, 16, 16))
    run(Square(), x, torch.zeros(5, dtype=torch.int64), Watch(math.inf), norm="l1", eps=9.0, budget=60)
    assert torch.stack(seen).max() <= 9 + 1e-9
    assert torch.stack(seen)[1:].min() > 8


def test_the_presets_are_what_they_say_and_arguments_win():
    assert Square(preset="autoattack").p_init == 0.8
    assert Square(preset="aaa").p_init == 0.3
    assert Square(preset="aaa-standard").p_init == 0.05  # what the authors' code takes for their base network
    assert Square(preset="aaa", p_init=0.05).p_init == 0.05
    assert P_INIT == {"linf": 0.05, "l2": 0.1, "l1": 0.8}
    with pytest.raises(ConfigError, match="share of the pixels"):
        Square(p_init=8)


def run(square, x, y, model, **settings):
    oracle = referee(model, x, y, **settings)
    return attack_with(square, oracle, x, y), oracle.ledger


@pytest.mark.parametrize("preset", [None, "eccv2020", "autoattack", "aaa", "aaa-standard"])
def test_every_linf_pixel_sits_at_an_end_of_its_range(preset):
    x = images(6, (3, 16, 16))
    x_adv, _ = run(Square(preset=preset), x, torch.zeros(6, dtype=torch.int64), Scripted(math.inf), budget=60)
    ends = torch.stack(((x - 0.05).clamp(0, 1), (x + 0.05).clamp(0, 1)))
    assert (x_adv == ends).any(dim=0).all()


def test_every_l2_iterate_is_on_the_sphere():
    norms = []

    class Watch(Scripted):
        def forward(self, query):
            norms.append(lp_norm(query - x, "l2"))
            return super().forward(query)

    x = images(5, (3, 16, 16))
    run(Square(), x, torch.zeros(5, dtype=torch.int64), Watch(math.inf), norm="l2", eps=0.5, budget=100)
    assert len(norms) == 100
    assert torch.allclose(torch.stack(norms), torch.tensor(0.5, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 24, 24), (3, 12, 20)])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_small_and_oblong_images_work(shape, norm):
    x = images(3, shape)
    _, ledger = run(Square(), x, torch.zeros(3, dtype=torch.int64), Scripted(math.inf), norm=norm, budget=80)
    assert ledger.forwards.tolist() == [80] * 3


@pytest.mark.parametrize(("edges", "reached"), [("inclusive", 32 * 32), ("reference", 31 * 31)])
def test_windows_reach_the_edges_or_leave_them_like_the_public_code(edges, reached):
    touched = torch.zeros(32, 32, dtype=torch.bool)
    start = []

    class Watch(Linear):
        def forward(self, query):  # every proposal is an improvement, so each is the next incumbent
            if start:
                touched.logical_or_((query[:, 0] != start[-1][:, 0]).any(dim=0))
            start.append(query)
            return torch.tensor([[100.0 - len(start), 0.0]]).double().repeat(len(query), 1)

    x = images(64, (1, 32, 32))
    run(Square(edges=edges), x, torch.zeros(64, dtype=torch.int64), Watch(), budget=90)
    assert touched.sum().item() == reached
    if edges == "reference":
        assert not touched[31].any()
        assert not touched[:, 31].any()


def test_one_pixel_proposals_are_never_wasted():
    same = []

    class Watch(Scripted):
        last = None

        def forward(self, query):
            if self.last is not None:
                same.append((query == self.last).flatten(1).all(dim=1))
            self.last = query if self.last is None else self.last  # the incumbent never changes
            return super().forward(query)

    x = images(50, (3, 8, 8))
    run(Square(p_init=0.01), x, torch.zeros(50, dtype=torch.int64), Watch(math.inf), budget=200)
    share = torch.stack(same).double().mean().item()
    chance = 1 / 8**4  # all of four sign sets repeat the pixel, where two in three draws would see 1/8
    assert share < chance + 4 * math.sqrt(chance / (199 * 50))


@pytest.mark.parametrize("norm", ["linf", "l2", pytest.param("l1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("noisy", [False, True])
def test_samples_do_not_see_their_batch(norm, noisy):
    x = images(40)
    model = Linear(classes=5)
    y = model(x).argmax(1)
    model = Noisy(model, 0.5) if noisy else model
    settings = {"norm": norm, "eps": {"linf": 0.02, "l2": 0.15, "l1": 0.7}[norm], "budget": 150, "random": noisy}

    def attacked(ids):
        return run_ids(Square(), x[ids], y[ids], model, ids, **settings)

    whole_x, whole = attacked(torch.arange(40))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled_x, shuffled = attacked(order)
    chunks = [attacked(ids) for ids in torch.arange(40).split(7)]
    assert 5 < (whole.first_hit != NEVER).sum() < 38  # neither all nor none
    assert torch.equal(shuffled.first_hit, whole.first_hit[order])
    assert torch.equal(shuffled_x, whole_x[order])
    assert torch.equal(torch.cat([ledger.first_hit for _, ledger in chunks]), whole.first_hit)
    assert torch.equal(torch.cat([x_adv for x_adv, _ in chunks]), whole_x)


def run_ids(square, x, y, model, ids, **settings):
    oracle = referee(model, x, y, ids=ids, **settings)
    return attack_with(square, oracle, x, y, ids=ids), oracle.ledger


def plain_value(logits, k, loss):
    """The loss of class ``k`` by its formula."""
    others = [z for j, z in enumerate(logits) if j != k]
    probability = math.exp(logits[k]) / sum(math.exp(z) for z in logits)
    return {"margin": logits[k] - max(others), "ce": math.log(probability), "prob": probability}[loss]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", ["margin", "ce", "prob"])
def test_a_plain_search_of_one_sample_at_a_time_finds_the_same(loss, targeted):
    """The slow reference: loops, one sample, the same random numbers."""
    eps, budget, p_init = 0.03, 60, 0.1
    model = Linear((3, 10, 10), classes=4)
    x = images(8, (3, 10, 10))
    y = model(x).argmax(1)
    square = Square(p_init=p_init, loss=loss, targeted=targeted)
    x_adv, ledger = run_ids(square, x, y, model, torch.arange(8), eps=eps, budget=budget)

    for i in range(8):
        rng = SampleRng.create(0, torch.tensor([i]), "attack")
        low, high = (x[i] - eps).clamp(min=0), (x[i] + eps).clamp(max=1)
        stripes = rng.fork("start").coins(3, 1, 10)[0].expand(3, 10, 10)
        u = torch.where(stripes, high, low)
        hit, best = NEVER, math.inf
        wrong = [k for k in range(4) if k != y[i]]
        wrong = wrong[y[i] :] + wrong[: y[i]]  # from the label's successor on, round the end
        k = wrong[int(rng.fork("target").uniform().item() * 3)] if targeted else y[i].item()
        for query in range(1, budget + 1):
            candidate = u.clone()
            if query > 1:
                step = rng.fork(query - 1)
                side = window_side(square._share(p_init, query - 2, budget), (10, 10))
                row = step.fork("row").integers(10 - side + 1).item()
                column = step.fork("column").integers(10 - side + 1).item()
                draws = [step.fork("signs").coins(3)[0], *step.fork("more signs").coins(3, 3)[0]]
                for signs in draws if side == 1 else draws[:1]:
                    for channel in range(3):
                        for r in range(row, row + side):
                            for c in range(column, column + side):
                                end = high if signs[channel] else low
                                candidate[channel, r, c] = end[channel, r, c]
                    if side > 1 or not torch.equal(candidate, u):
                        break
                    candidate = u.clone()
                else:
                    signs = draws[0]
            logits = model(candidate[None])[0].tolist()
            value = (-1 if targeted else 1) * plain_value(logits, k, loss)
            if value < best:
                best, u = value, candidate
            if plain_value(logits, y[i], "margin") < 0:
                hit, u = query, candidate
                break
        assert ledger.first_hit[i].item() == hit
        assert torch.equal(x_adv[i], u)


def test_targets_are_uniform_over_the_wrong_classes():
    n, classes = 6000, 5
    y = torch.arange(n) % classes
    targets = wrong_classes(SampleRng.create(0, torch.arange(n), "attack"), y, classes)
    counts = torch.zeros(classes, classes).index_put((y, targets), torch.ones(n), accumulate=True)
    assert counts.diagonal().sum() == 0
    shares = counts[~torch.eye(classes, dtype=torch.bool)] / (n / classes)
    assert (shares - 1 / 4).abs().max() < 4 * math.sqrt(1 / 4 * 3 / 4 / (n / classes))  # 20 shares


def test_a_targeted_search_raises_its_target_and_any_wrong_class_ends_it():
    model, x, ids = Linear(classes=5), images(60), torch.arange(60)
    y = model(x).argmax(1)
    targets = wrong_classes(SampleRng.create(0, ids, "attack").fork("target"), y, 5)
    near, _ = run_ids(Square(targeted=True), x, y, model, ids, eps=0.002, budget=100)
    free, _ = run_ids(Square(), x, y, model, ids, eps=0.002, budget=100)
    lead = margin(model(near), targets) - margin(model(free), targets)
    assert lead.mean() > 4 * lead.std() / math.sqrt(60)
    far, ledger = run_ids(Square(targeted=True), x, y, model, ids, eps=0.03, budget=100)
    hit, found = ledger.first_hit != NEVER, model(far).argmax(1)
    assert (found != y)[hit].all()
    reached = (found == targets)[hit]
    assert 0 < reached.sum() < len(reached)


def test_rows_that_were_stored_before_targets_keep_their_keys():
    assert "targeted" not in describe(Square())
    assert describe(Square(targeted=True))["targeted"] is True


def test_probabilities_order_proposals_as_likelihoods_do():
    model, x, ids = Linear(classes=5), images(20), torch.arange(20)
    y = model(x).argmax(1)
    by_prob, by_ce = (run_ids(Square(loss=loss), x, y, model, ids, eps=0.02, budget=100) for loss in ("prob", "ce"))
    assert torch.equal(by_prob[0], by_ce[0])
    assert torch.equal(by_prob[1].first_hit, by_ce[1].first_hit)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 10)).eval()


@pytest.mark.parametrize(
    ("norm", "eps"), [("linf", 0.045), ("l2", 0.9), pytest.param("l1", 7.0, marks=pytest.mark.slow)]
)
def test_robust_accuracy_agrees_with_pyautoattack(norm, eps):
    """Same model, images, p_init, schedule and budget: within two standard errors of the difference."""
    from pyautoattack.square import SquareAttack

    n, budget = 400, 80
    model = small_network()
    x = torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    y = model(x).argmax(1).detach()
    square = Square(preset="autoattack", p_init=0.3)
    _, ledger = run(square, x, y, model, norm=norm, eps=eps, budget=budget)
    ours = (ledger.first_hit == NEVER).numpy()

    theirs = SquareAttack(
        model, p_init=0.3, n_queries=budget, eps=eps, norm=norm.capitalize(), n_restarts=1, seed=0, verbose=False,
        device="cpu", resc_schedule=False,
    )  # fmt: skip
    # It shares a window between the samples of a batch, so each of 40 batches is one draw of its windows.
    robust = []
    for start in range(0, n, 10):
        theirs.seed = start
        batch = slice(start, start + 10)
        adversarial = theirs.perturb(x[batch], y[batch])
        robust.append((model(adversarial).argmax(1) == y[batch]).numpy())
    robust = np.concatenate(robust)

    a, b = ours.mean(), robust.mean()
    assert 0.15 < a < 0.85  # a figure that could differ
    assert abs(a - b) <= 2 * math.sqrt((a * (1 - a) + b * (1 - b)) / n)
