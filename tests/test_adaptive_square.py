"""Square under other rules: scripted margins, a plain search, what the rules recover from AAA, and answers averaged."""

import math
from functools import lru_cache, partial

import pytest
import torch
from torch import nn

from attacks.adaptive_square import (
    AnnealingSquare,
    BiSquare,
    ConfidenceSquare,
    EOTSquare,
    ExploreSquare,
    ReverseSquare,
    SwitchSquare,
    UpSquare,
    annealing,
    both_ways,
    exploring,
    reversing,
    switching,
    upward,
)
from attacks.decode_square import DecodeSquare, decoded
from attacks.decoding import Edit
from attacks.square import Square, window_side
from attacks.windows import Linf
from bench.dataset import Split
from bench.errors import ConfigError
from bench.losses import margin
from bench.oracle import NEVER
from bench.rng import SampleRng
from bench.rules import rules_of
from bench.threat import Threat
from defenses.aaa import AAALinear, linear_target
from defenses.dld import dashed
from tests.problems import Linear, Noisy, attack_with, images, referee

NOTHING = Split(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64))


class Script(nn.Module):
    """Reports one margin after the other, whatever it is asked, and keeps what it was asked."""

    def __init__(self, *margins):
        super().__init__()
        self.margins, self.asked = torch.tensor(margins).double(), []

    def forward(self, x):
        value = self.margins[..., len(self.asked)].expand(len(x))
        self.asked.append(x.clone())
        return torch.stack((value, torch.zeros_like(value)), dim=1)


def taken(attack, *margins):
    """Which of the queries after the first became the incumbent, seen from the proposals that follow each."""
    model = Script(*margins, 0)
    x = images(1, (3, 24, 24))
    oracle = referee(model, x, torch.zeros(1, dtype=torch.int64), budget=len(margins) + 1)
    attack_with(attack, oracle, x, torch.zeros(1, dtype=torch.int64))
    incumbent, found = model.asked[0], []
    for query, following in zip(model.asked[1:], model.asked[2:], strict=False):
        apart = [(following != before).any(dim=1).sum().item() for before in (query, incumbent)]
        assert sorted(apart) == [1, 2]  # pixels; one from what it came from
        found.append(apart[0] == 1)
        incumbent = query if found[-1] else incumbent
    assert len(found) == len(margins) - 1
    return found


P = 0.002  # windows of one pixel, so that what the incumbent was can be read off the next proposal


@pytest.mark.parametrize(
    ("attack", "margins", "expected"),
    [
        (UpSquare(p_init=P), [5, 6, 5.5, 6, 3.1, 2.9], [1, 0, 0, 0, 1]),  # a rise; drops of 0.5, 0, 2.9, 3.1
        (UpSquare(p_init=P, jump=1.0), [5, 4.5, 3.9, 3.9], [0, 1, 0]),
        (BiSquare(p_init=P), [5, 4, 6.9, 4.5, 3], [1, 0, 0, 1]),  # rises of 2.9 and less leave it downwards
        (BiSquare(p_init=P), [5, 4, 7, 3, 2], [1, 0, 1, 1]),  # and so does one of exactly 3
        (BiSquare(p_init=P), [5, 4, 7.1, 3, 5, 6, 2.9], [1, 0, 0, 1, 1, 1]),  # from 3.1 on it goes up, for good
        (BiSquare(p_init=P), [5, 8.1, 4, 2, 1, 4.1], [0, 0, 0, 1, 1]),  # the proposal that jumps is judged downwards
        (SwitchSquare(p_init=P, patience=2), [5, 4, 6, 6, 6, 5, 5, 4, 3], [1, 0, 0, 1, 0, 0, 1, 1]),
        (SwitchSquare(p_init=P, patience=2), [5, 6, 4, 6, 3, 6, 6, 6], [0, 1, 0, 1, 0, 0, 1]),  # two in a row
        (ReverseSquare(p_init=P, patience=2), [5, 6, 7, 8, 7, 9, 6, 5, 4, 3], [0, 0, 1, 0, 1, 0, 0, 1, 1]),
        (ReverseSquare(p_init=P, patience=1), [5, 6, 4, 6, 6, 5, 7], [0, 1, 0, 1, 0, 1]),  # one is borne, two are not
        (ExploreSquare(p_init=P, chance=0.0), [5, 6, 4, 4, 3], [0, 1, 0, 1]),
        (ExploreSquare(p_init=P, chance=1.0), [5, 6, 4, 4, 3], [1, 1, 1, 1]),
        (AnnealingSquare(p_init=P, heat=1e-9), [5, 6, 4, 4.1, 3], [0, 1, 0, 1]),
        (AnnealingSquare(p_init=P, heat=1e9, cooling=1.0), [5, 60, 4, 9], [1, 1, 1]),
        (DecodeSquare(p_init=P), [1, 2, 1.5, 7, 13, 17], [1, 0, 0, 0, 0]),  # truly 5, 4, 4.5, 11, 17, 13
        (DecodeSquare(p_init=P), [17, 13, 7, 11, 1, 5], [0, 1, 1, 1, 1]),  # truly 13, 17, 11, 7, 5, 1
    ],
)
def test_a_scripted_margin_is_taken_or_refused_by_the_rule(attack, margins, expected):
    assert taken(attack, *margins) == [bool(one) for one in expected]


EVERY = [
    UpSquare, BiSquare, SwitchSquare, ReverseSquare, ExploreSquare, AnnealingSquare, DecodeSquare, ConfidenceSquare,
    EOTSquare,
]  # fmt: skip


@pytest.mark.parametrize("attack", [attack() for attack in EVERY if attack is not EOTSquare])
def test_a_misclassified_proposal_ends_the_sample_whatever_the_rule_says(attack):
    model = Script(1.0, 0.5, -0.1, 9.0)
    x, y = images(3), torch.zeros(3, dtype=torch.int64)
    oracle = referee(model, x, y, budget=4)
    x_adv = attack_with(attack, oracle, x, y)
    assert oracle.ledger.first_hit.tolist() == [3] * 3
    assert torch.equal(x_adv, model.asked[2])  # up-Square refuses a drop of 0.6


RULES = {
    "bi": partial(both_ways, 3), "up": partial(upward, 3), "switch": partial(switching, 3),
    "reverse": partial(reversing, 2), "explore": partial(exploring, 1.0),
    "annealing": partial(annealing, 9.0, 0.9, 20, False),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_no_answer_is_never_taken_and_never_remembered(rule):
    nan, held = torch.tensor([math.nan] * 3).double(), torch.tensor([1.0, -1.0, 5.0]).double()
    memory = torch.tensor([0, 1, 19])
    accepted, after = RULES[rule](held, nan, memory, SampleRng.create(0, torch.arange(3), "attack"))
    assert not accepted.any()
    assert torch.equal(after, memory)


def share_taken(rule, rise, memory=0, n=20_000):
    """The share of ``n`` samples that take a proposal whose margin is higher by ``rise``, and their memories."""
    held = torch.full((n,), 2.0).double()
    rng = SampleRng.create(0, torch.arange(n), "attack")
    accepted, after = rule(held, held + rise, torch.full((n,), memory), rng)
    return accepted.double().mean().item(), after


@pytest.mark.parametrize("chance", [0.02, 0.3])
def test_exploring_takes_a_rise_with_its_chance(chance):
    share, _ = share_taken(partial(exploring, chance), 100.0)
    assert abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / 20_000)
    assert share_taken(partial(exploring, chance), -0.01)[0] == 1


@pytest.mark.parametrize(("rise", "proposals"), [(0.5, 0), (2.0, 0), (0.5, 3), (0.1, 10)])
def test_annealing_takes_a_rise_with_the_chance_of_its_temperature(rise, proposals):
    expected = math.exp(-rise / (1.5 * 0.8**proposals))
    share, after = share_taken(partial(annealing, 1.5, 0.8, 7, False), rise, 7 * proposals + 6)
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 20_000)
    assert set(after.tolist()) == {0, 7 * (proposals + 1) + 6}  # the seventh refusal heats, an acceptance cools


def test_annealing_counts_refusals_and_heats_after_them():
    rule, memory, temperatures = partial(annealing, 1e-3, 0.5, 3, False), 0, []
    for rise in (1, -1, 1, 1, 1):  # refused, taken, refused, refused: heated
        temperatures.append(1e-3 * 0.5 ** (memory // 3))
        memory = share_taken(rule, rise, memory, n=1)[1].item()
    assert temperatures == [1e-3, 5e-4, 2.5e-4, 1.25e-4, 1e-3]


def test_refusals_in_a_row_are_forgotten_at_an_acceptance():
    rule, memory, temperatures = partial(annealing, 1e-3, 0.5, 3, True), 0, []
    for rise in (1, 1, -1, 1, 1, 1, 1):
        temperatures.append(1e-3 * 0.5 ** (memory // 3))
        memory = share_taken(rule, rise, memory, n=1)[1].item()
    assert temperatures == [1e-3, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5, 3.125e-5, 1e-3]


class TestPresetOfDLD:
    def test_reverse_bears_23_refusals_and_takes_the_24th(self):
        _, rule = ReverseSquare(preset="dld").tactic()
        held, memory, rng = torch.tensor([1.0]), torch.tensor([0]), SampleRng.create(0, torch.arange(1), "attack")
        found = []
        for _ in range(25):
            accepted, memory = rule(held, held + 1, memory, rng)
            found.append(accepted.item())
        assert found == [False] * 23 + [True, True]  # from then on upwards

    def test_explore_takes_half(self):
        _, rule = ExploreSquare(preset="dld").tactic()
        assert share_taken(rule, 9.0)[0] == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(20_000))

    def test_annealing_starts_at_25_cools_by_three_in_a_thousand_and_heats_after_more_than_20_in_a_row(self):
        _, rule = AnnealingSquare(preset="dld").tactic()
        share, after = share_taken(rule, 25.0)
        assert share == pytest.approx(math.exp(-1), abs=0.02)
        cooled = share_taken(rule, 25.0, 21 * 100)[0]
        assert cooled == pytest.approx(math.exp(-1 / 0.997**100), abs=0.02)
        assert set(after.tolist()) == {21, 22}
        assert share_taken(rule, 1e9, 21 * 7 + 19, n=1)[1].item() == 21 * 8 + 20
        assert share_taken(rule, 1e9, 21 * 7 + 20, n=1)[1].item() == 0
        assert share_taken(rule, -1.0, 21 * 7 + 20, n=1)[1].item() == 21 * 8

    def test_the_search_is_that_of_the_code(self):
        for attack in (ReverseSquare(preset="dld"), ExploreSquare(preset="dld"), AnnealingSquare(preset="dld")):
            assert attack.rescaled
            assert attack.square("linf") == Square(p_init=0.05, rescale=True, edges="reference")
            assert attack.square("l2").p_init == 0.3
        assert not ReverseSquare().rescaled

    def test_other_constants_beside_it_are_refused(self):
        with pytest.raises(ConfigError, match="preset=dld fixes p_init, patience; leave out the one or the other"):
            ReverseSquare(preset="dld", p_init=0.1, patience=5)


PLAIN = {
    "bi": BiSquare(jump=0.5), "up": UpSquare(jump=0.5), "switch": SwitchSquare(patience=3),
    "reverse": ReverseSquare(patience=2), "explore": ExploreSquare(chance=0.2),
    "annealing": AnnealingSquare(heat=0.5, cooling=0.9, patience=4), "confidence": ConfidenceSquare(),
    "decode": DecodeSquare(interval=0.7),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_search_of_one_sample_at_a_time_asks_the_same(name):
    """The slow reference: plain numbers for the rule, Square's proposals from the same random numbers."""
    attack = PLAIN[name]
    budget, eps, model = 40, 0.02, Linear(classes=4)
    x = images(6)
    y = model(x).argmax(1)
    oracle = referee(model, x, y, eps=eps, budget=budget)
    x_adv = attack_with(attack, oracle, x, y)
    for i in range(6):
        rng = SampleRng.create(0, torch.tensor([i]), "attack")
        proposals = Linf(x[i : i + 1], Threat("linf", eps, "scores", budget), 0)
        u, held, up, refusals, temperature, hit = None, None, name == "up", 0, 0.5, NEVER
        for query in range(1, budget + 1):
            share = Square(p_init=0.3)._share(0.3, query - 2, budget)
            if u is None:
                candidate = proposals.start(rng.fork("start"))
            else:
                candidate = proposals.propose(u, window_side(share, (8, 8)), rng.fork(query - 1))
            logits = model(candidate)[0].tolist()
            value = logits[y[i]] - max(z for k, z in enumerate(logits) if k != y[i])
            if value < 0:
                hit, u = query, candidate
                break
            if name == "decode":
                k = math.ceil(value / 0.7) - 1
                value = k * 0.7 + (k + 1) * 0.7 - value
            if name == "confidence":
                value = 1 / sum(math.exp(z - logits[y[i]]) for z in logits)
            if u is None:
                u, held = candidate, value
                continue
            rise = value - held
            take = rise > 0 if up else rise < 0
            if name in ("bi", "up") and up and rise < -0.5:
                take = True
            if name == "bi" and rise > 0.5:
                up = True
            if name == "explore":
                take = take or rng.fork(query - 1).fork("explore").uniform().item() < 0.2
            if name == "annealing":
                take = take or rng.fork(query - 1).fork("anneal").uniform().item() > 1 - math.exp(-rise / temperature)
                temperature *= 0.9
                refusals += not take
                if refusals == 4:
                    temperature, refusals = 0.5, 0
            else:
                refusals = 0 if take else refusals + 1
            if name in ("switch", "reverse") and refusals == 3:
                up, refusals, take = not up, 0, name == "reverse"
            if take:
                u, held = candidate, value
        assert oracle.ledger.first_hit[i].item() == hit
        assert torch.equal(x_adv[i], u[0])


def test_the_confidence_attack_is_square_on_the_probability():
    model, x = Linear(classes=5), images(20)
    y = model(x).argmax(1)
    oracles = [referee(model, x, y, eps=0.015, budget=60) for _ in range(2)]
    one, other = (
        attack_with(attack, oracle, x, y)
        for attack, oracle in zip((ConfidenceSquare(), Square(p_init=0.3, loss="prob")), oracles, strict=True)
    )
    assert torch.equal(one, other)
    assert torch.equal(oracles[0].ledger.first_hit, oracles[1].ledger.first_hit)


def test_decoding_undoes_the_mirror_everywhere_even_at_the_ends_of_intervals():
    true = torch.cat((torch.arange(0, 24, 0.25), torch.tensor([5.9999, 6.0001, 12.0]))).double()
    reported = linear_target(true, 6.0, 1.0)
    logits = torch.stack((reported, torch.zeros_like(reported)), dim=1)
    y = torch.zeros(len(true), dtype=torch.int64)
    assert torch.allclose(decoded(Edit(6.0), logits, y), true, atol=1e-9)
    assert decoded(Edit(6.0), torch.zeros(1, 2), y[:1]).item() == 6  # clamped there by the solver from just below
    assert decoded(Edit(6.0), torch.tensor([[-2.0, 0.0]]), y[:1]).item() == -2


@pytest.mark.parametrize(("interval", "height", "offset"), [(6, 0.3, 0), (4, 0.5, 0), (6, 1, 2.5), (4, 1, 3.9)])
def test_decoding_undoes_the_dashed_lines_and_a_moved_mirror(interval, height, offset):
    true = 30 * torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    edited = linear_target(true, interval, 1.0, offset) if height == 1 else dashed(true, interval, height, 0.04, 0.5)
    logits = torch.stack((edited, torch.zeros_like(edited)), dim=1)
    assert torch.allclose(decoded(Edit(interval, height, offset), logits, torch.zeros(20_000, dtype=torch.int64)), true)


def test_decoding_for_aaa_gives_the_bits_that_committed_rows_were_made_with():
    reported = 40 * torch.rand(100_000, generator=torch.Generator().manual_seed(0)) - 5
    logits, y = torch.stack((reported, torch.zeros_like(reported)), dim=1), torch.zeros(100_000, dtype=torch.int64)
    centre = ((reported / 6.0).ceil().clamp(min=1) - 0.5) * 6.0
    assert torch.equal(decoded(Edit(6.0), logits, y), torch.where(reported < 0, reported, 2 * centre - reported))


def test_an_offset_beside_the_dashed_lines_is_refused():
    with pytest.raises(ConfigError, match=r"it moves AAA's borders \(height=1\) by less than the interval"):
        DecodeSquare(height=0.3, offset=1.0)


@lru_cache
def undefended_and_defended():
    """Robust accuracy of a small network behind AAA-linear under each attack; ``none``: Square on the network alone."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 10)).eval()
    with torch.no_grad():
        model[-1].weight *= 600  # margins over several intervals
        model[-1].bias *= 600
    x = torch.rand(200, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    y = model(x).argmax(1)
    assert margin(model(x), y).quantile(0.75) > 12
    defended = AAALinear()(model, NOTHING, 0)

    def robust(attack, served):
        oracle = referee(served, x, y, eps=0.03, budget=100)
        attack_with(attack, oracle, x, y)
        return (oracle.ledger.first_hit == NEVER).float().mean().item()

    square = Square(p_init=0.3)
    adaptive = {
        "bi": BiSquare(), "up": UpSquare(), "switch": SwitchSquare(), "reverse": ReverseSquare(),
        "decode": DecodeSquare(),
    }  # fmt: skip
    return {"none": robust(square, model), "square": robust(square, defended)} | {
        name: robust(attack, defended) for name, attack in adaptive.items()
    }


def test_decoding_takes_the_defense_away_while_square_fails():
    found = undefended_and_defended()
    p = found["none"]
    noise = 2 * math.sqrt(2 * p * (1 - p) / 200)
    assert found["decode"] <= p + noise
    assert found["square"] > p + 2 * noise


@pytest.mark.parametrize("name", ["up", "switch", "reverse"])
def test_going_up_beats_square_on_mirrored_margins(name):
    found = undefended_and_defended()
    assert found[name] < found["square"] - 2 * math.sqrt(0.5 / 200)


def noisy(draws, budget, *, sigma, n=8, eps=0.02):
    """A plain Square (``draws`` None) or one that averages, against Gaussian noise on the logits of a linear model."""
    model, x = Linear(classes=4), images(n)
    y = model(x).argmax(1)
    attack = Square(p_init=0.3) if draws is None else EOTSquare(draws=draws)
    served = Noisy(model, sigma)
    oracle = referee(served, x, y, eps=eps, budget=budget, random=True, rules=rules_of(attack))
    return attack_with(attack, oracle, x, y), oracle.ledger, x, y, model


@pytest.mark.parametrize(("draws", "budget"), [(1, 40), (3, 60), (5, 63)])
def test_a_plain_average_of_one_sample_at_a_time_asks_the_same(draws, budget):
    """The slow reference: one query after the other, the last call cut short by the budget."""
    x_adv, ledger, x, y, model = noisy(draws, budget, sigma=2.0)
    for i in range(8):
        rng, noise = (SampleRng.create(0, torch.tensor([i]), purpose) for purpose in ("attack", "defense"))
        proposals = Linf(x[i : i + 1], Threat("linf", 0.02, "scores", budget), 0)
        u, held, hit, queries, calls = None, math.inf, NEVER, 0, 0
        while queries < budget and hit == NEVER:
            if u is None:
                candidate = proposals.start(rng.fork("start"))
            else:
                side = window_side(Square()._share(0.3, calls - 1, budget), (8, 8))
                candidate = proposals.propose(u, side, rng.fork(calls))
            calls, answers = calls + 1, []
            while len(answers) < draws and queries < budget:
                queries += 1
                answers.append(model(candidate)[0] + 2.0 * noise.fork(queries).normal(4)[0].double())
            mean = [sum(values) / len(answers) for values in zip(*[one.tolist() for one in answers], strict=True)]
            value = mean[y[i]] - max(z for k, z in enumerate(mean) if k != y[i])
            if value < held:
                u, held = candidate, value
            if value < 0:
                hit, u = queries, candidate
        assert ledger.first_hit[i].item() == hit
        assert ledger.forwards[i].item() == queries
        assert torch.equal(x_adv[i], u[0])


def test_what_an_average_beats_is_wrong_again_far_more_often_than_what_was_lucky_once():
    def again(draws):
        """For each sample that fell, the share of 100 fresh draws that misclassify its final example."""
        x_adv, ledger, _, y, model = noisy(draws, 200, sigma=1.0, n=200, eps=0.005)
        hit = ledger.first_hit != NEVER
        noise = torch.randn(int(hit.sum()), 100, 4, generator=torch.Generator().manual_seed(0)).double()
        return ((model(x_adv[hit])[:, None] + noise).argmax(2) != y[hit, None]).double().mean(1)

    lucky, real = again(None), again(10)
    assert min(len(lucky), len(real)) > 50
    error = math.sqrt(lucky.var() / len(lucky) + real.var() / len(real))
    assert real.mean() > 1.5 * lucky.mean() + 2 * error


@pytest.mark.parametrize("attack", EVERY)
def test_impossible_parameters_are_refused(attack):
    wrong = [
        {"p_init": 0.0}, {"p_init": 1.5}, {"jump": 0.0}, {"jump": math.inf}, {"interval": math.nan}, {"patience": 0},
        {"chance": -0.1}, {"chance": 1.1}, {"heat": 0.0}, {"heat": math.inf}, {"cooling": 0.0}, {"cooling": 1.1},
        {"draws": 0},
    ]  # fmt: skip
    for arguments in wrong:
        if set(arguments) <= set(attack.__dataclass_fields__):
            with pytest.raises(ConfigError):
                attack(**arguments)
