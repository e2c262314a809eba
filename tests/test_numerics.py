"""Fast numbers are the same numbers, sooner."""

import torch
from torch import nn

from bench import numerics


class Branching(nn.Module):
    """A convolution with two users must keep its batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.after = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y = self.first(x)
        z = self.after(self.second(torch.relu(self.norm(y))))
        return self.head((y + z).mean(dim=(2, 3)))


class Untraceable(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :2] if x.sum() > 0 else x.flatten(1)[:, 2:4]


def with_statistics(network):
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def test_folding_keeps_the_logits_and_the_original():
    network = with_statistics(Branching()).double()
    x = torch.rand(5, 3, 9, 9, dtype=torch.float64)
    before = network(x)
    fast = numerics.fast(network)
    assert torch.allclose(fast(x), before, atol=1e-10)
    assert torch.equal(network(x), before)
    left = [module for module in fast.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(left) == 1  # the one whose convolution has a second user


def test_a_network_that_cannot_be_traced_still_runs():
    network = Untraceable()
    x = torch.rand(2, 3, 4, 4)
    assert torch.equal(numerics.fast(network)(x), network(x))


def test_networks_are_frozen():
    network = numerics.fast(Branching())
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
