"""FG-UAP: one perturbation that takes the features of every image away from where they were."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.universal import Descended, Layer, Reader, adam
from bench.ranges import Count, NonNegative, Positive
from bench.registry import attacks
from bench.threat import Threat


@attacks("fg-uap")
@dataclass(frozen=True, kw_only=True)
class FGUAP(Descended):
    """Feature-gathering UAP (Ye et al., 2022): features with the perturbation are turned away from those without.

    What is minimised is their cosine. The features are what goes into the last linear layer, where classes have
    collapsed to points; with the perturbation all images gather around one, and most fall into one class. Adam takes
    the steps. The epoch that fools most held-out training images is kept; the published code chooses on the images that
    it reports.

    As released: two epochs in batches of 32, a rate of 0.02 at 10/255, a weight decay of 1e-5 on the perturbation, no
    clamp to the box (``clipped=false``, the default). It begins at zero there, where the gradient of a cosine vanishes
    and roundings decide the way; here it begins at noise of a thousandth of eps.

    Source: arXiv:2209.13113, and the authors' code.
    """

    epochs: Count = 2
    batch_size: Count = 32
    layer: Layer = "features"
    rel_step: Positive = 0.51
    weight_decay: NonNegative = 1e-5

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Ye et al., 2022, arXiv:2209.13113"

    @property
    def reads(self) -> Layer:
        """See :attr:`attacks.universal.Descended.reads`."""
        return self.layer

    def aims(self, read: Reader, x: Tensor) -> Tensor:
        """What is read of each clean image."""
        return read(x)

    def loss(self, read: Reader, x: Tensor, v: Tensor, aims: Tensor) -> Tensor:
        """See :meth:`attacks.universal.Descended.loss`."""
        return F.cosine_similarity(read(self.shown(x, v)), aims).mean()

    def optimiser(self, v: Tensor, threat: Threat) -> torch.optim.Optimizer:
        """Adam."""
        return adam(v, threat, self.rel_step, self.weight_decay)
