"""Crowd-square: a plain search asks the same, each sample has its batch to itself, and all of it is paid."""

import pytest
import torch
from torch import nn

from attacks.crowd_square import CrowdSquare
from attacks.square import Square, window_side
from attacks.windows import Linf
from bench.dataset import Split
from bench.errors import ConfigError
from bench.oracle import NEVER
from bench.rng import SampleRng
from bench.threat import Threat
from defenses.dent import DENT
from tests.problems import Linear, Noisy, attack_with, images, referee

NOTHING = Split(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64))


class Coupled(nn.Module):
    """Adds to the logits of a row how far it is from the mean of its batch; keeps what it was asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, []

    def forward(self, x):
        self.asked.append(x.clone())
        logits = self.model(x)
        return logits + 3 * (logits - logits.mean(dim=0))


@pytest.mark.parametrize("copies", [1, 4])
def test_a_plain_search_of_one_sample_at_a_time_asks_the_same(copies):
    budget, eps, jitter, linear = 40, 0.02, 1e-3, Linear(classes=4)
    model, x = Coupled(linear), images(6)
    y = linear(x).argmax(1)
    oracle = referee(model, x, y, eps=eps, budget=budget, alone=True)
    x_adv = attack_with(CrowdSquare(copies=copies, jitter=jitter), oracle, x, y)
    asked = model.asked.copy()
    assert all(len(batch) == copies for batch in asked)
    for i in range(6):
        rng = SampleRng.create(0, torch.tensor([i]), "attack")
        low, high = x[i] - eps, x[i] + eps
        proposals = Linf(x[i : i + 1], Threat("linf", eps, "scores", budget), 0)
        u, held, hit, queries = None, None, NEVER, 0
        for number in range(budget // copies):
            if u is None:
                candidate = proposals.start(rng.fork("start"))[0]
            else:
                side = window_side(Square()._share(0.05, number - 1, budget), (8, 8))
                candidate = proposals.propose(u[None], side, rng.fork(number))[0]
            noise = 2 * rng.fork("crowd").fork(number).uniform(copies, 3, 8, 8)[0].double() - 1
            crowd = [candidate] + [(candidate + jitter * one).clamp(low, high).clamp(0, 1) for one in noise[1:]]
            batch = torch.stack(crowd)
            assert any(torch.allclose(batch, other, rtol=0, atol=1e-12) for other in asked)
            logits = model(batch)
            for image, answer in zip(crowd, logits, strict=True):
                queries += 1
                if answer.argmax() != y[i] and hit == NEVER:
                    hit, u = queries, image
            if hit != NEVER:
                break
            mean = logits.mean(dim=0).tolist()
            value = mean[y[i]] - max(z for k, z in enumerate(mean) if k != y[i])
            if u is None or value < held:
                u, held = candidate, value
        assert oracle.ledger.first_hit[i].item() == hit
        assert oracle.ledger.forwards[i].item() == (hit if hit != NEVER else budget // copies * copies)
        torch.testing.assert_close(x_adv[i], u, rtol=0, atol=1e-12)
    assert (oracle.ledger.first_hit != NEVER).any()


def attacked(attack, model, x, y, ids, alone):
    oracle = referee(model, x[ids], y[ids], eps=0.05, budget=40, ids=ids, alone=alone)
    attack_with(attack, oracle, x[ids], y[ids], ids=ids)
    return oracle.ledger.best_margin


def test_behind_online_dent_no_other_sample_has_a_say():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)]
    network = nn.Sequential(*layers).double().eval()
    x = images(8)
    y = network(x).argmax(1)
    served = DENT(variant="online")(network, NOTHING, 0)
    halves = torch.arange(8).split(4)
    for attack, alone, same in ((CrowdSquare(copies=4), True, True), (Square(), False, False)):
        whole = attacked(attack, served, x, y, torch.arange(8), alone)
        apart = torch.cat([attacked(attack, served, x, y, half, alone) for half in halves])
        assert torch.allclose(whole, apart, atol=1e-9) == same


def test_random_models_give_each_query_its_own_noise():
    """Alone or together: the same streams, so a model that does not couple its batch answers alike."""
    x, model = images(3), Linear()
    y = model(x).argmax(1)
    probes = x[:, None].repeat(1, 5, 1, 1, 1)
    together, alone = (
        referee(Noisy(model, 0.1), x, y, random=True, alone=alone).scores(probes) for alone in (False, True)
    )
    assert torch.equal(together.nan_to_num(), alone.nan_to_num())
    assert (together[:, 1:] != together[:, :1]).all()


def test_a_budget_below_the_crowd_makes_the_crowd_smaller():
    model, x = Coupled(Linear()), images(2)
    oracle = referee(model, x, Linear()(x).argmax(1), eps=0.0, budget=3, alone=True)
    attack_with(CrowdSquare(copies=8), oracle, x, Linear()(x).argmax(1))
    assert oracle.ledger.forwards.tolist() == [3, 3]
    assert [len(batch) for batch in model.asked] == [3, 3]


def test_impossible_parameters_are_refused():
    for arguments in ({"copies": 0}, {"jitter": -1e-4}, {"jitter": 1 / 255}, {"jitter": float("nan")}, {"p_init": 0.0}):
        with pytest.raises(ConfigError):
            CrowdSquare(**arguments)
