"""FAB: the nearest misclassified point, by projection onto boundaries that are taken for planes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.apgd_t import rivals
from attacks.hyperplane import to_hyperplane
from bench.errors import ConfigError
from bench.norms import DUAL, TINY, lp_norm, per_sample, project
from bench.oracle import Oracle, Rules
from bench.ranges import Count, Positive, Share
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

NEAR = 1e-8  # below which a distance counts as this much


@attacks("fab")
@dataclass(frozen=True, kw_only=True)
class FAB:
    """Fast adaptive boundary attack (Croce and Hein, ICML 2020), a minimum-norm attack that no scale misleads.

    In each step the differences between the logits of the class and of all others are taken for linear, the nearest
    boundary is chosen, and the point and the clean image are both projected onto it inside the box; what lies between
    the two projections is the next point, and from a misclassified one the search goes a step back to the image. Costs
    ``restarts * steps`` times 2 forward passes and ``K - 1`` backward passes for K classes, which makes it dear where
    there are many: then use ``fab-t``.

    Queries go anywhere in the box, and only a misclassified one inside the ball is a success, at which a sample stops.
    ``eps`` serves for random starts alone; with ``eps = 0`` the whole run goes into ``best_distance``.

    Args:
        alpha_max: how much at most is taken of the projection of the clean image.
        eta: by how much a step overshoots the boundary.
        beta: the share of the distance that is kept where the search goes back from a misclassified point.

    Source: arXiv:1907.02044, algorithm 1.
    """

    steps: Count = 100
    restarts: Count = 1
    alpha_max: Share = 0.1
    eta: Positive = 1.05
    beta: Share = 0.9

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l1", "l2", "linf"})
    rules: ClassVar[Rules] = Rules(minimal=True)
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Croce and Hein, 2020, arXiv:1907.02044"

    def __post_init__(self) -> None:
        if self.eta < 1:
            raise ConfigError(f"eta is {self.eta:g}; a step that is to cross the boundary overshoots it, by 1 or more")

    @property
    def most_queries(self) -> int:
        """Forward passes that a sample costs which never falls."""
        return 2 * self.restarts * self.steps

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns the nearest misclassified point found, moved into the ball."""
        search = _Search(self, oracle, x, y, threat)
        for restart in range(self.restarts):
            search.run(restart, rng.fork(restart), None)
        return project(search.best, x, threat)


@attacks("fab-t")
@dataclass(frozen=True, kw_only=True)
class TargetedFAB(FAB):
    """FAB towards the ``targets`` likeliest wrong classes in turn: one backward pass in each step, whatever K.

    Costs one forward pass for the ranks of the classes, and ``restarts * targets * steps`` times 2 forward passes and
    one backward pass. A sample falls as soon as it is misclassified inside the ball, whatever the class.

    Source: arXiv:1907.02044, and arXiv:2003.01690, section 5, for the targets.
    """

    targets: Count = 9

    @property
    def most_queries(self) -> int:
        """Forward passes that a sample costs which never falls."""
        return 1 + self.targets * super().most_queries

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns the nearest misclassified point found, moved into the ball."""
        search = _Search(self, oracle, x, y, threat)
        for number, target in enumerate(rivals(oracle, x, y, self.targets)):
            for restart in range(self.restarts):
                search.run(restart, rng.fork(number).fork(restart), target)
        return project(search.best, x, threat)


class _Search:
    """Runs of FAB one after the other, on the samples that still stand."""

    def __init__(self, attack: FAB, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat) -> None:
        self.attack, self.oracle, self.x, self.y, self.threat = attack, oracle, x, y, threat
        self.best = x.clone()                                                                  # (B, C, H, W)
        self.distance = torch.full(x.shape[:1], torch.inf, dtype=x.dtype, device=x.device)   # (B,) of ``best``

    def run(self, restart: int, rng: SampleRng, target: Tensor | None) -> None:
        """From the clean images, or near them in later restarts, towards ``target`` (B,) or the nearest class."""
        u = self.x.clone() if restart == 0 else self._start(rng)
        for _ in range(self.attack.steps):
            rows = self.oracle.active()
            if len(rows) == 0:
                return
            x, y, now = self.x[rows], self.y[rows], u[rows]
            lead, normal = self._boundary(now, rows, None if target is None else target[rows])
            now = self._between(now, x, lead, normal)
            logits = self.oracle.scores(now, rows)
            wrong = logits.isfinite().all(dim=1) & (logits.argmax(dim=1) != y)
            distance = lp_norm(now - x, self.threat.norm)
            nearer = wrong & (distance < self.distance[rows])
            self.best[rows] = torch.where(per_sample(nearer), now, self.best[rows])
            self.distance[rows] = torch.where(nearer, distance, self.distance[rows])
            u[rows] = torch.where(per_sample(wrong), x + self.attack.beta * (now - x), now)

    def _start(self, rng: SampleRng) -> Tensor:
        """Points half as far as the nearest one known, or as eps."""
        shape, norm = self.x.shape[1:], self.threat.norm
        noise = (rng.uniform(*shape) * 2 - 1 if norm == "linf" else rng.normal(*shape)).to(self.x)
        reach = self.distance.clamp(max=self.threat.eps) / 2 / (lp_norm(noise, norm) + TINY)
        return (self.x + per_sample(reach) * noise).clamp(0, 1)

    def _boundary(self, u: Tensor, rows: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """By how much (n,) a class leads the true one at ``u``, and the gradient of that (n, C, H, W).

        Of all classes it is the one whose boundary is nearest, as far as gradients tell.
        """
        y = self.y[rows]
        if target is not None:
            logits, gradient = self.oracle.gradients(u, lambda z, y: _lead(z, y, target), rows)
            return _lead(logits, y, target).nan_to_num(), gradient
        logits, gradients = self.oracle.gradients(u, _leads, rows)                   # (n, K - 1, C, H, W)
        leads = _leads(logits, y).nan_to_num()
        slope = torch.linalg.vector_norm(gradients.flatten(2), DUAL[self.threat.norm], dim=2)
        nearest = (leads.abs() / (slope + TINY)).argmin(dim=1)
        at = torch.arange(len(y), device=y.device)
        return leads[at, nearest], gradients[at, nearest]

    def _between(self, u: Tensor, x: Tensor, lead: Tensor, normal: Tensor) -> Tensor:
        """The next points (n, C, H, W), between the projections of ``u`` and ``x`` onto their boundaries."""
        flat, attack, norm = normal.flatten(1), self.attack, self.threat.norm
        from_x = lead + (flat * (x - u).flatten(1)).sum(dim=1)
        points, offsets = torch.cat((u, x)).flatten(1), torch.cat((lead, from_x))
        moves = to_hyperplane(points, flat.repeat(2, 1), offsets, norm).view(2, *u.shape)
        here, there = (lp_norm(move, norm).clamp(min=NEAR) for move in moves)
        alpha = per_sample((here / (here + there)).clamp(max=attack.alpha_max))
        return ((1 - alpha) * (u + attack.eta * moves[0]) + alpha * (x + attack.eta * moves[1])).clamp(0, 1)


def _lead(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """By how much (n,) the class ``target`` (n,) leads the true one; negative for who is right."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def _leads(logits: Tensor, y: Tensor) -> Tensor:
    """By how much (n, K - 1) each other class leads the true one."""
    others = torch.arange(logits.shape[1] - 1, device=y.device)
    others = others + (others >= y[:, None]).long()
    return logits.gather(1, others) - logits.gather(1, y[:, None])
