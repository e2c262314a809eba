"""Boundary attack: a random walk along the boundary, from labels alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.minimum_norm import Search, pick, run
from bench.errors import ConfigError
from bench.norms import TINY, lp_norm, per_sample
from bench.oracle import Oracle, Rules
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

START, BLEND, SPHERE, SOURCE = range(4)  # phases of a sample
LEVELS = 50         # of blended noise
CHECK_EVERY = 10    # steps between two whose successes are counted
SPHERE_COUNTS, SPHERE_RATES = 100, (0.2, 0.5)   # counts that a rate is taken over; rates that shorten, lengthen a step
SOURCE_COUNTS, SOURCE_RATES = 30, (0.1, 0.25)


@attacks("boundary")
@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Boundary attack (Brendel et al., ICLR 2018), untargeted, in l2.

    Starts from the first misclassified image of uniform noise, blended with the clean one at the lowest misclassified
    of 50 levels. A step goes sideways on the sphere around the clean image and then towards it, and is taken where the
    label is wrong and the distance has shrunk. Each 10th step also asks about the sideways point, and both successes of
    that step go into running rates: over the last 100 sideways, the last 30 together. A rate that leaves its range
    changes step sizes, and is counted anew.

    Costs 1.1 queries a step, and many thousands where HopSkipJump takes hundreds: an independent check of it. Noise is
    drawn and steps are made until the budget ends; the public code gives up after 1,000 draws, and stops once
    ``source_step`` falls below 1e-7.

    Args:
        sphere_step: length of a first step sideways, as a share of the distance.
        source_step: length of a first step towards the clean image, as a share of the distance.
        step_adaptation: factor by which both adapt, above 1.

    Source: arXiv:1712.04248; adaptation as in Foolbox 3, which counts each 10th step, be the sideways point
    misclassified or not.

    Raises:
        ConfigError: steps that lead nowhere or beyond the image, or sizes that would not adapt.
    """

    sphere_step: float = 0.01
    source_step: float = 0.01
    step_adaptation: float = 1.5

    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2"})
    rules: ClassVar[Rules] = Rules(minimal=True)
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Brendel et al., 2018, arXiv:1712.04248"

    def __post_init__(self) -> None:
        if not (0 < self.sphere_step < 1 and 0 < self.source_step < 1):
            raise ConfigError(
                f"sphere_step={self.sphere_step:g}, source_step={self.source_step:g}; "
                f"both are shares of the distance, between 0 and 1"
            )
        if not 1 < self.step_adaptation < 10:
            raise ConfigError(f"step_adaptation is {self.step_adaptation:g}; it is a factor above 1 and below 10")

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns the nearest point of each walk, moved into the ball."""
        return run(_Walk(self, x, y, rng), oracle, threat)


class _Walk(Search):
    """The walk of each sample."""

    def __init__(self, attack: Boundary, x: Tensor, y: Tensor, rng: SampleRng) -> None:
        super().__init__(x, y, rng)
        self.factor = attack.step_adaptation
        self.phase, self.sphere_count, self.source_count = (torch.zeros_like(y) for _ in range(3))
        self.level, self.step = torch.ones_like(y), torch.ones_like(y)
        self.sphere = torch.full((len(x),), attack.sphere_step, dtype=x.dtype, device=x.device)
        self.source = torch.full_like(self.sphere, attack.source_step)
        self.sphere_hits = torch.zeros(len(x), SPHERE_COUNTS, dtype=torch.bool, device=x.device)
        self.source_hits = torch.zeros(len(x), SOURCE_COUNTS, dtype=torch.bool, device=x.device)

    def query(self, number: int) -> Tensor:
        blend = torch.lerp(self.x, self.u, per_sample((self.level / LEVELS).to(self.x)))
        sideways = self._sideways()
        towards = (sideways + per_sample(self.source) * (self.x - sideways)).clamp(0, 1)
        return pick(self.phase, (self.noise(number), blend, sideways, towards))

    def learn(self, query: Tensor, wrong: Tensor) -> None:
        start, blend, sphere, source = (self.phase == phase for phase in range(4))
        checks = self.step % CHECK_EVERY == 0
        closer = lp_norm(query - self.x, "l2") < lp_norm(self.u - self.x, "l2")
        taken = wrong & (start | blend | (source & closer))
        self.u = torch.where(per_sample(taken), query, self.u)
        self.sphere_hits, self.sphere_count = _entered(self.sphere_hits, self.sphere_count, wrong, sphere)
        self.source_hits, self.source_count = _entered(self.source_hits, self.source_count, wrong, source & checks)
        self._adapt(source & checks)

        self.level = self.level + blend
        self.step = self.step + source
        blended = blend & (wrong | (self.level == LEVELS))  # the last level is the noise itself
        following = torch.where(self.step % CHECK_EVERY == 0, SPHERE, SOURCE)
        self.phase = pick(self.phase, (
            wrong.long(),                            # START until an image is misclassified, then BLEND
            torch.where(blended, following, BLEND),
            torch.full_like(self.phase, SOURCE),
            following,
        ))  # fmt: skip

    def _sideways(self) -> Tensor:
        """A point (n, C, H, W) beside ``u`` on the sphere around ``x``, moved into the box."""
        away = self.u - self.x
        distance = lp_norm(away, "l2")
        noise = self.rng.fork("step").fork(self.step).normal(*self.x.shape[1:]).to(self.x)
        along = (noise * away).flatten(1).sum(dim=1) / (distance.square() + TINY)
        noise = noise - per_sample(along) * away
        moved = away + per_sample(self.sphere * distance / (lp_norm(noise, "l2") + TINY)) * noise
        return (self.x + per_sample(distance / (lp_norm(moved, "l2") + TINY)) * moved).clamp(0, 1)

    def _adapt(self, due: Tensor) -> None:
        """Change the step sizes of the samples that are ``due`` (n,), by their rates of success."""
        sideways = torch.where(due, _trend(self.sphere_hits, self.sphere_count, SPHERE_RATES), 0)
        both = torch.where(due, _trend(self.source_hits, self.source_count, SOURCE_RATES), 0)
        self.sphere = self.sphere * self.factor**sideways
        self.source = self.source * self.factor ** (sideways + both)
        self.sphere_count = torch.where(sideways == 0, self.sphere_count, 0)
        self.source_count = torch.where(both == 0, self.source_count, 0)


def _entered(hits: Tensor, count: Tensor, hit: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The last answers (n, size) and their number (n,), with ``hit`` (n,) entered where ``rows`` (n,) says."""
    slot = torch.arange(hits.shape[1], device=hits.device) == (count % hits.shape[1])[:, None]
    return torch.where(slot & rows[:, None], hit[:, None], hits), count + rows


def _trend(hits: Tensor, count: Tensor, rates: tuple[float, float]) -> Tensor:
    """1 where the rate (n,) of the last answers is above ``rates``, -1 where below, 0 between or with too few."""
    low, high = (rate * hits.shape[1] for rate in rates)
    successes = hits.sum(dim=1)
    return torch.where(count >= hits.shape[1], (successes > high).long() - (successes < low).long(), 0)
