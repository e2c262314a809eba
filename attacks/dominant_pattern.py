"""Dominant patterns: one perturbation that decides the output, whatever image it is added to."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.universal import Descended, Layer, Reader, adam
from bench.ranges import Count, NonNegative, Positive
from bench.registry import attacks
from bench.threat import Threat


@attacks("dominant-pattern")
@dataclass(frozen=True, kw_only=True)
class DominantPattern(Descended):
    """Dominant pattern (Ye et al., 2021): the network is to say of image and pattern what it says of the pattern alone.

    Neither labels nor clean answers are looked at. Adam takes the steps, and the epoch of the lowest training loss is
    kept. As released: ten epochs in batches of 32, a rate of 0.01 at 10/255, sums that are not clamped to the box
    (``clipped=false``, the default), and the pattern alone shown as it is, around zero.

    Args:
        layer: ``logits``, or the ``features`` below the last linear layer.
        distance: ``cosine`` and ``mse`` compare what is read; ``kl`` is the divergence of the answer to the sum from
            that to the pattern, averaged. ``kl-as-released`` has the two the other way round, as the call in the
            published code does, and is a sum over the batch.

    Source: arXiv:2105.15057, and the authors' code.
    """

    epochs: Count = 10
    batch_size: Count = 32
    layer: Layer = "logits"
    rel_step: Positive = 0.255
    weight_decay: NonNegative = 1e-5
    distance: Literal["cosine", "mse", "kl", "kl-as-released"] = "cosine"

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Ye et al., 2021, arXiv:2105.15057"

    @property
    def reads(self) -> Layer:
        """See :attr:`attacks.universal.Descended.reads`."""
        return self.layer

    def loss(self, read: Reader, x: Tensor, v: Tensor, aims: Tensor) -> Tensor:
        """See :meth:`attacks.universal.Descended.loss`."""
        alone, together = read(v), read(self.shown(x, v))  # (1, d), (B, d)
        if self.distance == "cosine":
            return 1 - F.cosine_similarity(alone, together).mean()
        if self.distance == "mse":
            return F.mse_loss(together, alone.expand_as(together))
        return _divergence(alone, together) / len(x) if self.distance == "kl" else _divergence(together, alone)

    def rating(self, loss: Tensor, fooled: Tensor) -> Tensor:
        """The lowest loss is best."""
        return -loss

    def optimiser(self, v: Tensor, threat: Threat) -> torch.optim.Optimizer:
        """Adam."""
        return adam(v, threat, self.rel_step, self.weight_decay)


def _divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Kullback and Leibler's, of the second distribution from the first, summed over all rows."""
    return (logits.softmax(dim=1) * (logits.log_softmax(dim=1) - others.log_softmax(dim=1))).sum()
