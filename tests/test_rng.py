"""Random numbers belong to a sample: they do not depend on its company, and they look random."""

import math

import pytest
import torch

from bench.rng import SampleRng
from tests.pretend import GPU, pretended_gpu

IDS = torch.arange(1000)


def test_a_sample_draws_the_same_numbers_in_any_batch():
    together = SampleRng.create(3, IDS, "test").fork(7).normal(3, 4, 4)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    shuffled = SampleRng.create(3, IDS[order], "test").fork(7).normal(3, 4, 4)
    alone = SampleRng.create(3, torch.tensor([417]), "test").fork(7).normal(3, 4, 4)
    assert torch.equal(shuffled, together[order])
    assert torch.equal(alone[0], together[417])


def test_selecting_rows_and_forking_commute():
    rng = SampleRng.create(0, IDS, "test")
    rows = torch.tensor([5, 2, 9])
    steps = torch.arange(1000)
    assert torch.equal(rng[rows].fork("a").fork(2).words(5), rng.fork("a").fork(2)[rows].words(5))
    assert torch.equal(rng.fork(steps)[rows].words(5), rng[rows].fork(steps[rows]).words(5))
    assert torch.equal(rng.fork(steps)[rows[:1]].words(5), rng[rows[:1]].fork(5).words(5))


def test_a_gpu_draws_for_the_steps_to_come_what_each_of_them_draws():
    def draws(device):
        rng, found = SampleRng.create(0, IDS[:20].to(device), "test"), []
        for step in (3, 4, 5, 19, 21, 4, 2, 40):
            here = rng.fork(step)
            signs = here.fork("signs").coins(3)
            signs.zero_()  # whoever writes into what was drawn writes into it alone
            found += [here.words(2), here.uniform(1, 2), here.fork("signs").coins(3), here.fork("x").fork("y").words(3),
                      here.fork(step).words(1), here.normal(3), here.words(40), here.integers(7),
                      here[IDS[:4].to(device)].fork("x").words(2)]  # fmt: skip
        return [draw.cpu() for draw in found]

    with pretended_gpu():
        there = draws(GPU)
    assert all(torch.equal(one, other) for one, other in zip(there, draws(torch.device("cpu")), strict=True))


def test_every_fork_of_a_sample_has_the_same_owner():
    rng = SampleRng.create(0, IDS, "test")
    assert len(rng.owners.unique()) == len(IDS)
    assert torch.equal(rng.fork("a").fork(IDS).owners, rng.owners)
    assert torch.equal(rng.fork(3)[IDS[5:9]].owners, SampleRng.create(0, IDS[5:9], "test").owners)


@pytest.mark.parametrize("other", [{"seed": 1}, {"purpose": "other"}, {"fork": 1}, {"fork": "x"}])
def test_another_seed_purpose_or_fork_is_another_stream(other):
    def draw(seed=0, purpose="test", fork=0):
        return SampleRng.create(seed, IDS, purpose).fork(fork).uniform(8).flatten()

    a, b = draw(), draw(**other)
    correlation = torch.corrcoef(torch.stack((a, b)))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(a.numel())
    assert not torch.equal(a, b)


def test_moments_of_every_distribution():
    rng = SampleRng.create(0, IDS, "moments")
    n = 1000 * 400
    uniform, normal = rng.uniform(400), rng.fork("n").normal(400)
    coins, integers = rng.fork("c").coins(400), rng.fork("i").integers(7, 400)
    assert abs(uniform.mean() - 0.5) < 4 * math.sqrt(1 / 12 / n)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(normal.mean()) < 4 / math.sqrt(n)
    assert abs(normal.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((normal**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert abs(coins.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    shares = torch.bincount(integers.flatten(), minlength=7) / n
    assert shares.numel() == 7
    assert (shares - 1 / 7).abs().max() < 4 * math.sqrt(1 / 7 * 6 / 7 / n)


def test_lanes_and_neighbouring_samples_are_uncorrelated():
    draws = SampleRng.create(0, IDS, "lanes").normal(64)
    lanes = torch.corrcoef(draws.T) - torch.eye(64)
    assert lanes.abs().max() < 5 / math.sqrt(1000)
    neighbours = (draws[1:] * draws[:-1]).mean()
    assert abs(neighbours) < 4 / math.sqrt(999 * 64)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    SampleRng.create(0, IDS, "test").normal(10)
    assert torch.equal(torch.rand(3), expected)
