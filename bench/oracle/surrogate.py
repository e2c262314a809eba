"""What examples are made on where that is not the attacked model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Surrogate(nn.Module):
    """Networks as one, whose logits are averaged; ``forwards`` and ``backwards`` count the images that passed each.

    Source: the ensemble in logits of Dong et al., 2018, arXiv:1710.06081, section 3.3, with equal weights.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) from images (B, C, H, W)."""
        answers = [network(x) for network in self.networks]
        self.forwards += len(answers) * len(x)
        logits: Tensor = answers[0] if len(answers) == 1 else torch.stack(answers).mean(dim=0)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.backwards += len(self.networks) * len(gradient)
