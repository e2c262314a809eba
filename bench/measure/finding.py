"""What a test has seen of a served model."""

from dataclasses import dataclass

RARE = 0.01  # share of the images that rounding errors may move, namely those at a step of their scores
FEWEST = 20  # images or moves, below which a share says nothing


@dataclass(frozen=True)
class Finding:
    """What one test saw on ``n`` images: a ``statistic``, which fires above ``threshold``, and a sentence about it.

    Where the two say otherwise than ``fired``, the sentence says why: too few images, noise, a change of class.
    """

    flag: str
    fired: bool
    statistic: float
    threshold: float
    n: int
    evidence: str
