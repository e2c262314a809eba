"""RND: the noise has the asked size, is new at each query, and vanishes with sigma."""

import pytest
import torch
from torch import nn

from bench.errors import ConfigError
from bench.registry import defenses
from defenses.rnd import RandomNoiseDefense
from tests.served import NOTHING, Echo, query


def test_without_noise_it_is_the_model_bit_for_bit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()
    served = RandomNoiseDefense(sigma=0)(model, NOTHING, 0)
    x = torch.rand(16, 3, 8, 8)
    assert torch.equal(served(x, query(0, 16)), model(x))


def test_noise_has_the_asked_deviation():
    x = torch.full((64, 3, 16, 16), 0.5)
    noise = RandomNoiseDefense(sigma=0.05)(Echo(), NOTHING, 0)(x, query(0, 64)) - 0.5
    n = noise.numel()
    assert noise.mean().abs() < 4 * 0.05 / n**0.5
    assert noise.std().item() == pytest.approx(0.05, rel=4 / (2 * n) ** 0.5)  # of a normal sample's deviation


def test_averaging_queries_shrinks_the_deviation_by_their_root():
    x, q = torch.full((32, 3, 16, 16), 0.5), 16
    served = RandomNoiseDefense(sigma=0.05)(Echo(), NOTHING, 0)
    mean = torch.stack([served(x, query(number, 32)) for number in range(q)]).mean(dim=0)
    n = mean.numel()
    assert mean.std().item() == pytest.approx(0.05 / q**0.5, rel=4 / (2 * n) ** 0.5)


def test_each_query_and_row_has_its_own_noise_and_a_repeat_the_same():
    x = torch.full((4, 1, 4, 4), 0.5)
    served = RandomNoiseDefense()(Echo(), NOTHING, 0)
    first = served(x, query(0, 4))
    assert torch.equal(served(x, query(0, 4)), first)
    assert not torch.equal(served(x, query(1, 4)), first)
    assert len(first.unique(dim=0)) == 4


def test_a_row_does_not_depend_on_its_batch():
    x, rows = torch.rand(8, 3, 4, 4), torch.tensor([6, 1])
    served = RandomNoiseDefense()(Echo(), NOTHING, 0)
    assert torch.equal(served(x, query(0, 8))[rows], served(x[rows], query(0, 8)[rows]))


@pytest.mark.parametrize("clip", [True, False])
def test_clipping_decides_whether_noise_leaves_the_box(clip):
    x = torch.ones(4, 3, 8, 8)
    shown = RandomNoiseDefense(sigma=0.1, clip=clip)(Echo(), NOTHING, 0)(x, query(0, 4))
    assert (shown.max() <= 1) == clip


def test_no_streams_or_too_few_are_refused():
    served = RandomNoiseDefense()(Echo(), NOTHING, 0)
    with pytest.raises(ValueError, match="no random streams for 2 images"):
        served(torch.rand(2, 1, 4, 4))
    with pytest.raises(ValueError, match="1 random streams for 2 images"):
        served(torch.rand(2, 1, 4, 4), query(0, 1))


def test_a_negative_deviation_is_refused():
    with pytest.raises(ConfigError, match="sigma is -1"):
        defenses.create("rnd(sigma=-1)")
