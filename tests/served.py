"""What output defenses are put around and asked by where a test has to know every number."""

import torch
from torch import nn

from bench.dataset import Split
from bench.rng import SampleRng

NOTHING = Split(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64))  # to calibrate on


class Echo(nn.Module):
    """Answers with what it was shown."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def query(number: int, count: int) -> SampleRng:
    """The streams of ``count`` samples in their query ``number``."""
    return SampleRng.create(0, torch.arange(count), "test").fork(number)
