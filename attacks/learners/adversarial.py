"""Adversarial training on released images: what a protection must withstand that hides in a small ball."""

from dataclasses import dataclass
from typing import ClassVar

from bench.registry import attacks
from bench.threat import Access
from defenses.pgd_at import PGDAdversarialTraining


@attacks("adversarial")
@dataclass(frozen=True, kw_only=True)
class Adversarial(PGDAdversarialTraining):
    """Train on the worst images in the linf ball around the released ones: the defense ``pgd-at`` as a learner.

    A shortcut inside the ball can be undone by the adversary, so the network finds no use for it.

    Source:
        Tao et al., NeurIPS 2021, arXiv:2102.04716.
    """

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Tao et al., NeurIPS 2021, arXiv:2102.04716"
