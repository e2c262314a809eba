"""PNI: noise on weights, one for each image when it serves, with strengths that an adversary trains."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.data.digits import Digits
from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.measure.fitting import around, fit_defense
from bench.models import resolve
from bench.protocols import Job
from bench.rng import SampleRng
from defenses.pni import STRENGTH, NoisyLayer, ParametricNoiseInjection, drawing, noisy, with_noise


@pytest.fixture(scope="module")
def digits() -> Dataset:
    whole = Digits()(None)
    return whole.released(whole.train.subset(slice(300)))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return resolve("cnn(width=4)")(10, (1, 8, 8), None).eval()


def rngs(count: int, seed: int = 0) -> SampleRng:
    return SampleRng.create(seed, torch.arange(count), "test")


LAYERS = [
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 7, 5)),
    (nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, bias=False), (4, 6, 6)),
    (nn.Conv2d(4, 6, (1, 3), padding="same"), (4, 5, 5)),
    (nn.Linear(4, 6), (4,)),
    (nn.Linear(4, 6, bias=False), (3, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_each_image_has_weights_of_its_own(layer, shape):
    x, rng, ours = torch.randn(5, *shape), rngs(5), NoisyLayer(layer)
    ours.rng = rng
    drawn = rng.normal(*layer.weight.shape)
    for row in range(5):
        single = copy.deepcopy(layer)
        with torch.no_grad():
            single.weight += STRENGTH * layer.weight.std() * drawn[row]
        torch.testing.assert_close(ours(x)[row], single(x[row : row + 1])[0], rtol=1e-4, atol=1e-5)
    ours.rng = None
    torch.testing.assert_close(ours(x), layer(x))


def test_many_images_are_drawn_for_in_parts_and_get_the_same(monkeypatch):
    x, layer = torch.randn(7, 4, 6, 6), NoisyLayer(nn.Conv2d(4, 6, 3))
    layer.rng = rngs(7)
    whole = layer(x)
    monkeypatch.setattr("defenses.pni.LARGEST", 2 * layer.weight.numel())
    torch.testing.assert_close(layer(x), whole)


def test_a_layer_that_acts_twice_has_the_same_noise_in_both_places():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once = self.again = nn.Linear(3, 3)

        def forward(self, x):
            return self.again(self.once(x))

    network = with_noise(Twice())
    assert network.once is network.again
    assert isinstance(network.once, NoisyLayer)


def test_networks_without_such_layers_and_other_paddings_are_refused():
    with pytest.raises(ConfigError, match="this has none"):
        with_noise(nn.Sequential(nn.Flatten()))
    with pytest.raises(ConfigError, match="'circular'"):
        with_noise(nn.Sequential(nn.Conv2d(1, 1, 3, padding_mode="circular")))


class Standardised(nn.Conv2d):
    """A layer of another kind, whose weights are not those that are stored."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def test_layers_that_do_more_than_torchs_are_refused():
    with pytest.raises(ConfigError, match="0 is Standardised"):
        with_noise(nn.Sequential(Standardised(1, 4, 3), nn.Flatten()))
    hooked = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    hooked[0].register_forward_hook(lambda layer, given, out: out + 1)
    with pytest.raises(ConfigError, match="has hooks"):
        with_noise(hooked)


class Beside(nn.Module):
    """Uses the weights of its layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return F.linear(x.flatten(1), self.layer.weight, self.layer.bias)


class SequenceFirst(nn.Module):
    """Gives its layer one row for each row of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 10)

    def forward(self, x):
        return self.layer(x[:, 0].transpose(0, 1)).mean(0)


def test_a_network_that_would_answer_without_noise_or_mix_images_is_refused_before_its_training(digits):
    transformer = nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(64, 10)
    )
    for net, said in (
        (Beside(), "without calling 1 of 1"), (SequenceFirst(), "8 rows for 2 images"),
        (transformer, "as torch has them"),  # its attention has a linear layer of its own kind
    ):  # fmt: skip
        trained = []
        job = Job(progress=lambda *it, trained=trained: trained.append(it))
        with pytest.raises(ConfigError, match=said):
            fit_defense(ParametricNoiseInjection(epochs=1, steps=1), net.eval(), digits, job, "pni")
        assert not trained


def test_a_step_of_training_is_the_mean_of_both_losses_under_one_noise_for_the_batch():
    defense, net = ParametricNoiseInjection(eps=0.1, steps=2, rel_step=0.5), with_noise(network())
    x, y, rng = torch.rand(6, 1, 8, 8), torch.arange(6), rngs(6)
    (loss,) = defense.losses(copy.deepcopy(net).train(), x, y, rng)

    first = rng[torch.tensor([0])]

    def under(label, images):
        """By hand: weights with one noise, the same for all images."""
        noised, drawn = copy.deepcopy(net), first.fork(label)
        for number, layer in enumerate(noisy(noised)):
            with torch.no_grad():
                deviation = layer.strength * layer.weight.std()
                layer.weight += deviation * drawn.fork(number).normal(*layer.weight.shape)[0]
        logits = noised.train(net.training)(images)
        for ours, theirs in zip(net.buffers(), noised.buffers(), strict=True):
            ours.copy_(theirs)  # the statistics of the batch move on
        return logits

    net.train()
    clean = under("clean", x)
    x_adv = (x + 0.1 * (2 * rng.uniform(1, 8, 8) - 1)).clamp(0, 1)
    net.eval()
    for step in (1, 2):
        x_adv.requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(under(step, x_adv), clean.argmax(1), reduction="sum"), x_adv)
        x_adv = (x_adv.detach() + 0.05 * slope.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    net.train()
    expected = 0.5 * F.cross_entropy(clean, y) + 0.5 * F.cross_entropy(under("adversarial", x_adv), y)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0.0)


def test_it_serves_what_it_has_learned_with_noise_and_without(digits):
    net, defense = network(), ParametricNoiseInjection(eps=0.1, epochs=2)
    before = copy.deepcopy(net.state_dict())
    fitted = fit_defense(defense, net, digits, Job(), "pni")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    strengths = [value for name, value in fitted.items() if name.endswith(".strength")]
    assert len(strengths) == len(noisy(with_noise(network())))
    assert all(value != STRENGTH for value in strengths)  # each was trained
    assert float(fitted["strength"]) == pytest.approx(float(torch.stack(strengths).abs().mean()))

    x = digits.test.pixels(slice(40))
    served, still = (
        around(ParametricNoiseInjection(eps=0.1, epochs=2, random=random), nn.Sequential(net), digits.calibration, 0,
               fitted, "pni") for random in (True, False)
    )  # fmt: skip
    alone = with_noise(copy.deepcopy(net))
    alone.load_state_dict({name: value for name, value in fitted.items() if name != "strength"})
    torch.testing.assert_close(still(x), alone.eval()(x))
    rng = rngs(40)
    with drawing(alone, rng):
        torch.testing.assert_close(served(x, rng), alone(x))
    assert not torch.allclose(served(x, rng), still(x), atol=0.05)
    torch.testing.assert_close(served(x[3:9], rng[torch.arange(3, 9)]), served(x, rng)[3:9], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pickle.loads(pickle.dumps(served))(x, rng), served(x, rng))
    with pytest.raises(ValueError, match="random streams"):
        served(x)
    torch.manual_seed(0)
    other = resolve("cnn(width=4)")(10, (1, 8, 8), None)
    with pytest.raises(ConfigError, match="another network"):
        around(defense, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits.calibration, 0, fitted, "pni")
    assert around(defense, other, digits.calibration, 0, fitted, "pni")(x, rng).shape == (40, 10)
