"""The nearest point of a hyperplane inside the box [0, 1], in three norms."""

import torch
from torch import Tensor

from bench.threat import Norm


def to_hyperplane(point: Tensor, normal: Tensor, offset: Tensor, norm: Norm) -> Tensor:
    """The smallest move (B, d) that takes ``point`` to the plane and keeps it in the box, exactly.

    Every value can only go so far before it meets the box, and where ``D = offset`` moves are wanted, the moves that
    cost least are filled like water: in linf all values go equally far, in l2 each in proportion to its weight, until
    it meets the box; in l1 the values with the largest weights go one after the other. How far follows from sorting the
    radii at which values stop, and sums of what they have contributed by then. Where the plane misses the box, all
    values go to its end.

    Args:
        point: (B, d) in the box.
        normal: (B, d).
        offset: (B,), ``normal @ point - b`` for the plane ``normal @ z = b``: how far ``point`` is from it, times the
            length of ``normal``, with its sign.
        norm: ``linf``, ``l2`` or ``l1``.

    Source: the problem is Croce and Hein, 2020, arXiv:1907.02044, equation 3; the solution is derived here.
    """
    weight, wanted = normal.abs().double(), offset.abs().double()[:, None]
    away = torch.where((offset < 0)[:, None], normal, -normal).sign().double()  # the way that each value goes
    room = torch.where(away > 0, 1 - point, point).double().clamp(min=0) * away.abs()
    if norm == "l1":
        order = weight.argsort(dim=1, descending=True)
        most, gives = room.gather(1, order), weight.gather(1, order)
        before = (most * gives).cumsum(dim=1) - most * gives
        moves = torch.minimum(((wanted - before) / gives.clamp(min=1e-300)).clamp(min=0), most)
        moves = torch.zeros_like(moves).scatter(1, order, moves)
    else:
        pace = torch.ones_like(weight) if norm == "linf" else weight  # how fast each value goes as the water rises
        moves = torch.minimum(pace * _level(room, weight, pace, wanted), room)
    return (away * moves).to(point.dtype)


def _level(room: Tensor, weight: Tensor, pace: Tensor, wanted: Tensor) -> Tensor:
    """The level (B, 1) at which ``sum(weight * min(pace * level, room))`` is ``wanted`` (B, 1); infinity if at none."""
    full = torch.where(pace > 0, room / pace.clamp(min=1e-300), 0)        # the level at which each value stops
    stops, order = full.sort(dim=1)
    rate = (weight * pace).gather(1, order)
    done = (weight * room).gather(1, order).cumsum(dim=1)
    left = rate.sum(dim=1, keepdim=True) - rate.cumsum(dim=1)             # rate of those that still go after each stop
    reached = done + stops * left                                         # (B, d), rises
    at = (reached < wanted).sum(dim=1, keepdim=True)                      # the first stop that is far enough
    before = (at - 1).clamp(min=0)
    gone, going = done.gather(1, before), left.gather(1, before)
    gone = torch.where(at == 0, 0, gone)
    going = torch.where(at == 0, rate.sum(dim=1, keepdim=True), going)
    level = (wanted - gone) / going.clamp(min=1e-300)
    return torch.where(at == stops.shape[1], torch.inf, level)
