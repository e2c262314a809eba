"""In which order the samples of a cell are taken where a run may stop at any of them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WORD = (1 << 64) - 1  # the largest number of 64 bits


def in_order(ids: Sequence[int]) -> NDArray[np.intp]:
    """(n,) the positions of samples with the numbers ``ids``, first the one that is taken first.

    The order is a fixed shuffle of the numbers, the same for every cell: data sets may be sorted by class, and what is
    taken first has to be no other than what is left. So the samples that two cells have in common come in one order.

    Source: the mixing function of SplitMix64 (Steele, Lea and Flood, 2014, OOPSLA).
    """
    mixed = np.fromiter((int(each) & WORD for each in ids), np.uint64, len(ids))
    mixed += np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")
