"""APGD: projected gradient descent that finds its step sizes by itself."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench.errors import ConfigError
from bench.losses import WITH_DLR, Loss, check_classes
from bench.norms import TINY, lp_norm, per_sample, project, steepest
from bench.oracle import Oracle, Rules
from bench.ranges import Count
from bench.registry import added, attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

MOMENTUM = 0.75  # share of the new step, the rest goes on with the last one
RHO = 0.75       # share of steps between two checks that must have helped
SPARSER = 1.5    # in l1, by how much fewer values a step moves than the best point has moved
SLOWEST = 10.0   # in l1, eps over the smallest step
WIDE = ((3.0, 0.3), (2.0, 0.3))  # a wide start: in how many eps, for what share of the steps; the rest is in eps itself


@dataclass(frozen=True, kw_only=True)
class AutoPGD:
    """What the untargeted and the targeted attack share."""

    steps: Count = 100
    restarts: Count = 1
    eot: Count = 1
    wide_start: bool = added(False)

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l1", "l2", "linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Croce and Hein, 2020, arXiv:2003.01690"

    def __post_init__(self) -> None:
        if self.wide_start and self.steps <= len(WIDE):
            raise ConfigError(f"steps is {self.steps}; a wide start goes through {len(WIDE) + 1} radii, a step in each")

    @property
    def rules(self) -> Rules:
        """With ``eot``, the queries of a call are draws of one image; a wide start leaves the ball."""
        return Rules(averages=self.eot > 1, lookahead=self.wide_start)

    @property
    def run_queries(self) -> int:
        """Forward passes of one run from one start."""
        return (self.steps + 1 + (len(WIDE) if self.wide_start else 0)) * self.eot

    def search(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat) -> "Search":
        """The runs to come on the samples ``x`` (B, C, H, W)."""
        return Search(oracle, x, y, radii(threat, self.steps, wide=self.wide_start), self.eot)


@attacks("apgd")
@dataclass(frozen=True, kw_only=True)
class APGD(AutoPGD):
    """Auto-PGD (Croce and Hein, ICML 2020) on the cross-entropy or on DLR, in linf and l2, and in l1 with sparse steps.

    Steps start at 2 eps and are halved where they stop to help, each time going back to the best point. Costs
    ``restarts * (steps + 1)`` forward and ``restarts * steps`` backward passes, times ``eot``, and with ``wide_start``
    two forward passes more a start; a sample stops at its first success. Two things differ from the public code: the
    first step is held against the loss at the start, where that code compares with 0, and the last point, of which
    nobody needs a gradient, costs none.

    In l1 steps start at eps and move only the values with the largest gradients: a fifth of all at first, then two
    thirds as many as the best point has moved.

    Args:
        eot: draws of a random model for each point. Their mean loss and gradient count, and a sample falls when their
            mean is misclassified.
        wide_start: begin in the ball of 3 eps and go on in that of 2 eps, 30 % of the steps in each, every time from
            the best point moved into the smaller ball. The paper's way in l1, where it finds more.

    Source: arXiv:2003.01690, algorithm 1; l1 as in arXiv:2103.01208, section 3, whose larger radii are ``wide_start``.
    """

    loss: Literal["ce", "dlr"] = "ce"

    def check(self, classes: int, shape: tuple[int, int, int]) -> None:
        """Whether the data have the classes that the loss compares."""
        check_classes(self.loss, classes)

    @property
    def most_queries(self) -> int:
        """Forward passes that a sample costs which never falls."""
        return self.restarts * self.run_queries

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's point of the largest loss."""
        search = self.search(oracle, x, y, threat)
        for restart in range(self.restarts):
            search.run(rng.fork(restart), lambda rows: WITH_DLR[self.loss])
        return search.best


def checkpoints(steps: int) -> list[int]:
    """After which of ``steps`` the step size is looked at: 22, 41, 57, 70, 80, 87, 93 and 99 of 100."""
    found, gap = list[int](), max(math.floor(0.22 * steps), 1)
    while sum(found[-1:]) + gap <= steps:
        found.append(sum(found[-1:]) + gap)
        gap = max(gap - max(math.floor(0.03 * steps), 1), max(math.floor(0.06 * steps), 1))
    return found


def radii(threat: Threat, steps: int, *, wide: bool) -> list[tuple[Threat, int]]:
    """The balls in which ``steps`` steps go, and how many in each; where they start ``wide``, those of ``WIDE`` first.
    """
    first = [(factor, math.ceil(share * steps)) for factor, share in WIDE] if wide else []
    most = 1.0 if threat.norm == "linf" else math.inf
    larger = [(replace(threat, eps=min(factor * threat.eps, most)), count) for factor, count in first]
    return [*larger, (threat, steps - sum(count for _, count in first))]


def start(x: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
    """Random points (B, C, H, W) on the surface of the ball, clamped to the box; in l1 noise moved into the ball."""
    shape = x.shape[1:]
    if threat.norm == "l1":
        return project(x + rng.normal(*shape).to(x), x, threat)
    noise = rng.uniform(*shape).to(x) * 2 - 1 if threat.norm == "linf" else rng.normal(*shape).to(x)
    return project(x + threat.eps * noise / per_sample(lp_norm(noise, threat.norm) + TINY), x, threat)


@dataclass
class _State:
    """Where n samples stand; values are losses, which fall, and tensors (n,) or (n, C, H, W)."""

    u: Tensor
    before: Tensor         # the point before ``u``
    gradient: Tensor       # at ``u``
    value: Tensor          # at ``u``
    best: Tensor
    best_gradient: Tensor
    best_value: Tensor
    size: Tensor           # of the next step
    helped: Tensor         # how many steps since the last check have lowered the value
    checked: Tensor        # the best value at the last check
    shrunk: Tensor         # whether that check has made steps smaller
    share: Tensor          # of the values that an l1 step moves
    moved: Tensor          # values that the best point had moved at the last check, in l1

    def at(self, places: Tensor) -> "_State":
        """Those of the samples at ``places``."""
        return _State(*(getattr(self, field.name)[places] for field in fields(self)))


class Search:
    """Runs of APGD one after the other, on the samples that still stand.

    Args:
        balls: those that a run goes through, and how many steps in each; the last is the one that counts. In each ball
            one point more is asked about than there are steps, ``eot`` times each.
    """

    def __init__(
        self, oracle: Oracle, x: Tensor, y: Tensor, balls: list[tuple[Threat, int]], eot: int = 1
    ) -> None:
        self.oracle, self.x, self.y, self.balls, self.eot = oracle, x, y, balls, eot
        self.best = x.clone()  # of all runs, in the last ball
        self.lowest = torch.full(x.shape[:1], torch.inf, dtype=x.dtype, device=x.device)

    def run(self, rng: SampleRng, loss_of: Callable[[Tensor], Loss]) -> None:
        """From random points, minimise what ``loss_of`` gives for the samples at ``rows`` (n,)."""
        points = start(self.x, self.balls[0][0], rng)
        for number, (threat, steps) in enumerate(self.balls, 1):
            points = project(points, self.x, threat) if number > 1 else points
            for rows, state in self._descend(points, threat, steps, loss_of):
                points[rows] = state.best
                if number == len(self.balls):
                    self._keep(rows, state)

    def _descend(
        self, points: Tensor, threat: Threat, steps: int, loss_of: Callable[[Tensor], Loss]
    ) -> Iterator[tuple[Tensor, _State]]:
        """From ``points`` (B, C, H, W), in the ball of ``threat``; yields where all stand when somebody drops out."""
        rows = self.oracle.active()
        if len(rows) == 0:
            return
        sparse = threat.norm == "l1"
        checks = set(range(0, steps + 1, max(int(0.04 * steps), 1))) if sparse else {*checkpoints(steps)}
        last_check = 0
        x, state = self.x[rows], self._begin(points[rows], rows, loss_of(rows), threat)
        for step in range(1, steps + 1):
            active = self.oracle.active()
            if len(active) == 0:
                break
            if active is not rows:  # gather anew only when somebody has dropped out
                yield rows, state
                state, rows = state.at(torch.searchsorted(rows, active)), active
                x = self.x[rows]
            u = _sparse_step(state, x, threat) if sparse else _step(state, x, threat, first=step == 1)
            value, gradient = self._ask(u, rows, loss_of(rows), last=step == steps)
            better = value < state.best_value
            state = replace(
                state, u=u, before=state.u, gradient=gradient, value=value,
                best=torch.where(per_sample(better), u, state.best),
                best_gradient=torch.where(per_sample(better), gradient, state.best_gradient),
                best_value=torch.where(better, value, state.best_value),
                helped=state.helped + (value < state.value),
            )  # fmt: skip
            if step in checks:
                state = _look_sparse(state, x, threat) if sparse else _look(state, step - last_check)
                last_check = step
        yield rows, state

    def _begin(self, u: Tensor, rows: Tensor, loss: Loss, threat: Threat) -> _State:
        value, gradient = self._ask(u, rows, loss, last=False)
        size = torch.full_like(value, threat.eps if threat.norm == "l1" else 2 * threat.eps)
        moved = torch.full_like(value, u[0].numel())
        share = torch.full_like(value, 0.2)
        if len(self.balls) > 1:
            moved = (u != self.x[rows]).flatten(1).sum(dim=1).to(value)
            share = moved / u[0].numel() / SPARSER
        return _State(
            u=u, before=u, gradient=gradient, value=value, best=u, best_gradient=gradient,
            best_value=value.nan_to_num(torch.inf), size=size, helped=torch.zeros_like(rows),
            checked=value.nan_to_num(torch.inf), shrunk=torch.ones_like(rows, dtype=torch.bool),
            share=share, moved=moved,
        )  # fmt: skip

    def _ask(self, u: Tensor, rows: Tensor, loss: Loss, *, last: bool) -> tuple[Tensor, Tensor]:
        """The loss (n,) at ``u``, NaN for who gets no answer, and its gradient, which the ``last`` point does without.

        Of several draws, their means.
        """
        points = u if self.eot == 1 else u[:, None].expand(-1, self.eot, *u.shape[1:])
        if last:
            logits, gradient = self.oracle.scores(points, rows), torch.zeros_like(u)
        else:
            logits, gradient = self.oracle.gradients(points, loss, rows)
        y = self.y[rows].repeat_interleave(self.eot)
        value = loss(logits.flatten(0, -2), y).view(len(u), -1).mean(dim=1).to(u.dtype)
        return value, gradient if gradient.ndim == u.ndim else gradient.sum(dim=1) / self.eot

    def _keep(self, rows: Tensor, state: _State) -> None:
        better = state.best_value < self.lowest[rows]
        self.best[rows] = torch.where(per_sample(better), state.best, self.best[rows])
        self.lowest[rows] = torch.where(better, state.best_value, self.lowest[rows])


def _step(state: _State, x: Tensor, threat: Threat, *, first: bool) -> Tensor:
    """The next points (n, C, H, W): a step, and what is left of the last one; both end in ball and box."""
    step = project(state.u - per_sample(state.size) * steepest(state.gradient, threat.norm), x, threat)
    if first:
        return step
    return project(state.u + MOMENTUM * (step - state.u) + (1 - MOMENTUM) * (state.u - state.before), x, threat)


def _look(state: _State, steps: int) -> _State:
    """Halve the size of steps, and go back to the best point, where the last ``steps`` did not do.

    Either too few of them have helped, or the best point is still the one of the last check, which changed nothing.
    """
    stuck = (state.helped <= RHO * steps) | (~state.shrunk & (state.best_value >= state.checked))
    return replace(
        state, u=torch.where(per_sample(stuck), state.best, state.u),
        gradient=torch.where(per_sample(stuck), state.best_gradient, state.gradient),
        size=torch.where(stuck, state.size / 2, state.size),
        helped=torch.zeros_like(state.helped), checked=state.best_value, shrunk=stuck,
    )  # fmt: skip


def _sparse_step(state: _State, x: Tensor, threat: Threat) -> Tensor:
    """The next points in l1: the values with the largest gradients move, all equally far."""
    slope = state.gradient.flatten(1).abs()
    values = slope.shape[1]
    place = ((1 - state.share) * values).long().clamp(0, values - 1)
    least = slope.sort(dim=1).values.gather(1, place[:, None])
    move = torch.where(slope >= least, state.gradient.flatten(1).sign(), 0)
    move = move / move.abs().sum(dim=1, keepdim=True).clamp(min=1)
    return project(state.u - per_sample(state.size) * move.view_as(x), x, threat)


def _look_sparse(state: _State, x: Tensor, threat: Threat) -> _State:
    """Set how many values steps move by how many the best point has moved.

    Where that number falls, steps start again at eps, from the best point; else they get smaller.
    """
    moved = (state.best != x).flatten(1).sum(dim=1).to(state.size)
    fewer = moved < 0.95 * state.moved
    size = torch.where(fewer, threat.eps, (state.size / SPARSER).clamp(min=threat.eps / SLOWEST))
    return replace(
        state, u=torch.where(per_sample(fewer), state.best, state.u),
        gradient=torch.where(per_sample(fewer), state.best_gradient, state.gradient),
        size=size, share=moved / x[0].numel() / SPARSER, moved=moved,
    )  # fmt: skip
