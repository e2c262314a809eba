"""A denoiser trained by answers alone: its gradient is the true one up to a derived error, and every question is told.
"""

import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench.errors import ConfigError
from bench.oracle.surrogate import Surrogate
from bench.protocols import Job
from bench.registry import datasets
from bench.scratch import Scratch
from bench.system.interrupt import Stopped
from defenses.zo_denoiser import BATCH, Asking, Looking, ZerothOrderDenoiser
from tests.served import query

SMALL = {"warm_up": 3, "steps": 4, "latent": 5, "width": 8}


@pytest.fixture(scope="module")
def data():
    return datasets.create("digits")(None).lent()


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10, dtype=dtype)).requires_grad_(False).eval()


def fitted(data, job=None, **settings):
    model = Surrogate([network()]).eval()
    return ZerothOrderDenoiser(**SMALL, **settings).fit(model, data, job or Job()), model


@pytest.mark.parametrize("mu", [1e-1, 1e-2, 1e-3])
def test_its_gradient_is_the_networks_up_to_half_of_mu_times_the_curvature(mu):
    """Of a linear map J from codes to logits, the second derivative of the cross-entropy by a number of the code is a
    variance of J's column under the softmax, of a range r at most r^2 / 4."""
    decoder = nn.Linear(6, 64, dtype=torch.float64).requires_grad_(False)
    model, code = network(torch.float64), torch.randn(20, 6, dtype=torch.float64)
    y = torch.randint(10, (20,))
    columns = model[1].weight @ decoder.weight                                      # (10, 6)
    bound = mu / 2 * (columns.amax(0) - columns.amin(0)) ** 2 / 4
    told, asked = Asking(model, decoder, mu).slope(code, y)
    code.requires_grad_(True)
    value, _ = Looking(model, decoder)(code, y)
    (true,) = torch.autograd.grad(value * len(code), code)
    assert ((told - true).abs() <= bound + 1e-9).all()
    assert asked == 20 * 7


def test_the_scalar_that_it_gives_has_that_gradient():
    decoder, model = nn.Linear(6, 64).requires_grad_(False), network()
    code, y = torch.randn(4, 6, requires_grad=True), torch.randint(10, (4,))
    asking = Asking(model, decoder, 0.01)
    value, _ = asking(code, y)
    (gradient,) = torch.autograd.grad(value, code)
    assert torch.allclose(4 * gradient, asking.slope(code.detach(), y)[0])


def test_it_comes_to_the_denoiser_that_gradients_train_as_mu_falls(data):
    start, _ = fitted(data, train="gradients", sigma=0.2)
    gaps = []
    for mu in (1.0, 0.1, 0.01):
        made, _ = fitted(data, train="queries", mu=mu, sigma=0.2)
        gaps.append(float(sum((made[name] - start[name]).abs().sum() for name in start if name != "queries")))
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] > 0


@pytest.mark.parametrize(("train", "each"), [("queries", 1 + 1 + 5), ("gradients", 2)])
def test_every_question_is_told(data, train, each):
    made, model = fitted(data, train=train)
    assert int(made["queries"]) == model.forwards == 4 * BATCH * each
    assert (model.backwards == 0) == (train == "queries")


def test_a_training_that_was_killed_goes_on_to_the_same_and_tells_of_all_its_questions(data, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.scratch.PAUSE", 0.0)
    monkeypatch.setattr("defenses.zo_denoiser.TOLD", 1)

    def stop(done, total):
        if done == 6:
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        fitted(data, Job(scratch=Scratch(tmp_path / "job"), progress=stop))
    again, model = fitted(data, Job(scratch=Scratch(tmp_path / "job")))
    whole, alone = fitted(data)
    assert model.forwards < alone.forwards
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_it_answers_the_mean_probabilities_of_its_draws(data):
    made, _ = fitted(data)
    x = data.calibration.pixels(slice(6))
    still = ZerothOrderDenoiser(**SMALL, sigma=0.0)(network(), data.calibration, 0, made)
    one = network()(still.nets(x)).log_softmax(1)
    assert torch.allclose(still(x, query(0, 6)), one, atol=1e-5)
    noisy = ZerothOrderDenoiser(**SMALL, draws=3)(network(), data.calibration, 0, made)
    assert noisy(x, query(0, 6)).exp().sum(1).tolist() == pytest.approx([1.0] * 6, abs=1e-5)


def test_larger_images_are_refused(data):
    large = torch.zeros(4, 1, 16, 16, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="below 16 pixels a side"):
        fitted(replace(data, **{part: replace(data.train, images=large, labels=torch.zeros(4, dtype=torch.int64))
                                for part in ("train", "calibration", "test")}))  # fmt: skip
