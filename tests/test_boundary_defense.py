"""Boundary Defense: no noise where the model is sure, and the closed form of what turns where it is not."""

import math

import pytest
import torch

from bench.errors import ConfigError
from bench.registry import defenses
from bench.rng import SampleRng
from defenses.boundary_defense import BoundaryDefense
from tests.served import NOTHING, Echo


def served(logits: torch.Tensor, number: int = 0, **settings: float) -> torch.Tensor:
    rng = SampleRng.create(0, torch.arange(len(logits)), "test").fork(number)
    return BoundaryDefense(**settings)(Echo(), NOTHING, 0)(logits[:, None, None], rng)


def two_ahead(margin: float, rows: int) -> torch.Tensor:
    """(rows, 100) logits whose best two lead all others by 3 or more, with a top confidence below 0.3."""
    logits = torch.full((rows, 100), -3.3)
    logits[:, 0], logits[:, 1] = 0.0, -margin
    assert logits[:1].softmax(dim=1).amax() < 0.3
    return logits


@pytest.mark.parametrize("margin", [0.02, 0.1, 0.3])
def test_decisions_turn_as_often_as_the_difference_of_two_normals_exceeds_the_margin(margin):
    n = 20_000
    turned = (served(two_ahead(margin, n)).argmax(1) == 1).double().mean().item()
    expected = 0.5 * math.erfc(margin / 0.1 / 2)  # of a deviation of 0.1 sqrt(2)
    assert turned == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n) + 1e-4)


def test_noise_meets_low_confidence_alone_and_has_its_deviation():
    logits = 4 * torch.rand(5_000, 10, generator=torch.Generator().manual_seed(0))
    unsure = logits.double().softmax(dim=1).amax(dim=1) < 0.3
    assert 500 < unsure.sum() < 4_500
    noise = served(logits) - logits
    assert (noise[~unsure] == 0).all()
    assert noise[unsure].std().item() == pytest.approx(0.1, rel=0.03)
    assert noise[unsure].mean().abs() < 0.002


def test_two_classes_never_meet_it_and_a_confidence_of_one_always_does():
    two = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(served(two), two)
    assert (served(two, confidence=1.0) != two).all()


def test_without_noise_it_is_the_model_and_a_row_answers_alone():
    logits = two_ahead(0.1, 8)
    assert torch.equal(served(logits, sigma=0.0), logits)
    assert torch.equal(served(logits[:3]), served(logits)[:3])
    assert not torch.equal(served(logits, 1), served(logits))


def test_what_cannot_be_meant_is_refused():
    for text in ("sigma=-1", "confidence=1.1", "sigma=inf"):
        with pytest.raises(ConfigError):
            defenses.create(f"boundary-defense({text})")
