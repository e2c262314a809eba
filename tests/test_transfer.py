"""Transfer: plain PGD on the twin gives the same examples, and what keeps decisions falls as its twin does."""

import pytest
import torch
from torch import nn

from attacks.pgd import PGD
from attacks.square import Square
from attacks.transfer import Transfer
from bench.dataset import Split
from bench.errors import AccessError, ConfigError
from bench.oracle import NEVER
from bench.oracle.served import ServedModel
from bench.rng import SampleRng
from defenses.aaa import AAALinear
from tests.problems import Linear, attack_with, images, referee

NOTHING = Split(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64))


class Always(nn.Module):
    """Says the first class, whatever it is asked, and keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x):
        self.asked.append(x.clone())
        return torch.stack((x.new_ones(len(x)), x.new_zeros(len(x))), dim=1)


class Curved(nn.Module):
    """A small network, so that the gradient turns on the way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        layers = nn.Flatten(), nn.Linear(192, 16), nn.Tanh(), nn.Linear(16, 4)
        self.layers = nn.Sequential(*layers).double().requires_grad_(False)

    def forward(self, x):
        return 5 * self.layers(x)


def replay(attack, defended, twin, x, y, **settings):
    oracle = referee(defended, x, y, access="labels", surrogate=ServedModel(twin), **settings)
    return attack_with(attack, oracle, x, y), oracle.ledger


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.5)])
def test_a_plain_pgd_of_one_sample_at_a_time_asks_the_same(norm, eps):
    steps, restarts, twin, defended, x = 5, 3, Curved(), Always(), images(4)
    y = torch.zeros(4, dtype=torch.int64)
    replay(Transfer(steps=steps, rel_step=0.3, restarts=restarts), defended, twin, x, y, norm=norm, eps=eps)
    assert len(defended.asked) == restarts

    def project(u, centre):
        if norm == "linf":
            return torch.clamp(torch.clamp(u, centre - eps, centre + eps), 0, 1)
        length = (u - centre).norm()
        return (centre + (u - centre) * min(1, eps / length)).clamp(0, 1)

    for i in range(4):
        for restart in range(restarts):
            rng = SampleRng.create(0, torch.tensor([i]), "attack").fork(restart).fork(0)
            if norm == "linf":
                start = eps * (2 * rng.uniform(3, 8, 8)[0].double() - 1)
            else:
                normal, radius = rng.normal(3, 8, 8)[0].double(), rng.fork("radius").uniform()[0].double() ** (1 / 192)
                start = eps * radius * normal / normal.norm()
            u, best, lowest = project(x[i] + start, x[i]), None, torch.inf
            for _ in range(steps + 1):
                u.requires_grad_(True)
                z = twin(u[None])[0]
                margin = z[0] - z[1:].max()
                (g,) = torch.autograd.grad(margin, u)
                u = u.detach()
                if margin < lowest:
                    best, lowest = u, margin.item()
                u = project(u - 0.3 * eps * (g.sign() if norm == "linf" else g / g.norm()), x[i])
            torch.testing.assert_close(defended.asked[restart][i], best, rtol=0, atol=1e-9)


def test_every_sample_is_pushed_to_the_lowest_margin_also_one_that_the_twin_gets_wrong():
    twin, x, y = Linear(), images(20), torch.zeros(20, dtype=torch.int64)
    right = twin(x).argmax(1) == y
    assert right.any()
    assert not right.all()
    x_adv, ledger = replay(Transfer(steps=30), Always(), twin, x, y, eps=0.05)
    lowest = x - 0.05 * (twin.weight[0] - twin.weight[1]).sign().view(3, 8, 8)  # the corner, in closed form
    torch.testing.assert_close(x_adv, lowest, rtol=0, atol=1e-9)
    assert ledger.forwards.tolist() == [1] * 20
    assert ledger.backwards.tolist() == [0] * 20  # the twin is nobody's ledger


def test_what_keeps_decisions_falls_exactly_where_its_twin_does():
    """AAA-linear confuses Square, which it was made for; the control is not fooled."""
    twin, x = Curved(), images(100)
    y = twin(x).argmax(1)
    defended, eps = AAALinear()(twin, NOTHING, 0), 0.01
    fallen = {}
    for name, model, attack in (
        ("pgd", twin, PGD(steps=20)), ("square", twin, Square()), ("square on aaa", defended, Square()),
    ):  # fmt: skip
        oracle = referee(model, x, y, eps=eps, access="gradients", budget=60)
        attack_with(attack, oracle, x, y)
        fallen[name] = oracle.ledger.first_hit != NEVER
    _, ledger = replay(Transfer(steps=20), defended, twin, x, y, eps=eps)
    assert 10 < fallen["pgd"].sum() < 90
    assert fallen["square on aaa"].sum() < fallen["square"].sum() / 2
    assert (ledger.first_hit != NEVER).sum() >= fallen["pgd"].sum() - 1  # PGD has one start of its own
    _, on_twin = replay(Transfer(steps=20), twin, twin, x, y, eps=eps)
    assert torch.equal(ledger.first_hit, on_twin.first_hit)


def test_restarts_cost_a_query_each_up_to_the_budget():
    x, y = images(3), torch.zeros(3, dtype=torch.int64)
    for restarts, budget in ((5, 2), (2, 5)):
        defended = Always()
        _, ledger = replay(Transfer(steps=2, restarts=restarts), defended, Curved(), x, y, budget=budget)
        assert ledger.forwards.tolist() == [2] * 3
        assert not torch.equal(*defended.asked)


def test_only_who_declares_it_gets_the_twin():
    x, y = images(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(AccessError, match=r"sly asked for the undefended .* declare rules = Rules\(surrogate=True\)"):
        _ = referee(Linear(), x, y, attack="sly").surrogate


def test_impossible_parameters_are_refused():
    for arguments in ({"steps": 0}, {"rel_step": 0.0}, {"restarts": 0}):
        with pytest.raises(ConfigError):
            Transfer(**arguments)
