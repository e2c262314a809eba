"""Calls that name a sample more than once."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Repeats:
    """The queries of such a call, laid out as k queries of each sample, in the order in which they were asked.

    Samples that are named less often than others are padded with their last query, which is not asked again.
    """

    rows: Tensor     # (m,) int64, the samples, each once
    queries: Tensor  # (m, k) int64, positions in the call
    asked: Tensor    # (m, k) bool, False for padding
    sample: Tensor   # (n,) int64, where the answer to each query of the call is found
    place: Tensor    # (n,) int64

    def stack(self, x: Tensor) -> Tensor:
        """Queries (n, j, C, H, W) as (m, k j, C, H, W)."""
        return x[self.queries].flatten(1, 2)

    def unstack(self, answers: Tensor, each: int) -> Tensor:
        """Answers (m, k j, ...) as (n, j, ...), ``each`` = j."""
        of_each: Tensor = answers.unflatten(1, (-1, each))  # (m, k, j, ...)
        return of_each[self.sample, self.place]


def repeats(rows: Tensor) -> Repeats | None:
    """How the calls that name the samples ``rows`` (n,) repeat some of them; ``None`` where none is repeated.

    On a GPU this waits for the device.
    """
    if len(rows) < 2 or (not rows.is_cuda and bool((rows[1:] > rows[:-1]).all())):
        return None
    distinct, sample, counts = rows.unique(return_inverse=True, return_counts=True)
    if len(distinct) == len(rows):
        return None
    in_turn = sample.argsort(stable=True)                                   # queries, sample after sample
    first = counts.cumsum(0) - counts                                       # (m,) where each sample's begin there
    place = torch.empty_like(rows)
    place[in_turn] = torch.arange(len(rows), device=rows.device) - first[sample[in_turn]]
    k = torch.arange(int(counts.max()), device=rows.device)
    queries = in_turn[first[:, None] + torch.minimum(k, counts[:, None] - 1)]
    return Repeats(distinct, queries, k < counts[:, None], sample, place)
