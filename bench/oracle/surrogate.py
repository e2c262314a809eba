"""What examples are made on where that is not the attacked model."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn


class Surrogate(nn.Module):
    """Networks as one, whose logits are averaged; each of ``networks`` counts what it answers, asked here or alone.

    Source: the ensemble in logits of Dong et al., 2018, arXiv:1710.06081, section 3.3, with equal weights.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(map(Counted, networks))

    @property
    def originals(self) -> list[nn.Module]:
        """The networks themselves, for who makes one of his own from a copy."""
        return [cast(Counted, network).network for network in self.networks]

    @property
    def forwards(self) -> int:
        """Images that passed the networks, of each network by itself."""
        return sum(cast(Counted, network).forwards for network in self.networks)

    @property
    def backwards(self) -> int:
        """Images whose logits a gradient went back from."""
        return sum(cast(Counted, network).backwards for network in self.networks)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) from images (B, C, H, W)."""
        answers = [network(x) for network in self.networks]
        logits: Tensor = answers[0] if len(answers) == 1 else torch.stack(answers).mean(dim=0)
        return logits


class Counted(nn.Module):
    """``network``, with the ``forwards`` and ``backwards`` of the images that it was asked about."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) from images (B, C, H, W)."""
        logits: Tensor = self.network(x)
        self.forwards += len(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)
