"""UAP: one perturbation that pushes most images out of their class."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.universal import Descended, Reader
from bench.losses import margin
from bench.norms import steepest
from bench.ranges import Count, Positive
from bench.registry import attacks
from bench.threat import Threat

FOOLED = -5.0  # logits: an image whose margin is below pushes no more


@attacks("uap")
@dataclass(frozen=True, kw_only=True)
class UAP(Descended):
    """Universal adversarial perturbation (Moosavi-Dezfooli et al., CVPR 2017), by descent on batches.

    The paper adds up DeepFool steps, one image after the other; here steps of ``rel_step`` eps go down the mean margin
    of the class that the network gives the clean image, as in Shafahi et al. (AAAI 2020): the same goal for a fraction
    of the passes.

    Source: arXiv:1610.08401, section 3; the descent is that of arXiv:1811.11304, on margins that stop counting
        at -5.
    """

    epochs: Count = 5
    batch_size: Count = 128
    clipped: bool = True
    rel_step: Positive = 0.1

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Moosavi-Dezfooli et al., 2017, arXiv:1610.08401"

    def aims(self, read: Reader, x: Tensor) -> Tensor:
        """The class (B,) of each clean image."""
        return read(x).argmax(dim=1)

    def loss(self, read: Reader, x: Tensor, v: Tensor, aims: Tensor) -> Tensor:
        """See :meth:`attacks.universal.Descended.loss`."""
        return margin(read(self.shown(x, v)), aims).clamp(min=FOOLED).mean()

    def steer(self, gradient: Tensor, threat: Threat) -> Tensor:
        """The steepest direction of the norm."""
        return steepest(gradient, threat.norm)

    def optimiser(self, v: Tensor, threat: Threat) -> torch.optim.Optimizer:
        """Equal steps."""
        return torch.optim.SGD([v], lr=self.rel_step * threat.eps)
