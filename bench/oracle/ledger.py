"""What the queries of a batch have come to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.rules import NEVER


@dataclass(frozen=True)
class Ledger:
    """What each sample of a batch has cost and suffered; tensors (B,), and (B, C, H, W) for ``hits``."""

    forwards: Tensor       # int64, queries answered
    backwards: Tensor      # int64, gradients answered
    first_hit: Tensor      # int64, number of the first misclassified query in the ball, NEVER without one
    stage: Tensor          # int64, which of the attacks that took turns it fell to, -1 where none did
    best_margin: Tensor    # smallest margin that a query in the ball has shown
    best_distance: Tensor  # of the nearest misclassified query, which minimum-norm attacks may ask anywhere; or inf
    invalid: Tensor        # bool, the model answered NaN or infinity
    unconfirmed: Tensor    # int64, hits of coarse numbers that exact ones have denied
    hits: Tensor           # the first misclassified query in the ball; the clean image without one

    @classmethod
    def blank(cls, x: Tensor) -> "Ledger":
        """The ledger of a batch ``x`` that nobody has asked about."""
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        none_yet = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        return cls(
            forwards=count,
            backwards=count.clone(),
            first_hit=torch.full_like(count, NEVER),
            stage=torch.full_like(count, -1),
            best_margin=none_yet,
            best_distance=none_yet.clone(),
            invalid=torch.zeros_like(count, dtype=torch.bool),
            unconfirmed=count.clone(),
            hits=x.clone(),
        )
