"""Square from within a crowd, against defenses whose answers depend on the query batch: the attacker fills it."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attacks.square import Square, lower
from bench.errors import ConfigError
from bench.losses import margin
from bench.norms import project
from bench.oracle import Oracle, Rules
from bench.ranges import Few
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat


@attacks("crowd-square")
@dataclass(frozen=True, kw_only=True)
class CrowdSquare:
    """Square that asks about each candidate together with near-duplicates of it, in a batch of their own.

    A defense that compares the rows of a batch finds nothing to compare, and no other sample has a say, save through
    what a stateful defense remembers. All ``copies`` are paid, so a budget of Q allows Q / copies candidates, rounded
    down, on Square's usual schedule. Since they are paid, all answers are used: Square decides by their mean logits.
    ``copies=1`` is Square with batches of one. Each sample is forwarded by itself, so it is slow.

    In a crowd some defenses err by themselves, on clean images, too: such a hit says that the batch decides, and not
    that the image is adversarial. Compare with a radius of 0, and with the final examples, which are judged in a batch
    of all samples.

    Args:
        copies: images in a batch, the candidate among them; the model's own batch size, if smaller, splits it.
        jitter: how far a near-duplicate is from its candidate, in linf; far below a grey level (1/255), so that a
            service with 8-bit input sees duplicates.
        p_init: as for :class:`Square`.

    Source: our own, for UniG as released and for DENT online.
    """

    copies: Few = 8
    jitter: float = 1e-4
    p_init: float | None = None

    access: ClassVar[Access] = "scores"
    top_scores: ClassVar[bool] = True
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    rules: ClassVar[Rules] = Rules(alone=True)
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "ours"

    def __post_init__(self) -> None:
        Square(p_init=self.p_init)  # complains about an impossible one
        if self.copies < 1:
            raise ConfigError(f"copies is {self.copies}; a batch holds the candidate at least")
        if not 0 <= self.jitter < 1 / 255:
            raise ConfigError(f"jitter is {self.jitter:g}; a near-duplicate is less than a grey level away, 0 to 1/255")

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's incumbent."""
        crowd = _Crowd(oracle, x, threat, rng.fork("crowd"), min(self.copies, oracle.query_budget), self.jitter)
        return Square(p_init=self.p_init).search(crowd, x, y, threat, rng, margin, lower)


class _Crowd:
    """An oracle before which an image comes with its near-duplicates; the answer is the mean of theirs."""

    def __init__(
        self, oracle: Oracle, x: Tensor, threat: Threat, rng: SampleRng, copies: int, jitter: float
    ) -> None:
        self.oracle, self.x, self.threat, self.rng, self.copies, self.jitter = oracle, x, threat, rng, copies, jitter
        self.query_budget = oracle.query_budget // copies
        self.asked = 0

    def active(self) -> Tensor:
        return self.oracle.active()

    def scores(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        clean, streams = (self.x, self.rng) if rows is None else (self.x[rows], self.rng[rows])
        noise = streams.fork(self.asked).uniform(self.copies, *x.shape[1:]).to(x) * 2 - 1
        probes = (x[:, None] + self.jitter * noise).flatten(0, 1)                 # (n k, C, H, W)
        probes = project(probes, clean.repeat_interleave(self.copies, dim=0), self.threat).view_as(noise)
        probes[:, 0] = x
        self.asked += 1
        return self.oracle.scores(probes, rows).mean(dim=1)
