"""Margins that a defense edits interval by interval, and how the edit is undone.

True margins run evenly along a line, down to 0 at the boundary and on below it, where nothing is edited. Edited ones
jump, and from their jumps :func:`attacks.sawtooth.explained` finds the edit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.square import ScoreOracle
from bench.losses import margin


@dataclass(frozen=True)
class Edit:
    """How margins are reported: on one of two lines in each interval, numbers or tensors that broadcast with margins.

    Both lines begin at ``height`` (of an interval) above its border; one falls by ``height``, the other rises by the
    rest, as in the Dashed Line Defense. At height 1 there is one line, AAA-linear's mirror. Borders are at ``offset``
    and multiples of ``interval`` beyond; the first interval ends there. Where ``interval`` is NaN, nothing is edited.
    """

    interval: float | Tensor
    height: float | Tensor = 1.0
    offset: float | Tensor = 0.0

    def undone(self, reported: Tensor) -> Tensor:
        """The margins behind those ``reported``; negative ones are not edited.

        At height 1 one of [k tau, (k + 1) tau) is reported in (k tau, (k + 1) tau], and as 0 where it is just below
        tau.
        """
        parts = (part if isinstance(part, Tensor) else reported.new_full((), part) for part in vars(self).values())
        interval, height, offset = parts
        number = ((reported - offset) / interval).ceil() - 1
        first = (reported <= offset) & (offset > 0)
        border = torch.where(first, 0, offset + number.clamp(min=0) * interval)
        width = torch.where(first, offset, interval)
        falling = ((1 + height) * border + height * width - reported) / height
        above = reported - border - height * width
        true = torch.where((above > 0) & (height < 1), border + above / (1 - height), falling)
        return torch.where((reported < 0) | interval.isnan(), reported, true)

    def __getitem__(self, rows: Tensor) -> "Edit":
        """That of some samples, where each has its own."""
        return Edit(*(part[rows] if isinstance(part, Tensor) else part for part in vars(self).values()))


class Undone:
    """An oracle behind which each margin is what it was before the edit."""

    def __init__(self, oracle: ScoreOracle, y: Tensor, edit: Edit) -> None:
        self.oracle, self.y, self.edit, self.query_budget = oracle, y, edit, oracle.query_budget

    def active(self) -> Tensor:
        """See :class:`attacks.square.ScoreOracle`."""
        return self.oracle.active()

    def scores(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits (n, K) whose true classes are moved to where their margins are the true ones."""
        logits = self.oracle.scores(x, rows)
        y, edit = (self.y, self.edit) if rows is None else (self.y[rows], self.edit[rows])
        reported = margin(logits, y)
        return logits.scatter_add(1, y[:, None], (edit.undone(reported) - reported)[:, None])
