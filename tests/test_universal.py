"""Universal perturbations: inside the ball, blind to labels, stronger than noise, and their losses by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attacks.dominant_pattern import DominantPattern
from attacks.fg_uap import FGUAP
from attacks.uap import UAP
from attacks.universal import UniversalNoise, reader
from bench.dataset import Split
from bench.errors import ConfigError
from bench.oracle.surrogate import Surrogate
from bench.protocols import Job
from bench.registry import attacks, datasets
from bench.threat import Threat

DIGITS = datasets.create("digits")(None)
THREAT = Threat("linf", 0.3, "labels", 1)


@pytest.fixture(scope="module")
def network():
    """A network that knows digits."""
    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))

    return attacks.create("standard(epochs=8)")(build, DIGITS, Job())


def found(attack, network, threat=THREAT, data=DIGITS, seed=0):
    return attack.fit(Surrogate([network]).eval(), data.lent(), threat, Job(seed))


@pytest.mark.parametrize("attack", [FGUAP(epochs=4), UAP(), DominantPattern(epochs=6)])
def test_a_fitted_one_fools_more_images_than_noise_of_its_norm(attack, network):
    """On test images, which it has not seen; FG-UAP's features move further, too."""
    x = DIGITS.test.pixels()
    noises = [found(UniversalNoise(kind=kind), network, seed=seed)["perturbation"]
              for kind in ("corner", "uniform") for seed in range(5)]  # fmt: skip
    v = found(attack, network)["perturbation"]
    assert v.shape == (1, 1, 8, 8)
    assert v.abs().max() <= THREAT.eps

    def fooled(v):
        return float((network((x + v).clamp(0, 1)).argmax(1) != network(x).argmax(1)).float().mean())

    assert fooled(v) > 1.5 * max(map(fooled, noises))
    if isinstance(attack, FGUAP):
        read = reader(Surrogate([network]), "features", x[:2])
        alike = [float(F.cosine_similarity(read(x + each), read(x)).mean()) for each in (v, *noises)]
        assert alike[0] < min(alike[1:])


def test_labels_are_never_looked_at(network):
    blind = replace(DIGITS, train=Split(DIGITS.train.images, torch.zeros_like(DIGITS.train.labels)))
    for attack in (FGUAP(epochs=1, images=200), UAP(epochs=1, images=200), DominantPattern(epochs=1, images=200)):
        one, other = (found(attack, network, data=data)["perturbation"] for data in (DIGITS, blind))
        assert torch.equal(one, other)


@pytest.mark.parametrize("attack", [UAP(), DominantPattern()])
def test_a_loss_that_is_no_number_is_no_reason_to_keep_the_start(attack):
    broken = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.constant_(broken[1].weight, math.nan)
    with pytest.raises(ConfigError, match="the loss of epoch 1 of the fit is nan, and says nothing of a perturbation"):
        found(replace(attack, images=32, held_out=8), broken)


def test_without_data_no_image_is_looked_at(network):
    other = replace(DIGITS, train=Split(255 - DIGITS.train.images, DIGITS.train.labels))
    one, two = (found(UAP(epochs=1, data="noise"), network, data=data) for data in (DIGITS, other))
    assert torch.equal(one["perturbation"], two["perturbation"])


@pytest.mark.parametrize("attack", [FGUAP(images=100), UAP(), DominantPattern(), UniversalNoise()])
def test_in_l2_it_stays_in_the_ball(attack, network):
    v = found(attack, network, Threat("l2", 0.5, "labels", 1))["perturbation"]
    assert 0.3 < v.norm() <= 0.5 + 1e-6


def test_the_divergence_is_turned_round_in_what_was_released():
    """``kl`` is KL(pattern || sum), averaged; as released, KL(sum || pattern), summed over the batch."""
    torch.manual_seed(0)
    model, x, v = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(5, 1, 2, 2), torch.rand(1, 1, 2, 2) - 0.5
    p, q = model(v).detach().softmax(1)[0], model(x + v).detach().softmax(1)
    forward = sum(float(p[k] * (p[k] / q[i, k]).log()) for i in range(5) for k in range(3)) / 5
    reverse = sum(float(q[i, k] * (q[i, k] / p[k]).log()) for i in range(5) for k in range(3))
    for distance, expected in (("kl", forward), ("kl-as-released", reverse)):
        loss = DominantPattern(distance=distance).loss(model, x, v, x)
        assert math.isclose(float(loss.detach()), expected, rel_tol=1e-5)
        assert DominantPattern(distance=distance).loss(model, x[:1], v, x) > 0


def test_what_is_clipped_is_what_the_network_sees():
    x, v, seen = torch.rand(3, 1, 2, 2), torch.full((1, 1, 2, 2), 0.6), []

    def read(z):
        seen.append(z)
        return z.flatten(1)

    for clipped in (True, False):
        FGUAP(clipped=clipped).loss(read, x, v, x.flatten(1))
    assert torch.equal(seen[0], (x + v).clamp(max=1))
    assert seen[1].max() > 1


def test_features_of_several_networks_stand_side_by_side():
    one, two = (nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)) for width in (5, 7))
    x = torch.rand(6, 1, 2, 2)
    read = reader(Surrogate([one, two]), "features", x)
    assert torch.equal(read(x), torch.cat([one[:3](x), two[:3](x)], dim=1))
