"""HopSkipJump: steps along the normal of the boundary, which is estimated from the labels of random probes."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attacks.minimum_norm import Search, pick, run
from bench.errors import ConfigError
from bench.norms import TINY, lp_norm, per_sample, steepest
from bench.oracle import Oracle, Rules
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

START, BLEND, BISECT, PROBE, STEP = range(5)  # phases of a sample, in their order; STEP leads back to BISECT
BLEND_WIDTH = 1e-3   # at which the first bisection ends, 10 queries
NARROWEST = 2**-40   # no bisection is longer than 40 queries
FIRST_PROBE = 0.1    # l2 length of a probe in the first round
STEP_TRIES = 30


@attacks("hop-skip-jump")
@dataclass(frozen=True, kw_only=True)
class HopSkipJump:
    """HopSkipJump (Chen, Jordan and Wainwright, S&P 2020), untargeted, in linf and l2.

    Starts from the first misclassified image of uniform noise, blended with the clean one by bisection. A round then
    bisects back to the boundary, estimates its normal there from int(100 sqrt(t)) probes in round t, and tries a step
    of dist / sqrt(t) along it, halved until the label is wrong. On CIFAR-10 10,000 queries hold some 27 rounds.

    Each sample asks one query at a time and goes through the rounds at its own pace. Noise is drawn and rounds are made
    until the budget ends, where the authors' code gives up after 10,000 draws and stops after 40 rounds. After 30
    halvings in vain a sample bisects from where it stood, where that code goes on without end. A point on the boundary
    is always one that was queried and misclassified.

    Probes are ``gamma / d`` of the distance long after the first round (d = C H W), 1e-4 in l2 on CIFAR-10. A service
    that rounds to 8 bit hides them: all probes get the same label, and the step goes along their mean.

    Args:
        gamma: probe length and the width at which a bisection ends, relative to the published ones: a share of
            ``gamma / d^1.5`` (l2) or ``gamma / d^2`` (linf) of the distance.
        init_evals: probes in the first round; those of round t are sqrt(t) times as many.
        max_evals: most probes in a round.

    Source: arXiv:1904.02144, algorithms 1 and 2; constants as in the authors' code.

    Raises:
        ConfigError: parameters with which no bisection ends or nothing is estimated.
    """

    gamma: float = 1.0
    init_evals: int = 100
    max_evals: int = 10_000

    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    rules: ClassVar[Rules] = Rules(minimal=True)
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Chen et al., 2020, arXiv:1904.02144"

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf:
            raise ConfigError(f"gamma is {self.gamma:g}; it scales probes and bisections, above 0")
        if not 1 <= self.init_evals <= self.max_evals:
            raise ConfigError(
                f"init_evals={self.init_evals}, max_evals={self.max_evals}; take at least one probe, "
                f"and no more at first than at most"
            )

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's last boundary point, moved into the ball."""
        return run(_Rounds(self, threat.norm, x, y, rng), oracle, threat)


class _Rounds(Search):
    """The rounds of each sample. Interval ends are shares of a distance, in float64 so that no halving is lost."""

    def __init__(self, attack: HopSkipJump, norm: Norm, x: Tensor, y: Tensor, rng: SampleRng) -> None:
        super().__init__(x, y, rng)
        size = x.shape[1:].numel()
        theta = attack.gamma / size ** (1.5 if norm == "l2" else 2)
        self.attack, self.norm, self.probe = attack, norm, attack.gamma / size
        self.width = min(max(theta, NARROWEST), 0.5)
        self.phase, self.count, self.plus = (torch.zeros_like(y) for _ in range(3))  # count: queries in this phase
        self.round = torch.ones_like(y)
        self.low = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        self.high = torch.ones_like(self.low)
        self.end, self.dist = x, torch.zeros_like(lp_norm(x, norm))        # where a bisection began, and how far off
        self.total, self.signed = torch.zeros_like(x), torch.zeros_like(x)  # sums over the probes of a round

    def query(self, number: int) -> Tensor:
        noise, middle = self.noise(number), (self.low + self.high) / 2
        blend = torch.lerp(self.x, self.end, per_sample(middle.to(self.x)))
        if self.norm == "linf":
            probe = noise * 2 - 1
            reach = per_sample((middle * self.dist).to(self.x))
            nearer = torch.minimum(torch.maximum(self.end, self.x - reach), self.x + reach)
        else:
            probe = self.rng.fork("probe").fork(number).normal(*self.x.shape[1:]).to(self.x)
            nearer = blend
        probe = self.u + per_sample(self._probe_length()) * steepest(probe, "l2")
        step = self.u + per_sample(self._step_length()) * self._normal()
        return pick(self.phase, (noise, blend, nearer, probe.clamp(0, 1), step.clamp(0, 1)))

    def learn(self, query: Tensor, wrong: Tensor) -> None:
        probing, middle = self.phase == PROBE, (self.low + self.high) / 2
        offset = torch.where(per_sample(probing), (query - self.u) / per_sample(self._probe_length()), 0)
        self.total, self.plus = self.total + offset, self.plus + (probing & wrong)
        self.signed = self.signed + torch.where(per_sample(wrong), offset, -offset)
        self.u = torch.where(per_sample(wrong & ~probing), query, self.u)
        self.low, self.high = torch.where(wrong, self.low, middle), torch.where(wrong, middle, self.high)
        self.count = self.count + 1

        span, estimated, stepped = self.high - self.low, self.count >= self._evals(), wrong | (self.count >= STEP_TRIES)
        self._advance(pick(self.phase, (wrong, span <= BLEND_WIDTH, span <= self.width, estimated, stepped)))

    def _advance(self, over: Tensor) -> None:
        """The next phase for the samples whose phase is ``over`` (n,)."""
        after = torch.where(self.phase == STEP, BISECT, self.phase + 1)
        self.round = self.round + (over & (self.phase == STEP))
        self.phase = torch.where(over, after, self.phase)
        self.count = torch.where(over, 0, self.count)
        self.end = torch.where(per_sample(over), self.u, self.end)
        self.low, self.high = torch.where(over, 0, self.low), torch.where(over, 1, self.high)
        begins = over & (after == BISECT)  # the distance before a bisection decides the length of the probes after it
        self.dist = torch.where(begins, lp_norm(self.u - self.x, self.norm), self.dist)
        self.total, self.signed = (torch.where(per_sample(begins), 0, sums) for sums in (self.total, self.signed))
        self.plus = torch.where(begins, 0, self.plus)

    def _evals(self) -> Tensor:
        """Probes (n,) in the round."""
        evals = (self.attack.init_evals * self.round.double().sqrt()).long()
        return evals.clamp(max=self.attack.max_evals)

    def _probe_length(self) -> Tensor:
        return torch.where(self.round == 1, FIRST_PROBE, self.probe * self.dist).clamp(min=TINY)

    def _step_length(self) -> Tensor:
        """Length (n,) of the step to try, in the norm of the threat."""
        tried = 0.5 ** self.count.to(self.x.dtype)
        return lp_norm(self.u - self.x, self.norm) * tried / self.round.to(self.x.dtype).sqrt()

    def _normal(self) -> Tensor:
        """The direction (n, C, H, W) in which more probes were misclassified; the mean label is taken as baseline."""
        evals = self._evals()
        mixed = (self.plus > 0) & (self.plus < evals)
        baseline = torch.where(mixed, (2 * self.plus - evals).to(self.x) / evals, 0)
        return steepest(self.signed - per_sample(baseline) * self.total, self.norm)
