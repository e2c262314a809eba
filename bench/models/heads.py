"""Networks with several heads: one beginning, and ends of the same kind whose logits are added."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Heads(nn.Module):
    """``heads`` on a shared ``trunk``; it answers with the sum of their logits."""

    def __init__(self, normalise: nn.Module, trunk: nn.Module, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.normalise = normalise
        self.trunk = trunk
        self.heads = nn.ModuleList(heads)

    def each(self, x: Tensor) -> Tensor:
        """Logits (heads, B, K) of images (B, C, H, W) in [0, 1]."""
        features = self.trunk(self.normalise(x))
        return torch.stack([head(features) for head in self.heads])

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.each(x).sum(dim=0)


def pooled(*layers: nn.Module, linear: nn.Module) -> nn.Module:
    """A head: ``layers``, the mean over what is left of the image, and ``linear``."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


def heads_of(model: nn.Module) -> list[nn.Module]:
    """The heads of ``model``; a network without any is one by itself."""
    return list(model.heads) if isinstance(model, Heads) else [model]


def logits_of_heads(model: nn.Module, x: Tensor) -> Tensor:
    """The logits (heads, B, K) of each head of ``model`` for ``x`` (B, C, H, W)."""
    return model.each(x) if isinstance(model, Heads) else model(x)[None]
