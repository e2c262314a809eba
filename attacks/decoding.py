"""Margins that a defense edits interval by interval: how to undo the edit, and how to learn it from answers.

True margins run evenly along a line, down to 0 at the boundary and on below it, where nothing is edited. Edited ones
jump. So the edit is the one behind which the margins of a line bend least.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.square import ScoreOracle
from bench.losses import margin

COARSE, FINE = 8, 25  # questions for each sample: until one is misclassified, and from there back to the clean image
WIDTHS, HEIGHTS, OFFSETS = 110, 19, 16  # values of each parameter that are tried
NARROWEST, WIDEST = 0.08, 4.0  # intervals, as shares of the largest margin reported
ROUNDS, AROUND, CLOSER = 14, 9, 0.7  # how often values around the best are tried, how many, how much closer each time
CLEAR = 0.5  # of the bends that are left, above which no edit has been found
KNOWN = ((6.0, 1.0, 0.0), (4.0, 1.0, 0.0), (6.0, 0.3, 0.0))  # published edits, which win where they fit as well
AS_WELL = 1.05


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


def scan(oracle: ScoreOracle, x: Tensor, y: Tensor) -> Tensor:
    """The margins (B, 25) that are reported on the way from ``x`` towards its negative, evenly until past the boundary.

    Costs 33 questions. The way leads out of the ball.
    """
    def ask(share: Tensor) -> Tensor:
        return margin(oracle.scores(torch.lerp(x, 1 - x, share.to(x).view(-1, 1, 1, 1))), y)

    steps = torch.arange(1, COARSE + 1, device=x.device)
    wrong = torch.stack([ask(step.expand(len(x)) / COARSE) < 0 for step in steps], dim=1)
    past = torch.where(wrong, steps, COARSE).amin(dim=1) / COARSE
    return torch.stack([ask(past * step / (FINE - 1)) for step in range(FINE)], dim=1)


def learned(reported: Tensor) -> Edit:
    """The edit of each sample behind which the margins (B, m) of its line bend least; none where none is much better.

    A grid over all three parameters, then values ever closer to the best.
    """
    best, bends = _nearest(reported, *_grid(reported))
    for number in range(ROUNDS):
        for parameter in range(3):
            best, bends = _nearest(reported, best, _around(best, parameter, CLOSER**number))
    known = torch.tensor(KNOWN, dtype=best.dtype, device=best.device).expand(len(best), -1, -1)
    published, bent = _nearest(reported, known)
    best = torch.where((bent <= AS_WELL * bends)[:, None], published, best)
    found = torch.minimum(bent, bends) < CLEAR * _bends(reported)
    interval, height, offset = best.unbind(1)
    return Edit(torch.where(found, interval, torch.nan), height, offset)


def _grid(reported: Tensor) -> list[Tensor]:
    """Edits (B, c, 3) of every width: interval, height, offset."""
    top = reported.amax(dim=1)[:, None]
    heights = torch.linspace(0.05, 0.95, HEIGHTS).to(reported)
    offsets = (torch.arange(OFFSETS) / OFFSETS).to(reported)
    height = torch.cat((heights, torch.ones_like(offsets)))
    offset = torch.cat((torch.zeros_like(heights), offsets))
    widths = torch.linspace(math.log(NARROWEST), math.log(WIDEST), WIDTHS).exp().tolist()
    return [
        torch.stack(torch.broadcast_tensors(width * top, height, width * top * offset), dim=2) for width in widths
    ]


def _around(best: Tensor, parameter: int, closeness: float) -> Tensor:
    """Edits (B, 9, 3) that differ from ``best`` (B, 3) in one ``parameter``."""
    interval, height, _ = best.unbind(1)
    step = {0: 0.04 * interval, 1: torch.full_like(height, 0.05), 2: interval / OFFSETS}[parameter] * closeness
    near = best[:, None].repeat(1, AROUND, 1)
    near[:, :, parameter] += step[:, None] * torch.linspace(-1, 1, AROUND, dtype=best.dtype, device=best.device)
    mirror = (height == 1)[:, None]
    near[:, :, 1] = torch.where(mirror, 1, near[:, :, 1].clamp(0.01, 0.99))
    near[:, :, 2] = torch.where(mirror, torch.minimum(near[:, :, 2].clamp(min=0), 0.999 * near[:, :, 0]), 0)
    return near


def _nearest(reported: Tensor, *some: Tensor) -> tuple[Tensor, Tensor]:
    """Of edits, each tensor (B, c, 3) or (B, 3), the one (B, 3) that bends each line least, the first of equals; and
    how much that is (B,)."""
    best, least = reported.new_ones(len(reported), 3), reported.new_full((len(reported),), math.inf)
    for edits in some:
        each = edits if edits.ndim == 3 else edits[:, None]
        interval, height, offset = each[..., None].unbind(2)                              # (B, c, 1)
        bends, number = _bends(Edit(interval, height, offset).undone(reported[:, None])).min(dim=1)
        chosen = each.gather(1, number[:, None, None].expand(-1, 1, 3)).squeeze(1)
        better = bends < least
        best, least = torch.where(better[:, None], chosen, best), torch.where(better, bends, least)
    return best, least


def _bends(margins: Tensor) -> Tensor:
    """By how much margins (..., m) along a line differ from straight ones: the sum of all second differences (...)."""
    return margins.diff(n=2, dim=-1).abs().sum(dim=-1)
