"""Randomised features: on the layer that was published for a network, with its deviation, and nowhere by guess."""

import pytest
import torch
from torch import nn

from bench.dataset import Split
from bench.errors import ConfigError
from bench.registry import defenses, models
from defenses.rfd import RandomizedFeatures
from tests.served import NOTHING, query

IMAGES = Split(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
SMALL = Split(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))


class Summing(nn.Module):
    """Doubles what it is shown in ``hidden``, and gives it back, so that noise there is seen as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.unused, self.twice = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(self.twice(self.hidden(2 * x))).flatten(1)


@pytest.fixture
def made(monkeypatch):
    """A network by name whose weights nobody has drawn, which takes long."""
    for draw in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):
        monkeypatch.setattr(nn.init, draw, lambda weight, *_, **__: nn.init.zeros_(weight))
    return lambda name: models.create(name)(10, (3, 32, 32), None).eval()


@pytest.mark.parametrize(
    ("model", "layer", "sigma"),
    [
        ("resnet18", "layer4", 2.5),
        ("wide-resnet28-10", "block3", 0.7),
        pytest.param("torchvision:resnet50(pretrained=false)", "1.layer4", 3.0, marks=pytest.mark.slow),
        pytest.param("torchvision:vgg16(pretrained=false)", "1.features.28", 0.35, marks=pytest.mark.slow),
    ],
)
def test_known_networks_have_the_published_layer_and_deviation(model, layer, sigma, made):
    if model.startswith("torchvision"):
        pytest.importorskip("torchvision")
    network = made(model)
    defended = defenses.create("rfd")(network, NOTHING, 0)
    assert (defended.layer, defended.sigma) == (layer, sigma)


def test_resnet_20_is_known_by_its_layer_alone(made):
    network = made("resnet20")
    with pytest.raises(ConfigError, match=r"rfd knows no sigma for this network.*rfd\(layer=layer3, sigma=\.\.\.\)"):
        RandomizedFeatures()(network, IMAGES, 0)
    defended = RandomizedFeatures(sigma=0.5)(network, IMAGES, 0)
    assert defended.layer == "layer3"
    assert defended(torch.rand(2, 3, 32, 32), query(0, 2)).shape == (2, 10)


@pytest.mark.parametrize("model", ["vgg16", "preact-resnet18", "resnet32", "cnn"])
def test_other_networks_are_refused_in_one_line(model, made):
    network = made(model)
    for settings in ({}, {"sigma": 1.0}):
        with pytest.raises(ConfigError, match="rfd knows no layer for this network, only for VGG-16, ") as error:
            RandomizedFeatures(**settings)(network, NOTHING, 0)
        assert "\n" not in str(error.value)


def test_noise_lies_on_the_layer_alone_with_its_deviation():
    x = torch.rand(400, 1, 4, 4)
    out = RandomizedFeatures(layer="hidden", sigma=0.3)(Summing(), SMALL, 0)(x, query(0, 400))
    still = RandomizedFeatures(layer="hidden", sigma=0.0)(Summing(), SMALL, 0)(x, query(0, 400))
    noise = out - 2 * x.flatten(1)
    assert noise.std().item() == pytest.approx(0.3, rel=0.03)
    assert torch.equal(still, 2 * x.flatten(1))


def test_each_query_and_row_has_its_own_noise_and_the_network_none_afterwards():
    network, x = Summing(), torch.rand(8, 1, 4, 4)
    served = RandomizedFeatures(layer="hidden", sigma=1.0)(network, SMALL, 0)
    assert torch.equal(served(x, query(0, 8)), served(x, query(0, 8)))
    assert torch.equal(served(x[:3], query(0, 3)), served(x, query(0, 8))[:3])
    assert not torch.equal(served(x, query(1, 8)), served(x, query(0, 8)))
    assert torch.equal(network(x), 2 * x.flatten(1))


@pytest.mark.parametrize(
    ("layer", "why"),
    [("nowhere", "no module is named so"), ("unused", "it ran 0 times"), ("twice", "it ran 2 times")],
)
def test_a_layer_that_is_not_there_or_does_not_run_once_is_refused(layer, why):
    with pytest.raises(ConfigError, match=why):
        RandomizedFeatures(layer=layer, sigma=1.0)(Summing(), SMALL, 0)


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ConfigError, match="a standard deviation is zero or more"):
        defenses.create("rfd(layer=x, sigma=-1)")
