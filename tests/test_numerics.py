"""Fast numbers are the user's function, sooner; where they would not be, plain ones are used."""

import random
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bench import numerics

IMAGES = torch.rand(12, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def with_statistics(network):
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    network.eval()
    return network


def norms_left(network) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


class Network(nn.Module):
    """Two convolutions, each with its batch-norm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.after = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.after(self.second(torch.relu(self.norm(self.first(x))))).mean(dim=(2, 3)))


class TwoUsers(Network):
    """A convolution with two users must keep its batch-norm."""

    def forward(self, x):
        y = self.first(x)
        z = self.after(self.second(torch.relu(self.norm(y))))
        return self.head((y + z).mean(dim=(2, 3)))


class UsedTwice(Network):
    """One convolution, and a batch-norm of its own for each of its uses."""

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)))
        return self.head((self.after(self.first(x.flip(3))) + y).mean(dim=(2, 3)))


class OneOfTwoPaths(Network):
    def forward(self, x):
        y = self.first(x)
        return self.head((self.norm(y).relu() * y.sigmoid()).mean(dim=(2, 3)))


class EditedBetween(Network):
    """The tensor that the batch-norm is given is the convolution's output, but no longer its values."""

    def forward(self, x):
        y = self.first(x)
        y.mul_(2).add_(1)
        return self.head(torch.relu(self.norm(y)).mean(dim=(2, 3)))


class BranchesOnItsInput(Network):
    """Says something else to whoever traces it."""

    def forward(self, x):
        return super().forward(x if isinstance(x, Tensor) and type(x) is Tensor else 1 - x)


class BranchesOnValues(Network):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class RandomInPython(Network):
    def forward(self, x):
        return super().forward(x) * (1 + random.random())


class RandomInTorch(Network):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class WithoutGradient(Network):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class OwnTrain(Network):
    """Keeps to eval mode, and returns nothing."""

    def train(self, mode=True):
        super().train(False)


class StaysInTraining(Network):
    """Whose batch-norms use the statistics of the batch, whatever it is told."""

    def train(self, mode=True):
        return super().train(True)


class CannotBeCopied(Network):
    def __deepcopy__(self, memo):
        raise TypeError("this network holds a connection")


class ReadsItsLayers(Network):
    """Does by hand what its batch-norm would do."""

    def forward(self, x):
        y = nn.functional.batch_norm(self.first(x), self.norm.running_mean, self.norm.running_var)
        return self.head(y.relu().mean(dim=(2, 3)))


class NeedsContiguousLayers(Network):
    def forward(self, x):
        y = self.norm(self.first(x)).relu()
        return self.head(y.view(len(y), -1).unflatten(1, (4, -1)).mean(dim=2))


def normalising_hook():
    network = Network()
    network.register_forward_pre_hook(lambda _, inputs: ((inputs[0] - 0.5) / 0.25,))
    return network


def hook_on_a_norm():
    network = Network()
    network.norm.register_forward_pre_hook(lambda _, inputs: (3 * inputs[0],))
    return network


def hook_on_a_convolution():
    network = Network()
    network.first.register_forward_hook(lambda _, inputs, output: output.abs())
    return network


def weight_norm():
    network = Network()
    parametrizations.weight_norm(network.first)
    return network


def spectral_norm():
    network = Network()
    nn.utils.spectral_norm(network.first)  # the older of the two, a hook
    return network


def replaced_forward():
    network = Network()
    network.norm.forward = lambda y: y + 1
    return network


def scripted():
    return torch.jit.script(Network())


SAME = [
    Network, TwoUsers, UsedTwice, OneOfTwoPaths, EditedBetween, BranchesOnItsInput, BranchesOnValues, WithoutGradient,
    OwnTrain, StaysInTraining, CannotBeCopied, ReadsItsLayers, NeedsContiguousLayers, normalising_hook, hook_on_a_norm,
    hook_on_a_convolution, weight_norm, spectral_norm, replaced_forward,
]  # fmt: skip


@pytest.mark.parametrize("build", SAME)
def test_fast_numbers_are_the_same_function(build):
    network = with_statistics(build())
    queries = torch.rand(5, 3, 9, 9, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = network(queries)
        converted = numerics.fast(network, IMAGES)
        spread = expected.max() - expected.min()
        assert (converted.module(queries) - expected).abs().max() <= 1e-4 * spread
        assert torch.equal(network(queries), expected)  # and the network is what it was
    assert converted.difference <= 1e-4 * spread


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_scripted_network_is_the_same_function():
    network = with_statistics(scripted())
    with torch.no_grad():
        torch.testing.assert_close(numerics.fast(network, IMAGES).module(IMAGES), network(IMAGES))


@pytest.mark.parametrize(("build", "left"), [(Network, 0), (TwoUsers, 1), (UsedTwice, 2), (hook_on_a_norm, 1)])
def test_what_can_be_folded_is(build, left):
    converted = numerics.fast(with_statistics(build()), IMAGES)
    assert norms_left(converted.module) == left
    assert "channels last" in converted.used
    assert not converted.reason


def test_without_folding_the_batch_norms_stay():
    converted = numerics.fast(with_statistics(Network()), IMAGES, fold=False)
    assert norms_left(converted.module) == 2
    assert converted.used == "float32, channels last"


@pytest.mark.parametrize("build", [RandomInPython, RandomInTorch])
def test_a_network_that_draws_goes_on_drawing(build):
    random.seed(0)
    network = with_statistics(build())
    state = torch.get_rng_state()
    converted = numerics.fast(network, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(converted.module(IMAGES), converted.module(IMAGES))
    assert converted.used == "float32"
    assert "its answers to one question differ" in converted.reason


@pytest.mark.parametrize(
    ("build", "reason"),
    [(CannotBeCopied, "cannot be copied .*a connection"), (NeedsContiguousLayers, "faster precision fails .*view"),
     (ReadsItsLayers, "faster precision fails .*running_mean"), (Network, "^$")],
)  # fmt: skip
def test_the_reason_is_kept(build, reason):
    assert re.search(reason, numerics.fast(with_statistics(build()), IMAGES).reason)


def test_a_difference_that_rounding_does_not_explain_is_refused(monkeypatch):
    class Unlike(numerics._ChannelsLast):
        def forward(self, x):
            return super().forward(x) * 1.01

    monkeypatch.setattr(numerics, "_ChannelsLast", Unlike)
    network = with_statistics(Network())
    converted = numerics.fast(network, IMAGES)
    assert converted.used == "float32"
    assert "changes its logits by" in converted.reason
    assert torch.equal(converted.module(IMAGES), network(IMAGES))


def test_gradients_are_refused_where_plain_refuses_them():
    module = numerics.fast(with_statistics(WithoutGradient()), IMAGES).module
    x = IMAGES.clone().requires_grad_(True)
    assert not module(x).requires_grad


def test_nothing_is_compared_without_images():
    converted = numerics.fast(with_statistics(Network()), IMAGES[:0])
    assert converted.used == "float32"
    assert converted.reason


def test_networks_are_frozen():
    module = numerics.fast(Network(), IMAGES).module
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_gpu_computes_plain_numbers_in_float32_and_trains_in_tf32():
    assert not torch.backends.cudnn.allow_tf32
    with numerics.tf32():
        assert torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
