"""Output noise: exactly the model without noise, and exactly Gaussian logits with sigma."""

import pytest
import torch

from bench.errors import ConfigError
from bench.registry import defenses
from defenses.output_noise import OutputNoise
from tests.served import NOTHING, Echo, query

CLASSES = 10


def noise(sigma: float, rows: int, number: int = 0) -> torch.Tensor:
    return OutputNoise(sigma=sigma)(Echo(), NOTHING, 0)(torch.zeros(rows, 1, 1, CLASSES), query(number, rows))


def test_without_noise_it_is_the_model_bit_for_bit():
    x = torch.rand(16, 1, 1, CLASSES) - 0.5
    assert torch.equal(OutputNoise(sigma=0)(Echo(), NOTHING, 0)(x, query(0, 16)), x.flatten(1))


def test_noise_is_gaussian_with_the_asked_deviation():
    drawn = noise(0.3, 20_000)
    n = drawn.numel()
    assert drawn.mean().abs() < 4 * 0.3 / n**0.5
    assert drawn.std().item() == pytest.approx(0.3, rel=4 / (2 * n) ** 0.5)  # of a normal sample's deviation
    within = (drawn.abs() < 0.3).double().mean().item()
    assert within == pytest.approx(0.6827, abs=4 * (0.6827 * 0.3173 / n) ** 0.5)


def test_classes_are_independent():
    n = 20_000
    correlation = torch.corrcoef(noise(1.0, n).T) - torch.eye(CLASSES)
    assert correlation.abs().max() < 5 / n**0.5  # 45 pairs


def test_averaging_queries_shrinks_the_deviation_by_their_root():
    q = 16
    mean = torch.stack([noise(1.0, 2_000, number) for number in range(q)]).mean(dim=0)
    assert mean.std().item() == pytest.approx(1 / q**0.5, rel=4 / (2 * mean.numel()) ** 0.5)


def test_each_query_and_row_has_its_own_noise_and_a_repeat_the_same():
    assert torch.equal(noise(1.0, 8), noise(1.0, 8))
    assert not torch.equal(noise(1.0, 8, number=1), noise(1.0, 8))
    assert len(noise(1.0, 8).unique(dim=0)) == 8
    assert torch.equal(noise(1.0, 3), noise(1.0, 8)[:3])


def test_no_streams_or_too_few_are_refused():
    served = OutputNoise()(Echo(), NOTHING, 0)
    with pytest.raises(ValueError, match="no random streams for 2 images"):
        served(torch.rand(2, 1, 1, 4))
    with pytest.raises(ValueError, match="1 random streams for 2 images"):
        served(torch.rand(2, 1, 1, 4), query(0, 1))


def test_an_impossible_deviation_is_refused():
    for sigma, why in {"-1": "a standard deviation is zero or more", "inf": "should be a finite number"}.items():
        with pytest.raises(ConfigError, match=why):
            defenses.create(f"output-noise(sigma={sigma})")
