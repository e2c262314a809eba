"""A sample that is named several times in one call pays for each, in order, as for k queries in one call."""

from dataclasses import fields

import pytest
import torch

from bench.losses import margin
from bench.oracle import NEVER
from bench.oracle.repeats import repeats
from tests.problems import Linear, Noisy, Recorded, Scripted, images, referee

N = 5
ROWS = torch.tensor([3, 0, 3, 1, 0, 3, 3, 4, 0, 3])  # 3 five times, 0 three times, 1 and 4 once, 2 never
SETTINGS = {
    "plain": {},
    "budget": {"budget": 3},
    "labels": {"access": "labels"},
    "minimal": {"minimal": True, "eps": 0.02},
    "l2": {"norm": "l2", "eps": 0.4},
    "quantised": {"quantise": True},
    "noise": {"random": True},
    "alone": {"random": True, "alone": True},
}


def problem(eps=0.05, **settings):
    """Samples near the boundary, and queries of ``ROWS`` of which some cross it."""
    plain = Linear()
    w = (plain.weight[0] - plain.weight[1]).sign().view(3, 8, 8)
    x = (images(N) * 255).round() / 255
    x -= per_sample_offset(plain, x) * w
    x = (x * 255).round() / 255
    y = plain(x).argmax(1)
    steps = torch.linspace(-1, 1, len(ROWS), dtype=torch.float64)[torch.randperm(len(ROWS), generator=seeded(4))]
    queries = x[ROWS] + 0.999 * eps * steps.view(-1, 1, 1, 1) * w * (0.07 if settings.get("norm") == "l2" else 1)
    return Noisy(plain, 0.5) if settings.get("random") else plain, x, y, queries


def per_sample_offset(model, x):
    """How far each image is from the middle of the two classes along the signs of the weights, but a little."""
    w = model.weight[0] - model.weight[1]
    lead = model(x) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    return ((lead - 0.2) / w.abs().sum()).view(-1, 1, 1, 1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def same(one, other):
    for field in fields(one.ledger):
        values = getattr(one.ledger, field.name), getattr(other.ledger, field.name)
        torch.testing.assert_close(*values, equal_nan=True, msg=lambda text, name=field.name: f"{name}: {text}")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_call_is_its_queries_one_after_another(name):
    settings = {"budget": 4, "eps": 0.05, **SETTINGS[name]}
    model, x, y, queries = problem(**settings)
    together, apart = (referee(model, x, y, **settings) for _ in range(2))
    ask = "labels" if settings.get("access") == "labels" else "scores"
    answers = getattr(together, ask)(queries, ROWS)
    one_by_one = [getattr(apart, ask)(query[None], row[None]) for query, row in zip(queries, ROWS, strict=True)]
    torch.testing.assert_close(answers, torch.cat(one_by_one), equal_nan=True)
    same(together, apart)
    assert (together.ledger.first_hit != NEVER).any()
    assert together.ledger.forwards.tolist()[2] == 0
    torch.testing.assert_close(together.finish(x), apart.finish(x))


def test_the_budget_cuts_a_call():
    x = images(2)
    oracle = referee(Scripted(99), x, torch.zeros(2, dtype=torch.int64), budget=5)
    rows = torch.zeros(1000, dtype=torch.int64)
    answers = oracle.scores(x[rows], rows)
    assert answers.isfinite().all(dim=1).sum() == 5
    assert oracle.ledger.forwards.tolist() == [5, 0]


def test_nothing_is_answered_after_a_hit_among_repeats():
    plain, x = Linear(), images(1)
    y = plain(x).argmax(1)
    far = x - 0.2 * (plain.weight[y] - plain.weight[1 - y]).sign().view_as(x)
    oracle = referee(plain, x, y, eps=0.2)
    answers = oracle.scores(torch.cat((x, far, far, x)), torch.zeros(4, dtype=torch.int64))
    assert answers.isfinite().all(dim=1).tolist() == [True, True, False, False]
    assert oracle.ledger.first_hit.tolist() == [2]
    assert torch.equal(oracle.finish(x), far)


@pytest.mark.parametrize("settings", [{}, {"averages": True}, {"averages": True, "budget": 4}, {"alone": True}])
def test_k_queries_in_one_call_and_k_times_a_name_are_one_thing(settings):
    settings = {"random": True, **settings}
    model, x, y, _ = problem(**settings)
    probes = x[:, None].expand(-1, 6, -1, -1, -1)
    rows = torch.arange(N)
    folded, named = (referee(model, x, y, **settings) for _ in range(2))
    answers = folded.scores(probes)
    order = torch.randperm(6 * N, generator=seeded(0))
    repeated = named.scores(probes.flatten(0, 1)[order], rows.repeat_interleave(6)[order])
    assert repeated.isnan().sum() == answers.isnan().sum()
    same(folded, named)


def test_names_that_come_with_several_queries_each():
    model, x, y, _ = problem()
    rows = torch.tensor([1, 4, 1])
    probes = x[rows][:, None].expand(-1, 2, -1, -1, -1)
    oracle = referee(model, x, y, budget=3)
    assert oracle.scores(probes, rows).isfinite().all(dim=2).tolist() == [[True, True], [True, True], [True, False]]
    assert oracle.ledger.forwards.tolist() == [0, 3, 0, 0, 2]


def test_padding_is_never_forwarded():
    """The batch of a sample may decide what it is answered."""
    model, x, y, queries = problem()
    recorded = Recorded(model)
    referee(recorded, x, y, alone=True).scores(queries, ROWS)
    assert sorted(map(len, recorded.asked)) == [1, 1, 3, 5]
    recorded = Recorded(model)
    referee(recorded, x, y).scores(queries, ROWS)
    assert [len(asked) for asked in recorded.asked] == [len(ROWS)]


def test_gradients_of_repeats_are_paid_for_and_cut():
    model, x, y, _ = problem(eps=0)
    oracle = referee(model, x, y, access="gradients", budget=2)
    rows = torch.tensor([2, 2, 0, 2])
    _, gradient = oracle.gradients(x[rows], margin, rows)
    true = (model.weight[y] - model.weight[1 - y]).view_as(x)[rows]
    torch.testing.assert_close(gradient[:3], true[:3])
    assert gradient[3].abs().max() == 0
    assert oracle.ledger.backwards.tolist() == [1, 0, 2, 0, 0]
    assert oracle.ledger.forwards.tolist() == [1, 0, 2, 0, 0]


def test_the_layout():
    layout = repeats(ROWS)
    assert layout.rows.tolist() == [0, 1, 3, 4]
    assert layout.asked.sum(dim=1).tolist() == [3, 1, 5, 1]
    assert layout.queries.tolist() == [[1, 4, 8, 8, 8], [3] * 5, [0, 2, 5, 6, 9], [7] * 5]
    assert repeats(torch.tensor([4, 2, 3])) is None
    assert repeats(torch.tensor([], dtype=torch.int64)) is None
