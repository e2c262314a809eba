"""Where single-step training has learnt to fool its own attack."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

LOST, FALL, AHEAD = 0.1, 0.2, 0.2  # of PGD: what is none, and what is much; of a single step: by how much it is better


class Collapse(NamedTuple):
    """An epoch, counted from 1, and what was left after it."""

    epoch: int
    pgd_accuracy: float
    step_accuracy: float


def collapse(epochs: Sequence[Mapping[str, float]]) -> Collapse | None:
    """The first epoch after which the network only withstands a single step: catastrophic overfitting.

    PGD leaves less than a tenth, or takes twenty points more than after the epoch before, while a single step leaves at
    least twenty points more than PGD.
    """
    before = 0.0
    for number, line in enumerate(epochs, start=1):
        robust, step = line["pgd_accuracy"], line["step_accuracy"]
        if (robust < LOST or robust < before - FALL) and step > robust + AHEAD:
            return Collapse(number, robust, step)
        before = robust
    return None
