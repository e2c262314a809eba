"""QueryNet: Square without networks, one query a round with them, and what its votes and corners are."""

import pytest
import torch
from torch import nn

from attacks.query_net import QueryNet, _Team, _Voted
from attacks.square import Square
from bench.losses import margin
from bench.rng import SampleRng
from bench.run.executor import Local
from bench.threat import Threat
from tests.problems import Recorded, attack_with, curved, images, referee
from tests.test_executors import run_in
from tests.test_fitted import NET
from tests.test_runner import grid

SMALL = {"network": "cnn(width=2)", "first_steps": 5, "steps": 1, "fewest": 2}


def problem(n=30, budget=30, eps=0.05, **settings):
    model, x = curved((1, 8, 8)), images(n, (1, 8, 8))
    y = model(x).argmax(1)
    recorded = Recorded(model)
    return recorded, x, y, referee(recorded, x, y, eps=eps, budget=budget, classes=4, **settings)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_without_networks_it_is_square_bit_for_bit(norm):
    found = []
    for attack in (QueryNet(networks=0), Square()):
        recorded, x, y, oracle = problem(norm=norm, eps={"linf": 0.05, "l2": 0.6}[norm])
        found.append((attack_with(attack, oracle, x, y), oracle.ledger, torch.cat(recorded.asked)))
    (one, ledger, asked), (other, ledger_of_square, asked_by_square) = found
    assert torch.equal(one, other)
    assert torch.equal(ledger.first_hit, ledger_of_square.first_hit)
    assert torch.equal(asked, asked_by_square)
    assert 0 < (ledger.first_hit > 0).sum() < len(one)


def test_each_image_that_stands_costs_one_query_a_round():
    recorded, x, y, oracle = problem()
    attack_with(QueryNet(**SMALL), oracle, x, y)
    hits = oracle.ledger.first_hit
    for number, asked in enumerate(recorded.asked, 1):
        assert len(asked) == ((hits == -1) | (hits >= number)).sum()
    assert (oracle.ledger.forwards == torch.where(hits > 0, hits, 30)).all()


def team(n=12):
    _, x, y, oracle = problem(n)
    attack = QueryNet(networks=2, **SMALL)
    rng = SampleRng.create(0, oracle.active(), "attack")
    return _Team(attack, oracle.oracle, x, y, Threat("linf", 0.05, "scores", 30), rng), x, y


class Fixed(nn.Module):
    """Logits linear in the pixels."""

    def __init__(self, seed):
        super().__init__()
        self.layer = nn.Linear(64, 4)
        self.layer.weight.data = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))

    def forward(self, x):
        return self.layer(x.flatten(1))


def test_the_lowest_margin_by_authority_is_asked_about():
    crew, x, y = team()
    crew.networks, crew.authority = [Fixed(1), Fixed(2)], [0.5, 0.25, 0.1]
    options = torch.stack([images(12, (1, 8, 8), seed) for seed in (3, 4, 5)])
    votes = _Voted(crew, None, x, y)._votes(options)
    for option in range(3):
        shown = options[option].float()
        one, other = (margin(network(shown), y) for network in crew.networks)
        torch.testing.assert_close(votes[option], (0.5 * one + 0.25 * other) / 2)


def test_a_network_proposes_the_corner_to_which_its_gradient_points():
    crew, x, y = team()
    network = Fixed(1)
    corner = _Voted(crew, None, x, y)._corner(network, x)
    probabilities = network(x.float()).softmax(1) - nn.functional.one_hot(y, 4)
    gradient = (probabilities @ network.layer.weight).view_as(x)
    torch.testing.assert_close(corner, x + 0.05 * gradient.sign().to(x))


def test_authority_is_the_share_of_improvements_and_square_goes_on_alone_with_the_most():
    crew, _, _ = team()
    nan, better, worse = float("nan"), -1.0, 1.0
    held, memory, rng = torch.zeros(7), torch.zeros(7, dtype=torch.int64), None
    crew.chosen = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    crew.rule(held, torch.tensor([better, worse, worse, nan, better, worse, worse]), memory, rng)
    assert crew.authority == pytest.approx([1 / 3, 0, 0])  # one proposal of the second is too few
    assert not crew.alone
    crew.chosen = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    crew.rule(held, torch.tensor([better, worse, worse, worse, better, better, better]), memory, rng)
    assert crew.authority == [0.5, 0, 1]
    assert crew.alone


def test_networks_learn_the_answers_and_the_buffer_holds_each_of_them():
    crew, x, _ = team(30)
    crew.attack = QueryNet(networks=2, network="cnn(width=4)", first_steps=100)
    crew.steps = 100
    crew.scores(x)
    targets = crew.told[0]
    assert len(targets) == 30
    torch.testing.assert_close(targets.sum(dim=1), torch.zeros(30), atol=1e-5, rtol=0)
    crew.learn()
    for network in crew.networks:
        with torch.no_grad():
            logits = network(x.float())
        left = (logits - logits.mean(dim=1, keepdim=True) - targets).square().mean() / targets.var()
        assert left < 0.5
    crew.scores(x[:5], torch.arange(5))  # under numbers of the batch
    assert sum(map(len, crew.told)) == 35


def test_all_samples_of_a_cell_are_attacked_together(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    model = f"{tmp_path}/net.py:net"
    (task,) = grid(attack=["query-net(networks=0)"], defense=["none"], n=20, model=[model], queries=3)
    store, outcome, _ = run_in(tmp_path, [task], Local(), shard_size=5)
    row = store.row(task.cell)
    assert outcome.failed == 0
    assert len(row.shards) == 1
    assert "batch-dependent" in row.cell.attack.traits
