"""AutoAttack: a cascade in one ledger, each member on what those before it have left."""

import pytest
import torch

from attacks import autoattack
from attacks.apgd import APGD
from attacks.apgd_t import TargetedAPGD
from attacks.autoattack import AutoAttack, Member
from attacks.fab import TargetedFAB
from attacks.square import Square
from bench.errors import AccessError, ConfigError
from bench.oracle import NEVER, Part
from bench.rng import SampleRng
from bench.scratch import Scratch
from tests.problems import Noisy, Recorded, asks_for, attack_with, curved, images, referee


@pytest.fixture
def brief(monkeypatch):
    """The same members with few steps."""
    standard = (
        Member("apgd-ce", APGD(steps=3)), Member("apgd-t", TargetedAPGD(steps=3, targets=1)),
        Member("fab-t", TargetedFAB(steps=3, targets=1)), Member("square", Square(preset="autoattack")),
    )  # fmt: skip
    rand = (Member("apgd-ce", APGD(steps=3, eot=5)), Member("apgd-dlr", APGD(steps=3, loss="dlr", eot=5)))
    monkeypatch.setattr(autoattack, "PRESETS", {"standard": standard, "rand": rand})


def attacked(attack, model, x, y, budget=400, **settings):
    oracle = referee(model, x, y, budget=budget, **asks_for(attack, model), **settings)
    return attack_with(attack, oracle, x, y), oracle


def test_costs_are_those_of_the_members():
    names = {preset: [member.name for member in AutoAttack(preset=preset).members()] for preset in ("standard", "plus")}
    assert names["standard"] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert names["plus"] == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert AutoAttack().most_queries == 101 + (1 + 9 * 101) + (1 + 9 * 200) + 5000
    assert AutoAttack(preset="rand").most_queries == 2 * 101 * 20


def test_in_l1_apgd_starts_wide_for_the_same_cost():
    """Five starts and five targets in place of one and nine."""
    members = {member.name: member for member in AutoAttack().members("l1")}
    assert list(members) == [member.name for member in AutoAttack().members("l2")]
    assert sum(member.queries for member in members.values()) == AutoAttack().most_queries
    first, second = members["apgd-ce"].attack, members["apgd-t"].attack
    assert first == APGD(restarts=5, wide_start=True)
    assert second == TargetedAPGD(targets=5, wide_start=True)


def test_what_falls_to_the_first_member_falls_as_to_it_alone_and_costs_others_nothing():
    model, x = curved(), images(12, (1, 5, 5))
    y = model(x).argmax(1)
    recorded = Recorded(model)
    final, oracle = attacked(AutoAttack(), recorded, x, y, budget=150, eps=0.1)
    alone = referee(model, x, y, access="gradients", budget=150, eps=0.1)
    member = APGD()
    streams = SampleRng.create(0, torch.arange(12), "attack").fork("apgd-ce")
    alone.finish(member(alone.oracle, x, y, alone.threat, streams))
    first = alone.ledger.first_hit != NEVER
    assert 0 < first.sum() < 12
    assert torch.equal(oracle.ledger.first_hit[first], alone.ledger.first_hit[first])
    assert (oracle.ledger.stage[first] == 0).all()
    assert (oracle.ledger.stage[~first] != 0).all()
    assert (oracle.ledger.forwards[first] <= 101).all()
    stands = oracle.ledger.first_hit == NEVER
    assert (model(final).argmax(1) != y)[~stands].all()
    assert (oracle.ledger.forwards[stands] == 150).all()
    assert sum(len(batch) for batch in recorded.asked) == oracle.ledger.forwards.sum()  # nothing is asked for nothing


def test_samples_that_stand_are_told_by_name_what_others_fell_to(brief):
    """Of a model that gives no useful gradient, Square takes what the others leave."""

    class Stairs(torch.nn.Module):
        """Grey levels are rounded in the forward pass, and the gradient is noise of their own."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model((images * 100).round() / 100 + 0.0 * images.sin())

    model, x = curved(), images(6, (1, 5, 5))
    y = Stairs(model)(x).argmax(1)
    _, oracle = attacked(AutoAttack(), Stairs(model), x, y, budget=150, eps=0.4)
    fallen = oracle.ledger.first_hit != NEVER
    assert fallen.any()
    assert oracle.stages == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (oracle.ledger.stage[fallen] == 3).float().mean() > 0.5  # a random start of APGD's may hit, too


def test_of_a_random_model_means_of_draws_count(brief):
    model, x = curved(), images(6, (1, 5, 5))
    y = model(x).argmax(1)
    _, oracle = attacked(AutoAttack(preset="rand"), Noisy(model, 0.2), x, y, eps=0.02, random=True, budget=200)
    assert (oracle.ledger.forwards % 5 == 0).all()
    assert oracle.stages == ["apgd-ce", "apgd-dlr"]


def test_too_few_classes_are_refused():
    with pytest.raises(ConfigError, match="autoattack: loss=dlr compares 4 classes, and the data have 3; use apgd"):
        AutoAttack().check(3, (1, 8, 8))
    AutoAttack(preset="rand").check(3, (1, 8, 8))


class Killed(Exception):
    """In place of a signal."""


class Dying(torch.nn.Module):
    """A model whose process ends after so many calls."""

    def __init__(self, model, calls):
        super().__init__()
        self.model, self.left = model, calls

    def forward(self, x):
        if self.left == 0:
            raise Killed
        self.left -= 1
        return self.model(x)


@pytest.mark.parametrize("calls", [2, 5, 9, 14, 60])
def test_a_run_that_is_killed_goes_on_with_the_member_in_work(brief, calls, tmp_path, monkeypatch):
    """Calls 1 to 4 are APGD-CE's, 5 to 9 APGD-T's, 10 to 16 FAB-T's, the others Square's."""
    monkeypatch.setattr("bench.scratch.PAUSE", 0.0)
    model, x = curved(), images(12, (1, 5, 5))
    y = model(x).argmax(1)
    settings = {"eps": 0.05, "budget": 70}
    whole = Recorded(model)
    final, expected = attacked(AutoAttack(), whole, x, y, **settings)
    with pytest.raises(Killed):
        attacked(AutoAttack(), Dying(model, calls), x, y, scratch=Scratch(tmp_path), **settings)
    rest = Recorded(model)
    again, oracle = attacked(AutoAttack(), rest, x, y, scratch=Scratch(tmp_path), **settings)
    assert torch.equal(again, final)
    assert oracle.stages == expected.stages
    for name, column in vars(expected.ledger).items():
        assert torch.equal(getattr(oracle.ledger, name), column), name
    repeated = len(rest.asked) - (len(whole.asked) - calls)
    assert repeated == {2: 2, 5: 1, 9: 0, 14: 5, 60: 44}[calls]  # what the member in work had asked


def test_unfinished_turns_are_of_these_samples_and_this_code_alone(brief, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.scratch.PAUSE", 0.0)
    model, x = curved(), images(6, (1, 5, 5))
    y = model(x).argmax(1)
    attacked(AutoAttack(), model, x, y, scratch=Scratch(tmp_path, "old"))
    old, new = Scratch(tmp_path, "old"), Scratch(tmp_path, "new")
    for others in ({"scratch": new}, {"scratch": old, "ids": torch.arange(6) + 9}):
        assert referee(model, x, y, access="gradients", **others).resume(x)[0] == 0
    assert referee(model, x, y, access="gradients", scratch=old).resume(x)[0] > 0


def test_a_part_has_numbers_of_its_own():
    model, x = curved(), images(5, (1, 5, 5))
    y = model(x).argmax(1)
    y[1] = (y[1] + 1) % 4  # falls at once
    oracle = referee(model, x, y, access="gradients", budget=10, eps=0.05)
    oracle.scores(x)
    part = Part(oracle.oracle, oracle.active(), 4)
    assert part.query_budget == 4
    assert part.active().tolist() == [0, 1, 2, 3]
    assert part.active() is part.active()
    left = x[[0, 2, 3, 4]]
    assert torch.equal(part.scores(left), model(left))
    assert torch.equal(part.labels(left[1:2], torch.tensor([1])), y[2:3])
    assert torch.equal(part.gradients(left, lambda z, y: z[:, 0], part.active())[0], model(left))
    assert oracle.ledger.forwards.tolist() == [3, 1, 4, 3, 3]
    with pytest.raises(AccessError, match="takes turns"):
        part.as_module()


def test_a_part_of_some_of_those_that_stand_knows_no_others():
    model, x = curved(), images(5, (1, 5, 5))
    y = model(x).argmax(1)
    oracle = referee(model, x, y, budget=3, eps=0.05)
    part = Part(oracle.oracle, torch.tensor([1, 3]))
    assert part.active().tolist() == [0, 1]
    assert torch.equal(part.scores(x[[1, 3]], part.active()), model(x[[1, 3]]))
    assert oracle.ledger.forwards.tolist() == [0, 1, 0, 1, 0]
    oracle.scores(x[[1, 1]], torch.tensor([1, 1]))
    assert part.active().tolist() == [1]
