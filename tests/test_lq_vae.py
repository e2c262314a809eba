"""LQ-VAE: bits as rare as derived, soft codes that end in hard ones, gradients that are what they are said to be."""

import signal
from math import erf, sqrt

import pytest
import torch
from torch import nn

from bench.measure.gradients import gradient_findings
from bench.measure.keys import defense_key
from bench.oracle.served import ServedModel
from bench.protocols import Job
from bench.registry import datasets
from bench.rng import SampleRng
from bench.scratch import Scratch
from bench.system.interrupt import Stopped
from bench.threat import Threat
from defenses.lq_vae import LQVAE, Decoder, Encoder, hard_code, soft_code
from tests.served import query
from tests.test_fitted_defense import planned

TINY = {"width": 2, "latent": 8, "steps": 2}


@pytest.fixture(scope="module")
def data():
    return datasets.create("digits")(None).lent()


@pytest.fixture(scope="module")
def fitted(data):
    return LQVAE(**TINY).fit(nn.Identity(), data, Job())


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False).eval()


def served(data, fitted, **settings):
    return LQVAE(**TINY, **settings)(linear(), data.calibration, 0, fitted)


def test_a_bit_is_up_with_eight_percent_under_the_prior():
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    share = float((hard_code(z, 0.1) > 0).float().mean())
    assert erf(0.1 / sqrt(2)) == pytest.approx(0.0797, abs=1e-4)
    assert share == pytest.approx(erf(0.1 / sqrt(2)), abs=3 * sqrt(0.08 * 0.92 / 200_000))


def test_the_soft_code_comes_to_the_hard_one_as_it_grows_steep(monkeypatch):
    z = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    assert torch.equal(soft_code(z, 0.1).sign(), hard_code(z, 0.1))
    gaps = []
    for steepness in (500.0, 5e4, 5e6):
        monkeypatch.setattr("defenses.lq_vae.STEEPNESS", steepness)
        gaps.append(float((soft_code(z, 0.1) - hard_code(z, 0.1)).abs().mean()))
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2] > 0


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 8), (3, 32, 32), (2, 9, 6)])
def test_images_of_every_size_come_back_in_it(shape):
    x = torch.rand(2, *shape) * 2 - 1
    mean, logvar = Encoder(shape, 2, 5)(x)
    assert mean.shape == logvar.shape == (2, 5)
    assert Decoder(shape, 2, 5)(mean.sign()).shape == x.shape


def test_the_layers_are_the_papers_for_digits_of_28_pixels():
    encoder, decoder = Encoder((1, 28, 28), 64, 64), Decoder((1, 28, 28), 64, 64)
    assert encoder.layers[9].weight.shape == (1024, 7 * 7 * 128)
    assert decoder.dense[2].weight.shape == (7 * 7 * 128, 1024)


def test_the_code_of_the_mean_is_the_same_each_time_and_a_drawn_one_is_not(data, fitted):
    x = data.calibration.pixels(slice(50))
    still, drawn = served(data, fitted), served(data, fitted, random=True)
    assert torch.equal(still(x), still(x))
    assert torch.equal(drawn(x, query(0, 50)), drawn(x, query(0, 50)))
    images = [drawn.drawn(x, query(number, 50)) for number in range(2)]
    assert not torch.equal(*images)


def test_what_it_answers_does_not_depend_on_the_gradient_that_it_gives(data, fitted):
    x = data.calibration.pixels(slice(20))
    answers = [served(data, fitted, gradient=gradient)(x) for gradient in ("soft", "identity", "none")]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_the_identity_gives_the_gradient_of_the_network_at_what_is_drawn(data, fitted):
    x = data.calibration.pixels(slice(5)).requires_grad_(True)
    model = served(data, fitted, gradient="identity")
    (gradient,) = torch.autograd.grad(model(x)[:, 3].sum(), x)
    weight = model.model[1].weight[3].view(1, 1, 8, 8)
    assert torch.allclose(gradient, weight.expand_as(gradient))


@pytest.mark.parametrize(("gradient", "fires"), [("none", True), ("soft", False), ("identity", False)])
def test_true_gradients_are_zero_and_flagged(data, fitted, gradient, fires):
    x = data.calibration.pixels(slice(40))
    model = ServedModel(served(data, fitted, gradient=gradient))
    y = model(x, SampleRng.create(0, torch.arange(40), "labels")).argmax(1)
    found = {finding.flag: finding for finding in gradient_findings(
        model, ServedModel(linear()), x, y, Threat("linf", 0.1, "gradients", 1), 0)}  # fmt: skip
    assert found["zero-gradients"].fired == fires


def test_a_training_that_was_killed_goes_on_to_the_same_weights(data, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.scratch.PAUSE", 0.0)
    monkeypatch.setattr("defenses.lq_vae.TOLD", 1)
    defense = LQVAE(width=2, latent=8, steps=4)

    def stop(done, total):
        if done == 3:
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        defense.fit(nn.Identity(), data, Job(scratch=Scratch(tmp_path / "job"), progress=stop))
    told = []
    rest = Job(scratch=Scratch(tmp_path / "job"), progress=lambda *it: told.append(it))
    again = defense.fit(nn.Identity(), data, rest)
    whole = defense.fit(nn.Identity(), data, Job())
    assert told == [(3, 4), (4, 4)]
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_it_learns_to_draw_digits(data, fitted):
    longer = LQVAE(width=8, latent=32, steps=150).fit(nn.Identity(), data, Job())
    assert longer["rmse"] < 0.8 * fitted["rmse"]
    assert 0 < longer["bits"] < 0.5


def test_variants_that_answer_otherwise_share_what_they_learn():
    keys = {defense_key(planned(f"lq-vae(steps=5{more})")) for more in ("", ", random=true", ", gradient=none")}
    assert len(keys) == 1
    assert defense_key(planned("lq-vae(steps=6)")) not in keys
