"""Randomized smoothing and the training for it: closed forms, bounds against scipy.stats, and fresh noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from attacks.certifiers.smooth import Smooth, at_least
from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.protocols import Job
from bench.registry import attacks
from bench.rng import SampleRng
from defenses.gaussian_training import GaussianTraining

SHAPE = (1, 4, 4)


def streams(count: int) -> SampleRng:
    return SampleRng.create(0, torch.arange(count), "test")


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(3))


def constant(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([0.0, 1.0, 0.5]).expand(len(x), 3)


def sided(x: torch.Tensor) -> torch.Tensor:
    """Class 1 where the first pixel is above 0.5: the distance to the boundary is that of the pixel."""
    first = x.flatten(1)[:, 0] - 0.5
    return torch.stack((-first, first), dim=1)


@pytest.mark.parametrize(("sigma", "radius"), [(0.12, 0.457), (0.25, 0.953), (0.5, 1.906), (1.0, 3.811)])
def test_a_constant_classifier_gets_the_largest_radius_that_its_draws_can_prove(sigma, radius):
    certifier = Smooth(sigma=sigma, n=100_000)
    found = certifier.radius(at_least(torch.tensor([100_000]), 100_000, 0.001))
    assert found.item() == pytest.approx(sigma * stats.norm.ppf(0.001 ** (1 / 100_000)), rel=1e-9)
    assert found.item() == pytest.approx(radius, abs=5e-4)  # as the log files of the paper show it
    some = replace(certifier, n=500)(constant, pictures(3), streams(3), batch=64)
    assert some.radius.tolist() == [some.most] * 3
    assert some.most == pytest.approx(sigma * stats.norm.ppf(0.001 ** (1 / 500)), rel=1e-9)
    assert some.predicted.tolist() == [1] * 3


def test_a_linear_classifier_is_certified_up_to_its_boundary_and_never_beyond():
    x = pictures(4)
    x.view(4, -1)[:, 0] = torch.tensor([0.45, 0.6, 0.75, 1.0])
    distance = torch.tensor([0.05, 0.1, 0.25, 0.5], dtype=torch.float64)
    gaps = []
    for n in (100, 3000, 100_000):
        found = Smooth(sigma=0.25, n=n)(sided, x, streams(4), batch=20_000)
        assert (found.radius <= distance).all()
        gaps.append((distance - found.radius).max().item())
    assert found.predicted.tolist() == [0, 1, 1, 1]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[2] < 0.012


def test_the_bound_is_the_quantile_of_clopper_and_pearson():
    votes = torch.tensor([0, 1, 50, 99, 100])
    expected = [stats.beta.ppf(0.001, k, 100 - k + 1) if k else 0.0 for k in votes.tolist()]
    assert at_least(votes, 100, 0.001).tolist() == pytest.approx(expected, rel=1e-9)


def test_the_bound_holds_as_often_as_it_says():
    """Over draws of so many trials, it lies above the truth with a probability of alpha at most: summed exactly."""
    n, alpha = 60, 0.05
    above = at_least(torch.arange(n + 1), n, alpha).numpy()
    for truth in np.linspace(0.02, 0.98, 25):
        fails = stats.binom.pmf(np.arange(n + 1), n, truth)[above > truth].sum()
        assert fails <= alpha


def test_it_abstains_where_no_class_has_half_and_proves_nothing():
    x = pictures(2)
    x.view(2, -1)[:, 0] = 0.5
    found = Smooth(sigma=0.25, n=400)(sided, x, streams(2), batch=512)
    assert found.abstained.all()
    assert found.radius.tolist() == [0.0, 0.0]


def test_draws_do_not_depend_on_batches_or_on_other_images():
    x, certifier = pictures(5), Smooth(sigma=0.25, n0=20, n=130)
    whole = certifier(sided, x, streams(5), batch=1000)
    rows = torch.tensor([4, 1])
    part = certifier(sided, x[rows], streams(5)[rows], batch=7)
    assert part.votes.tolist() == whole.votes[rows].tolist()
    assert part.radius.tolist() == whole.radius[rows].tolist()
    assert len(set(whole.votes.tolist())) > 1


def test_the_draws_that_choose_are_not_the_draws_that_count():
    seen: list[torch.Tensor] = []

    def noted(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return sided(x)

    Smooth(sigma=0.25, n0=30, n=30)(noted, pictures(1), streams(1), batch=30)
    chosen, counted = seen
    assert not (chosen[:, None] == counted[None]).flatten(2).all(dim=2).any()
    noise = (torch.cat(seen) - pictures(1)).flatten()
    assert noise.std().item() == pytest.approx(0.25, rel=0.1)
    assert (torch.cat(seen) < 0).any()  # and it is not cut to the box


def test_an_answer_that_is_no_number_votes_for_nothing():
    """Else argmax takes NaN for the largest, and a network that is broken is certified everywhere."""

    def broken(x: torch.Tensor) -> torch.Tensor:
        return torch.full((len(x), 3), torch.nan)

    found = Smooth(sigma=0.25, n=200)(broken, pictures(2), streams(2), batch=64)
    assert found.invalid.all()
    assert found.abstained.all()
    assert found.votes.tolist() == [0, 0]
    assert Smooth(sigma=0.25).predict(broken, pictures(2), streams(2), 64, 100, 1.0).tolist() == [-1, -1]


def test_predictions_are_those_of_an_exact_binomial_test():
    x = pictures(3)
    x.view(3, -1)[:, 0] = torch.tensor([0.5, 0.55, 0.9])
    votes = Smooth(sigma=0.25).votes(sided, x, streams(3), 200, 64)
    expected = [
        -1 if stats.binomtest(max(counts), sum(counts), 0.5).pvalue > 0.01 else counts.index(max(counts))
        for counts in votes[:, :2].tolist()
    ]
    assert Smooth(sigma=0.25).predict(sided, x, streams(3), 64, 200, 0.01).tolist() == expected
    assert expected[0] == -1
    assert expected[2] == 1


@pytest.mark.parametrize("given", ["", "sigma=0", "sigma=1, alpha=0", "sigma=1, alpha=1", "sigma=1, n=0"])
def test_numbers_that_prove_nothing_are_refused(given):
    with pytest.raises(ConfigError):
        attacks.create(f"smooth({given})")


def test_gaussian_training_sees_new_noise_in_each_epoch():
    """The noise of a first version of another library was drawn once, and a network learns that by heart."""
    grey = Split(torch.full((16, 1, 8, 8), 51, dtype=torch.uint8), torch.arange(16) % 2)
    data = Dataset("grey", ("a", "b"), train=grey, calibration=grey, test=grey)
    seen: list[torch.Tensor] = []

    class Noted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.detach().flatten(1) - 0.2)
            return self.linear(x.flatten(1))

    GaussianTraining(sigma=0.5, epochs=2, batch_size=16)(Noted, data, Job())
    first, second = seen
    assert torch.cdist(first, second).min() > 1  # whichever two images: none has the noise of the epoch before
    assert all(noise.std().item() == pytest.approx(0.5, rel=0.05) for noise in seen)
