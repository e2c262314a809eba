"""Temperature: a division, found again from labels that were drawn at a known one."""

import pytest
import torch
from torch import Tensor, nn

from bench.dataset import Split
from bench.errors import ConfigError
from bench.metrics import calibration_error
from bench.registry import defenses
from defenses.aaa import top_confidence
from defenses.temperature import Temperature, best_temperature

NOTHING = Split(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64))
N = 20_000


class Scores(nn.Module):
    """A classifier whose images, on [0, 1], are its logits, on [-12, 12]."""

    def forward(self, x: Tensor) -> Tensor:
        return 24 * x.flatten(1) - 12


def drawn_at(temperature: float, n: int = N) -> tuple[Tensor, Tensor]:
    """Logits of ten classes, and labels from their softmax at ``temperature``."""
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n, 10, generator=rng, dtype=torch.float64)
    return logits, (logits / temperature).softmax(1).multinomial(1, generator=rng).squeeze(1)


def test_at_one_it_is_the_model_bit_for_bit():
    x = torch.rand(16, 1, 1, 10)
    assert torch.equal(Temperature(temperature=1.0)(Scores(), NOTHING, 0)(x), Scores()(x))


def test_logits_are_divided_and_no_decision_changes():
    x = torch.rand(500, 1, 1, 10)
    out = Temperature(temperature=2.5)(Scores(), NOTHING, 0)(x)
    torch.testing.assert_close(out * 2.5, Scores()(x))
    assert torch.equal(out.argmax(1), Scores()(x).argmax(1))


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_likelihood_finds_the_temperature_that_labels_were_drawn_at(true):
    logits, labels = drawn_at(true)
    p = (logits / true).softmax(1)
    variance = (p * logits.square()).sum(1) - (p * logits).sum(1).square()
    deviation = true**2 / (N * variance.mean()).sqrt()  # of the estimate, from its Fisher information
    step = true * (10**0.01 - 1) / 2  # half a step of the grid
    assert best_temperature(logits, labels, "nll") == pytest.approx(true, abs=4 * deviation.item() + step)


@pytest.mark.parametrize("objective", ["nll", "ece"])
def test_no_other_temperature_of_the_grid_is_better(objective):
    logits, labels = drawn_at(2.0, 1_000)
    correct = logits.argmax(1) == labels

    def error(temperature: float) -> float:
        if objective == "nll":
            return -(logits / temperature).log_softmax(1)[torch.arange(1_000), labels].mean().item()
        return calibration_error(top_confidence(logits, temperature).numpy(), correct.numpy())

    found = error(best_temperature(logits, labels, objective))
    assert all(found <= error(0.1 * 10 ** (step / 100)) + 1e-12 for step in range(201))


@pytest.mark.parametrize("objective", ["nll", "ece"])
def test_tuning_calibrates_what_is_served(objective):
    logits, labels = drawn_at(2.0, 4_000)
    split = Split(((logits.float() + 12) / 24).clamp(0, 1)[:, None, None], labels)
    served = Temperature(objective=objective)(Scores(), split, 0)
    correct = Scores()(split.pixels()).argmax(1) == split.labels

    def error(model: nn.Module) -> float:
        return calibration_error(top_confidence(model(split.pixels()), 1.0).numpy(), correct.numpy())

    # A calibrated model's error is noise: 15 bins of n / 15 samples, each off by sqrt(p (1 - p) / (n / 15)) or so.
    assert error(served) < 4 * 0.5 * (15 / 4_000) ** 0.5
    assert error(served) < error(Scores()) / 2


def test_settings_that_cannot_be_meant_are_refused():
    for text in ("temperature=0", "temperature=-1", "temperature=inf", "temperature=warm", "objective=auc"):
        with pytest.raises(ConfigError):
            defenses.create(f"temperature({text})")
    with pytest.raises(ConfigError, match="no calibration images"):
        Temperature()(Scores(), NOTHING, 0)
