"""Square's windows in sweeps: each place of a grid once before any twice, and an incumbent that is asked about again.

A search by scores under a :class:`Tactic`, which says what is compared, how far an answer is believed, and whether the
search stays in the ball or comes to it along the decision boundary.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attacks.square import HALVINGS, P_INIT, ScoreOracle, window_side
from attacks.windows import proposals
from bench.losses import Loss, margin
from bench.norms import choose, per_sample
from bench.rng import SampleRng
from bench.threat import Threat

LOOK = 16       # steps between two looks at who has given up, which wait for a GPU
TIE = 1e-3      # of a value, within which another is the same
PATIENCE = 100  # refusals in a row, at least, after which a sample gives up
FAR, FINE = math.log(2), 0.03  # of a walk: how much further its radius goes at first, and in the end, in logarithms


@dataclass(frozen=True, kw_only=True)
class Tactic:
    """How scores are read.

    Args:
        loss: what is minimised.
        ties: whether a proposal that changes nothing is taken, so that a search crosses the steps of coarse scores, and
            plateaus.
        recheck: after how many refusals the incumbent is asked about again, and held at what it is told then; so an
            answer that was low by luck blocks the search no longer. ``None`` believes every answer.
        p_init: share of the pixels in the first windows; Square's own by default.
        walks: whether it begins outside the ball, where the start crosses the decision boundary, and stays beside that
            while the radius shrinks: a misclassified incumbent is asked about again nearer to the image, and one that
            ``recheck`` refusals have left where it is a little further off. So only margins near 0 are compared.
    """

    loss: Loss = margin
    ties: bool = False
    recheck: int | None = None
    p_init: float | None = None
    walks: bool = False


def sweep(oracle: ScoreOracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng, tactic: Tactic) -> Tensor:
    """Each sample's incumbent (B, C, H, W) where its budget ends, it falls, or it gives up; of a walk, its start.

    Sides follow the schedule of Square. A sample gives up, where it believes its answers, once half of what it has
    asked, and :data:`PATIENCE` at least, was refused in a row. Costs one query for the start and one for each step.
    """
    space = _Space(x, threat, tactic.walks)
    u = space.proposals.start(rng.fork("start"))
    radius, stride = (x.new_full((len(x),), length) for length in (threat.eps, FAR))
    start = space.image(u, radius)
    held = tactic.loss(oracle.scores(start), y)
    refused = torch.zeros_like(y)
    p_init = P_INIT[threat.norm] if tactic.p_init is None else tactic.p_init
    places = _Places(x.shape[2:], rng.fork("places"))
    rows, seen = torch.arange(len(x), device=x.device), torch.empty(0)
    stands = torch.ones_like(y, dtype=torch.bool)
    labels, streams = y, rng
    work: tuple[Tensor, ...] = (u, held, refused, radius, stride)
    whole = work
    for step in range(1, oracle.query_budget):
        active = oracle.active()
        if step % LOOK == 0 and tactic.recheck is None:
            stands[rows] = work[2] < max(PATIENCE, step // 2)
        if active is not seen or step % LOOK == 0:
            seen = active
            left = active[stands[active]]
            whole = tuple(_put(each, rows, part) for each, part in zip(whole, work, strict=True))
            rows = active if len(left) == len(active) else left
            labels, streams, space = y[rows], rng[rows], _Space(x[rows], threat, tactic.walks)
            work = tuple(each[rows] for each in whole)
        if len(rows) == 0:
            break
        incumbent, lowest, since, radius, stride = work
        side = space.proposals.side(window_side(_share(p_init, step - 1), x.shape[2:]))
        candidate = space.proposals.propose(incumbent, side, streams.fork(step), places.at(side, step)[rows])
        again = torch.zeros_like(since, dtype=torch.bool) if tactic.recheck is None else since >= tactic.recheck
        if tactic.walks:
            again, radius, stride = space.walk(again, lowest, radius, stride)
        value = tactic.loss(oracle.scores(space.image(choose(~again, candidate, incumbent), radius), rows), labels)
        taken = again | (value <= lowest + TIE * lowest.abs() if tactic.ties else value < lowest)
        told = ~value.isnan()
        taken = taken & told
        work = (
            choose(taken & ~again, candidate, incumbent),
            torch.where(taken, value, lowest),
            torch.where(again | (value < lowest), 0, since + told),
            radius,
            stride,
        )
    return start if tactic.walks else _put(whole[0], rows, work[0])


class _Space:
    """Where samples (n, C, H, W) are searched: in the ball, or in directions, which a radius makes images."""

    def __init__(self, x: Tensor, threat: Threat, walks: bool) -> None:
        self.x, self.walks, self.eps = x, walks, threat.eps
        self.most = 1.0 if threat.norm == "linf" else math.sqrt(x.shape[1:].numel())  # the box ends there
        middle, unit = torch.full_like(x, 0.5), replace(threat, eps=0.5)
        self.proposals = proposals(middle, unit, 0) if walks else proposals(x, threat, 0)

    def image(self, u: Tensor, radius: Tensor) -> Tensor:
        """What to ask about where the search is at ``u`` (n, C, H, W); in a walk, ``radius`` (n,) from the image."""
        return (self.x + 2 * per_sample(radius) * (u - 0.5)).clamp(0, 1) if self.walks else u

    def walk(self, again: Tensor, lowest: Tensor, radius: Tensor, stride: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Who is asked again (n,), where, and how far the next step is: nearer where the margin is below 0.

        Until a margin is, the radius doubles; then the steps are halved until they are fine, and only then windows are
        proposed.
        """
        wrong, seeks = lowest <= 0, stride > FINE
        again = wrong | ((again | seeks) & (radius < self.most))
        moved = (radius * torch.where(wrong, -stride, stride).exp()).clamp(self.eps, self.most)
        halved = again & seeks & (wrong | (stride < FAR))
        return again, torch.where(again, moved, radius), torch.where(halved, (stride / 2).clamp(min=FINE), stride)


class _Places:
    """Where windows lie: the cells of a grid in an order of each sample's own, then a grid moved elsewhere, and on."""

    def __init__(self, size: torch.Size | tuple[int, ...], rng: SampleRng) -> None:
        self.size, self.rng = size, rng
        self._side, self._begun = 0, 0
        self._corners = torch.empty(0)

    def at(self, side: int, step: int) -> Tensor:
        """The corners (B, 2) of ``step``, which rises by one from call to call."""
        if side != self._side or step - self._begun >= self._corners.shape[1]:
            self._side, self._begun = side, step
            rng = self.rng.fork(step)
            counts = [max(1, length // side) for length in self.size]
            order = rng.fork("order").uniform(counts[0] * counts[1]).argsort(dim=1)                # (B, cells)
            spare = [length - count * side + 1 for length, count in zip(self.size, counts, strict=True)]
            moved = torch.stack([rng.fork(axis).integers(room) for axis, room in enumerate(spare)], dim=1)
            cells = torch.stack((order // counts[1], order % counts[1]), dim=2)                    # (B, cells, 2)
            self._corners = cells * side + moved[:, None]
        return self._corners[:, step - self._begun]


def _share(p_init: float, iteration: int) -> float:
    return p_init * 0.5 ** sum(iteration > bound for bound in HALVINGS)


def _put(whole: Tensor, rows: Tensor, part: Tensor) -> Tensor:
    whole = whole.clone()
    whole[rows] = part
    return whole
