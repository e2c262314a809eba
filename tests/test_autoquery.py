"""AutoQuery: what kind of scores these are is found out from answers alone, and every question is paid."""

import pytest
import torch
from torch import nn

from attacks.autoquery import AutoQuery
from attacks.probing import COARSE, EDITED, LABELS, PLAIN, RANDOM, REVERSED, SCALED, probe
from attacks.sweeps import Tactic, sweep
from bench.errors import AccessError, ConfigError
from bench.losses import margin
from bench.oracle import NEVER
from bench.plan.services import check_service
from bench.rng import SampleRng
from bench.rules import rules_of
from bench.service import Service
from defenses.aaa import linear_target, sine_target
from defenses.dld import Dashed
from tests.problems import Linear, Noisy, Recorded, attack_with, images, referee

SHAPE = (3, 8, 8)


class Moved(nn.Module):
    """The largest logit moved until it leads by what ``edit`` says of its lead."""

    def __init__(self, model, edit):
        super().__init__()
        self.model, self.edit = model, edit

    def forward(self, x):
        logits = self.model(x)
        best, second = logits.topk(2, dim=1).values.unbind(1)
        shown = self.edit(best - second) + 1e-9
        return logits.scatter(1, logits.argmax(dim=1, keepdim=True), (second + shown)[:, None])


class Scaled(nn.Module):
    """All logits of a query times one number of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, rng):
        return self.model(x) * (0.5 + 9.5 * rng.uniform()[:, None].to(x))


class Rounded(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return (self.model(x) * 5).round() / 5


class OneHot(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return nn.functional.one_hot(self.model(x).argmax(dim=1), 4).to(x)


def mirrored(tau, offset):
    return lambda margins: linear_target(margins, tau, 1.0, offset)


def bent(tau):
    return lambda margins: sine_target(margins, tau, 0.7)


LINEAR = Linear(SHAPE, classes=4)
KINDS = [
    (LINEAR, PLAIN, {}), (Scaled(LINEAR), SCALED, {"random": True}), (Noisy(LINEAR, 0.3), RANDOM, {"random": True}),
    (Rounded(LINEAR), COARSE, {}), (OneHot(LINEAR), LABELS, {}), (Moved(LINEAR, mirrored(2.0, 0.0)), EDITED, {}),
    (Dashed(LINEAR, 2.0, 0.3, 0.04, 0.5), EDITED, {}), (Moved(LINEAR, bent(0.6)), REVERSED, {}),
]  # fmt: skip


def probed(model, budget=100, n=12, **settings):
    x = images(n, SHAPE)
    y = LINEAR(x).argmax(1)
    oracle = referee(model, x, y, budget=budget, eps=0.01, roams=True, **settings)
    return probe(oracle.oracle, x, y, SampleRng.create(0, torch.arange(n), "attack")), oracle


@pytest.mark.parametrize(("model", "kind", "settings"), KINDS)
def test_each_kind_of_scores_is_told_by_its_answers(model, kind, settings):
    known, oracle = probed(model, **settings)
    assert (known.kind == kind).float().mean() > (0.5 if kind == COARSE else 0.8)
    assert oracle.ledger.forwards.max() <= 35


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Moved(LINEAR, mirrored(0.6, 0.0)), (0.6, 0.6, 1.0)), (Moved(LINEAR, mirrored(0.6, 0.25)), (0.6, 0.25, 1.0)),
        (Dashed(LINEAR, 1.0, 0.3, 0.04, 0.5), (1.0, 1.0, 0.3)),
    ],
)  # fmt: skip
def test_behind_the_edit_that_is_found_margins_are_the_true_ones(model, expected):
    """Where the clean margin lies beyond the first interval, whose width alone says nothing of the others."""
    known, _ = probed(model, n=40)
    x = images(40, SHAPE)
    far = (known.kind == EDITED) & (margin(LINEAR(x), LINEAR(x).argmax(1)) > expected[0] + expected[1])
    found = torch.stack((known.edit.interval, known.edit.offset, known.edit.height), dim=1)[far]
    right = (found - torch.tensor(expected)).abs().amax(dim=1) < 0.03
    assert far.sum() >= 5
    assert right.float().mean() > 0.7


def test_answers_that_are_rough_hide_no_interval():
    """As those of AAA's released solver, which stops early: at one true margin they differ by a hundredth."""
    rough = Moved(LINEAR, lambda margins: linear_target(margins, 0.6, 1.0) + 0.006 * (1e4 * margins).sin())
    known, _ = probed(rough, n=40)
    true = margin(LINEAR(images(40, SHAPE)), LINEAR(images(40, SHAPE)).argmax(1))
    far = (known.kind == EDITED) & (true > 1.2)
    assert far.sum() >= 5
    assert ((known.edit.interval - 0.6).abs() < 0.03)[far].float().mean() > 0.7


@pytest.mark.parametrize(("model", "kind", "settings"), KINDS)
def test_every_question_is_in_the_ledger_and_no_sample_knows_of_others(model, kind, settings):
    x = images(8, SHAPE)
    y = LINEAR(x).argmax(1)

    def attacked(rows):
        recorded = Recorded(model)
        if settings:
            recorded.forward = lambda images, rng: (recorded.asked.append(images), model(images, rng))[1]
        oracle = referee(recorded, x[rows], y[rows], eps=0.03, budget=60, ids=rows, roams=True, **settings)
        final = attack_with(AutoQuery(), oracle, x[rows], y[rows], ids=rows)
        return final, oracle, sum(len(batch) for batch in recorded.asked)

    final, oracle, asked = attacked(torch.arange(8))
    assert asked == oracle.ledger.forwards.sum()
    rows = torch.tensor([1, 4, 6])
    some, alone, _ = attacked(rows)
    assert torch.equal(alone.ledger.first_hit, oracle.ledger.first_hit[rows])
    assert torch.equal(some, final[rows])


@pytest.mark.parametrize("model", [LINEAR, OneHot(LINEAR)])
def test_what_is_left_has_no_distance_and_an_example_that_was_asked_about(model):
    """It looks for no nearest image, and RayS would return what nobody has asked about."""
    x, attack = images(6, SHAPE), AutoQuery()
    recorded, y = Recorded(model), LINEAR(x).argmax(1)
    oracle = referee(recorded, x, y, eps=0.004, budget=180, rules=rules_of(attack))
    final = attack_with(attack, oracle, x, y)
    left = oracle.ledger.first_hit == NEVER
    assert left.any()
    asked = torch.cat(recorded.asked)
    assert all((asked == image).flatten(1).all(1).any() for image in final)
    assert oracle.ledger.best_distance.isinf().all()


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 13, 29])
def test_a_budget_that_ends_while_it_asks_around_is_kept(budget):
    x = images(4, SHAPE)
    y = LINEAR(x).argmax(1)
    for model in (LINEAR, Moved(LINEAR, mirrored(2.0, 0.0)), OneHot(LINEAR)):
        oracle = referee(model, x, y, eps=0.001, budget=budget, roams=True)
        attack_with(AutoQuery(), oracle, x, y)
        assert (oracle.ledger.forwards <= budget).all()
        assert (oracle.ledger.forwards[oracle.ledger.first_hit == NEVER] == budget).all()


def test_a_service_that_tells_labels_alone_is_refused_in_a_line():
    with pytest.raises(ConfigError, match="the service tells only labels; use rays or hop-skip-jump"):
        check_service(Service(answers="labels"), False, AutoQuery(), False)
    x = images(2, SHAPE)
    oracle = referee(LINEAR, x, LINEAR(x).argmax(1), access="labels", roams=True)
    with pytest.raises(AccessError):
        attack_with(AutoQuery(), oracle, x, LINEAR(x).argmax(1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_two_classes_are_enough(norm):
    model, x = Linear(SHAPE), images(6, SHAPE)
    y = model(x).argmax(1)
    oracle = referee(Scaled(model), x, y, norm=norm, eps={"linf": 0.05, "l2": 0.5}[norm], budget=200, random=True,
                     roams=True)  # fmt: skip
    attack_with(AutoQuery(), oracle, x, y)
    assert "scale-free" in oracle.stages
    assert (oracle.ledger.first_hit != NEVER).any()


def test_a_sweep_changes_each_place_of_a_grid_once_before_any_twice():
    """Of a model that refuses all, a pixel of 8 x 8 at a time."""
    x, asked = images(1, (1, 8, 8)), []

    class Refusing(nn.Module):
        def forward(self, batch):
            asked.append(batch.clone())
            first = batch.flatten(1)[:, :1] * 0
            return torch.cat((first + 5 + len(asked), first), dim=1)

    oracle = referee(Refusing(), x, torch.zeros(1, dtype=torch.int64), eps=0.1, budget=65)
    tactic = Tactic(p_init=0.01)
    sweep(oracle.oracle, x, torch.zeros(1, dtype=torch.int64), oracle.threat,
          SampleRng.create(0, torch.arange(1), "attack"), tactic)  # fmt: skip
    start = asked[0]
    changed = [(batch != start).flatten().nonzero().flatten().tolist() for batch in asked[1:]]
    places = [place for places in changed for place in places]
    assert len(set(places)) == len(places) > 50  # one signs in sixteen are what they were


def test_a_walk_beside_the_boundary_sees_through_margins_that_rise_and_fall():
    """Under a sine margins mislead wherever they are not close to 0."""
    x = images(16, SHAPE)
    y = LINEAR(x).argmax(1)

    def left(tactic):
        oracle = referee(Moved(LINEAR, bent(1.2)), x, y, eps=0.05, budget=120, roams=True)
        final = sweep(oracle.oracle, x, y, oracle.threat, SampleRng.create(0, torch.arange(16), "attack"), tactic)
        oracle.finish(final)
        return (oracle.ledger.first_hit == NEVER).sum()

    assert left(Tactic(recheck=15, walks=True)) < 0.6 * left(Tactic())
