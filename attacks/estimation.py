"""Descent along a gradient that is estimated from probes: what NES, ZO-signSGD and Bandits share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.errors import ConfigError
from bench.losses import WITH_DLR
from bench.norms import project, steepest
from bench.oracle import Oracle
from bench.rng import SampleRng
from bench.threat import Threat

REL_STEP: dict[str, float] = {"linf": 0.25, "l2": 0.5}  # 2/255 of 8/255, and 64/255 of 127/255
PROBES: dict[str, int] = {"linf": 20, "l2": 4}          # NES asks pairs
VALUES = 2**22  # pixel values among the probes of one call, so that a large q does not need a large memory


@dataclass(frozen=True, kw_only=True)
class Walk:
    """The samples that are still asked about, and how far they have come."""

    oracle: Oracle
    threat: Threat
    loss: str
    rows: Tensor    # (n,) int64, their positions in the batch
    rng: SampleRng  # their streams
    y: Tensor       # (n,) int64, true classes
    x: Tensor       # (n, C, H, W), clean images
    u: Tensor       # (n, C, H, W), iterates
    value: Tensor   # (n,), loss of the iterates as it was asked; NaN before it was
    memory: Tensor  # (n, ...), what the last estimate left

    def __getitem__(self, kept: Tensor) -> "Walk":
        """The samples at the positions ``kept`` alone."""
        parts = {name: getattr(self, name)[kept] for name in ("rows", "rng", "y", "x", "u", "value", "memory")}
        return replace(self, **parts)

    def ask(self, probes: Tensor) -> tuple[Tensor, Tensor]:
        """The losses (n, k) of ``probes`` (n, k, C, H, W), projected into ball and box, and what was asked."""
        n, k = probes.shape[:2]
        centres = self.x[:, None].expand_as(probes).flatten(0, 1)
        legal = project(probes.flatten(0, 1), centres, self.threat).view_as(probes)
        logits = self.oracle.scores(legal, self.rows).flatten(0, 1)
        return WITH_DLR[self.loss](logits, self.y.repeat_interleave(k)).view(n, k), legal

    def move(self, u: Tensor) -> "Walk":
        """Go to ``u`` (n, C, H, W), inside ball and box, and ask what the loss is there."""
        return replace(self, u=u, value=WITH_DLR[self.loss](self.oracle.scores(u, self.rows), self.y))


# A walk, the streams of this step and the queries that may be spent, to the walk's new memory and the queries spent.
Estimate = Callable[[Walk, SampleRng, int], tuple[Tensor, int]]


def descend(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    rng: SampleRng,
    estimate: Estimate,
    *,
    loss: str,
    length: float,
    memory: Tensor,
    gradient: Callable[[Tensor], Tensor] = lambda memory: memory,
    ask_clean: bool = False,
) -> Tensor:
    """Step by step down the estimated gradient until the budget is spent; returns the last iterates (B, C, H, W).

    A step asks the probes of its estimate, then the new iterate. Queries too few for another estimate go to further
    steps along the last one.

    Args:
        oracle, x, y, threat, rng: as in :class:`bench.protocols.Attack`.
        estimate: asks its probes.
        loss: what is minimised, a name in ``WITH_DLR``.
        length: of a step, on the pixel scale.
        memory: (B, ...), what the first estimate finds.
        gradient: a memory as a gradient (n, C, H, W), whose length does not matter.
        ask_clean: ask for the clean images first.
    """
    rows, unknown = torch.arange(len(x), device=x.device), torch.full_like(x[:, 0, 0, 0], torch.nan)
    walk = Walk(
        oracle=oracle, threat=threat, loss=loss, rows=rows, rng=rng, y=y, x=x, u=x, value=unknown, memory=memory
    )
    final, left, step = x.clone(), oracle.query_budget, 0
    if ask_clean:
        walk, left = walk.move(x), left - 1
    while left > 0:
        active = oracle.active()
        if len(active) == 0:
            break
        if active is not walk.rows:  # gather anew only when somebody has dropped out
            final[walk.rows] = walk.u
            walk = replace(walk[torch.searchsorted(walk.rows, active)], rows=active)
        memory, spent = estimate(walk, walk.rng.fork(step), left - 1)
        u = project(walk.u - length * steepest(gradient(memory), threat.norm), walk.x, threat)
        walk = replace(walk, memory=memory).move(u)
        left, step = left - spent - 1, step + 1
    final[walk.rows] = walk.u
    return final


def check(eta: float, q: int | None, rel_step: float | None, loss: str, *, fewest: int) -> None:
    """Refuse parameters of an estimate from which nothing can be estimated.

    Raises:
        ConfigError: says which.
    """
    if not eta > 0:
        raise ConfigError(f"eta is {eta:g}; it is the l2 length of a probe, above 0")
    if q is not None and q < fewest:
        raise ConfigError(f"q is {q}; an estimate takes at least {fewest}")
    if rel_step is not None and not rel_step > 0:
        raise ConfigError(f"rel_step is {rel_step:g}; it is a fraction of eps, above 0")
    if loss not in WITH_DLR:
        raise ConfigError(f"loss is {loss!r}; use one of {', '.join(WITH_DLR)}")


def directions(rng: SampleRng, u: Tensor, count: int, probes_each: int) -> Iterator[Tensor]:
    """``count`` Gaussian directions of about unit l2 norm for each of ``u`` (n, C, H, W), as many at a time as fit.

    Yields (n, k, C, H, W); how many come at a time depends on the memory, what they are does not.
    """
    samples, size = torch.arange(len(u), device=u.device), u[0].numel()
    at_once = max(1, VALUES // (u.numel() * probes_each))
    for numbers in torch.arange(count, device=u.device).split(at_once):
        streams = rng[samples.repeat_interleave(len(numbers))].fork(numbers.repeat(len(u)))
        yield streams.normal(*u.shape[1:]).to(u).unflatten(0, (len(u), -1)) / size**0.5


def finite(values: Tensor) -> Tensor:
    """``values``, with 0 where a query got no answer or no finite one."""
    return torch.where(values.isfinite(), values, 0)
