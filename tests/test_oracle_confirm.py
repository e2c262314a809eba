"""Hits in coarse numbers stand only where exact ones agree."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.pgd import PGD
from attacks.square import Square
from bench.measure.pipeline import Pipeline, _Network
from bench.models.lent import contents
from bench.oracle import NEVER
from bench.oracle.referee import REFRESH
from bench.oracle.served import ServedModel, Target
from bench.report.marks import marks_of
from tests.problems import Linear, Noisy, Scripted, asks_for, attack_with, images, referee
from tests.rows import row
from tests.test_runner import grid


class Coarse(nn.Module):
    """Another model, its logits rounded to eighths towards its second class."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        logits = self.model(x)
        rounded = torch.stack((logits[:, 0].mul(8).floor() / 8, logits[:, 1].mul(8).ceil() / 8), dim=1)
        return logits + (rounded - logits).detach()


@pytest.fixture
def line():
    x = images(40)
    model = Linear()
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("attack", [Square(), PGD(steps=60, rel_step=0.05, schedule="constant")], ids=["square", "pgd"])
@pytest.mark.parametrize("refresh", [1, REFRESH])
def test_only_hits_that_hold_count(attack, refresh, line):
    model, x, y = line
    found = {}
    for name, exact in (("unconfirmed", None), ("confirmed", ServedModel(model))):
        held = referee(Coarse(model), x, y, eps=0.06, budget=100, exact=exact, **asks_for(attack, model))
        held._refresh = refresh
        attack_with(attack, held, x, y)
        hit = held.ledger.first_hit != NEVER
        beaten = hit & (model(held.ledger.hits).argmax(1) != y)
        assert torch.equal(held.ledger.hits[~hit], x[~hit])
        found[name] = int(hit.sum()), int(beaten.sum())
    hits, hold = found["unconfirmed"]
    assert hold < hits  # the coarse model does give hits that are none
    hits, hold = found["confirmed"]
    assert hits == hold >= found["unconfirmed"][1]  # and their search goes on


@pytest.mark.parametrize("refresh", [1, 4])
def test_a_hit_that_is_none_is_forgotten_at_the_next_look(refresh):
    x, y = images(3), torch.zeros(3, dtype=torch.int64)
    model = Scripted(2)
    held = referee(model, x, y, budget=20, exact=ServedModel(Scripted(2)))  # its first pass is right, its second wrong
    held._refresh = refresh
    answers = [bool(held.scores(x + 0.01).isfinite().all()) for _ in range(12)]
    first = 2 if refresh == 1 else 4  # queries until the first look
    assert answers == [True, True] + [False] * (first - 2) + [True] + [False] * (11 - first)
    assert held.ledger.first_hit.tolist() == [3] * 3  # numbered by the queries that were answered
    assert held.ledger.forwards.tolist() == [3] * 3
    held.finish(x)
    assert held.ledger.first_hit.tolist() == [3] * 3


def test_what_is_unconfirmed_at_the_end_is_looked_at():
    x, y = images(3), torch.zeros(3, dtype=torch.int64)
    held = referee(Scripted(1), x, y, exact=ServedModel(Scripted(2)))
    held._refresh = REFRESH
    held.scores(x + 0.01)
    assert held.ledger.first_hit.tolist() == [1] * 3
    assert torch.equal(held.finish(x), x)
    assert held.ledger.first_hit.tolist() == [NEVER] * 3
    assert held.ledger.stage.tolist() == [-1] * 3
    assert held.ledger.unconfirmed.tolist() == [1] * 3
    assert torch.equal(held.ledger.hits, x)


@pytest.mark.parametrize("averages", [False, True])
def test_a_hit_is_confirmed_under_its_own_draws(averages):
    """The exact model is the model itself, so that no hit may be lost; other draws would lose half of these."""
    x = images(200)
    model = Noisy(Linear(), 8.0)
    y = model.model(x).argmax(1)
    held = referee(model, x, y, random=True, budget=30, averages=averages, exact=ServedModel(model, random=True))
    held._refresh = 1000
    held.scores(x)  # so that hits are not at the first query
    for _ in range(3):
        held.scores(x[:, None].expand(-1, 3, -1, -1, -1))
    before = held.ledger.first_hit.clone()
    held._confirm()
    assert len(before.unique()) == (5 if averages else 9)  # averages: after calls of 1, 3, 3 and 3 queries, or never
    assert torch.equal(held.ledger.first_hit, before)


def served(numbers):
    return ServedModel(Linear(), numbers={"used": numbers})


@pytest.mark.parametrize(("numbers", "coarse"), [("bfloat16, channels last", True), ("float32, channels last", False)])
def test_a_row_says_that_its_hits_were_confirmed(numbers, coarse):
    target = Target(served(numbers), served("float32"), served(numbers), served("float32"))
    assert target.searched.coarse is coarse
    assert ("hits" in target.numbers) is coarse


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("attack", "on_a_gpu"), [("rays", "plain"), ("square", "fast")])
def test_distances_are_searched_in_the_numbers_that_they_are_judged_in(attack, on_a_gpu, device, tmp_path, monkeypatch):
    pipeline, task, modes = Pipeline(tmp_path, torch.device(device), 8), grid(attack=[attack])[0], []
    monkeypatch.setattr(pipeline, "train", lambda task, progress: None)
    for model in ("served", "undefended"):
        monkeypatch.setattr(pipeline, model, lambda task, mode: modes.append(mode) or served(mode))
    monkeypatch.setattr(pipeline, "check_data", lambda task: None)
    network = nn.Identity()
    pipeline._last = _Network("", network, contents(network))
    with pipeline.serving(task):
        pass
    assert modes == [on_a_gpu if device == "cuda" else "fast", "plain"] * 2


@pytest.mark.parametrize(
    ("numbers", "marked"),
    [({"used": "bfloat16, channels last"}, True), ({"used": "float32, channels last"}, False), (None, False),
     ({"used": "bfloat16, channels last", "hits": "confirmed in float32"}, False), ("bfloat16", False)],
)  # fmt: skip
def test_rows_from_before_say_that_nothing_was_confirmed(numbers, marked):
    plain = row([3, NEVER])
    shards = tuple(replace(shard, provenance={"numerics": numbers}) for shard in plain.shards)
    assert ("unconfirmed" in marks_of(replace(plain, shards=shards))) is marked
