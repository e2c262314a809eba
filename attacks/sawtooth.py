"""Which edit of margins explains what is told on the way to the boundary: from an edge of it, where they jump.

:func:`attacks.probing.probe` asks. What an edit is, and how it is undone, is :class:`attacks.decoding.Edit`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from attacks.decoding import Edit

NEXT_TO = 0.001  # of the height of an edge: what was asked about lies so close to it
ROUGH = 0.02     # of that height: answers at one true margin may differ by it, as those of a solver that stops early
BESIDE = 4       # answers on each side of an edge, which show how rough they are
DEEP = 3         # intervals of two lines in which an edge may lie
FAVOUR = 0.8     # on how uneven two lines are, where a single score moves, to both sides of where they would begin
EQUAL = 0.95     # on how uneven one line is, where all intervals are equally wide
CLOSE = 2        # answers next to the boundary, which lie as close to the end of a mirrored interval
LEAST = 0.9      # of the largest margin so far: what is above goes on rising


class Reported(NamedTuple):
    """What is reported on the ways of n samples to the boundary, and at an edge of the edit, where it rises most.

    ``shown`` (n, m) are the margins from the boundary on, NaN at the end; ``below`` and ``above`` (n,) those on the two
    sides of the edge. ``one_moves`` (n,) says whether a single score differs between these two, and whether the margins
    next to the boundary lie on both sides of the nearest.
    """

    shown: Tensor
    below: Tensor
    above: Tensor
    one_moves: Tensor


def explained(way: Reported) -> Edit:
    """The edit (n,) that explains what is reported on the way to the boundary.

    An edge of the edit, where two neighbouring images are told very different margins, says all about it but what
    it is an edge of. Of the explanations the one is chosen behind which the margins run most evenly, for wrong ones
    let them jump to and fro. Next to the boundary a mirrored interval may be told otherwise, as where AAA keeps to
    its confidence; what is nearer than the largest margin before the edge does not count. Answers may be rough: borders
    of mirrored intervals lie beyond all that is told beside the edge, and of two explanations that do the one with
    equal intervals is preferred.
    """
    shown, edge, below, above = way.shown, way.shown[:, 0], way.below, way.above
    told = shown.nan_to_num(-torch.inf)
    rank = (shown == above[:, None]).long().argmax(dim=1)               # of the edge, from the boundary on
    places = torch.arange(shown.shape[1], device=shown.device)
    rising = (told >= LEAST * told.cummax(dim=1).values).long().cumprod(dim=1) > 0
    nearest = torch.where(rising, told, -torch.inf).argmax(dim=1)
    peak = torch.where(places < rank[:, None].clamp(min=1), told, -torch.inf).amax(dim=1)
    one, top = torch.ones_like(edge), told.amax(dim=1)
    under, over = _rough(told, rank, below, above)
    rough = over - above + below - under

    def changes(number: int) -> Tensor:
        """The height of two lines that change places, at such an edge, in the interval of that number."""
        apart, drop = above - below, edge - below
        return (drop + (drop.square() + 4 * number * apart * edge).sqrt()) / (2 * apart)

    slack = NEXT_TO * (over - under)                            # the edge lies between the two
    between = (over - under) / 2 + slack
    explanations = (
        (top + slack, one, top + slack),                     # the first interval is all there is
        (over - peak + slack, one, peak + slack),            # the border of one which is as wide as it shows
        (over / 2 + slack, one, over / 2 + slack),           # the one between two that are equally wide
        (between, one, under - slack),                       # one between the second and the third
        (between, one, under - between - slack),                     # one further away
        *(_lines(edge, changes(number)) for number in range(DEEP)),              # two lines change places
        *(_lines(edge, number * edge / (above - edge)) for number in range(1, DEEP)),  # or begin anew
    )
    columns = zip(*explanations, strict=True)
    interval, height, offset = (torch.stack(column, dim=1)[..., None] for column in columns)    # (n, c, 1)
    lines = height < 1
    counts = lines | (places >= nearest.clamp(min=CLOSE)[:, None, None])
    undone = Edit(interval, height, offset).undone(shown[:, None])                              # (n, c, m)
    true = torch.where(counts, undone, torch.nan)
    way_down = (true[..., 1:] - true[..., :-1]).abs().nan_to_num(0).sum(dim=2)
    least = torch.where(lines[..., 0], 0, true.nan_to_num(torch.inf).amin(dim=2))
    uneven = way_down / (true.nan_to_num(-torch.inf).amax(dim=2) - least)
    uneven = torch.where(lines[..., 0], FAVOUR * uneven, uneven)
    uneven = torch.where((offset == interval)[..., 0] & ~lines[..., 0], EQUAL * uneven, uneven)
    sound = (interval > 0) & (offset >= 0) & (offset <= 1.05 * interval) & (height > 0.01)
    sound = sound & (~lines | way.one_moves[:, None, None]) & (height <= 1)
    number = torch.where(sound[..., 0], uneven, torch.inf).nan_to_num(torch.inf).argmin(dim=1, keepdim=True)
    interval, height, offset = (part[..., 0].gather(1, number).squeeze(1) for part in (interval, height, offset))
    # What is told a little below a border is read as from above it: too high a margin is refused, too low a one held.
    return Edit(interval, height, torch.where(height < 1, offset, (offset - rough).clamp(min=0)))


def _rough(told: Tensor, rank: Tensor, below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """The least of the answers just below an edge, which is at ``rank`` (n,), and the largest of those just above."""
    places = torch.arange(told.shape[1], device=told.device) - rank[:, None]
    upper, lower = (places >= 0) & (places < BESIDE), (places < 0) & (places >= -BESIDE)
    most = ROUGH * (above - below)
    over = torch.where(upper & (told < (above + most)[:, None]), told, above[:, None]).amax(dim=1)
    under = torch.where(lower & (told > (below - most)[:, None]), told, below[:, None]).amin(dim=1)
    return under.minimum(below), over.maximum(above)


def _lines(edge: Tensor, height: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two lines that begin at ``edge``, which is ``height`` of their first interval."""
    interval = edge / height * (1 + NEXT_TO)
    return interval, height, interval
