"""NES: steps along a gradient that is estimated from pairs of opposite Gaussian probes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bench.errors import ConfigError
from bench.losses import LOSSES
from bench.norms import project, steepest
from bench.oracle import Oracle
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

REL_STEP: dict[str, float] = {"linf": 0.25, "l2": 0.5}  # 2/255 of 8/255, and 64/255 of 127/255
PAIRS: dict[str, int] = {"linf": 20, "l2": 4}
VALUES = 2**22  # pixel values among the probes of one call, so that a large q does not need a large memory


@attacks("nes")
@dataclass(frozen=True, kw_only=True)
class NES:
    """Natural evolution strategies (Ilyas et al., ICML 2018), untargeted, in linf and l2.

    Each step costs ``2 q + 1`` queries: q pairs of probes and the new iterate. Probes are queries like all others, so
    one that is misclassified ends the search. At the end of the budget q shrinks; queries too few for another pair go
    to further steps along the last estimate.

    Probes are projected into ball and box, and each difference of losses is laid along the difference of the projected
    probes (which is 2 eta n_j where nothing was projected). Opposite probes are shortened alike on average, so the
    estimate keeps the signs of the gradient.

    Args:
        eta: l2 length of a probe, about: noise is divided by sqrt(d). 0.1 is usual for ImageNet; a service that rounds
            to 8 bit hides probes much shorter than sqrt(d) / 255.
        q: pairs in a step; 20 (linf) or 4 (l2) by default, 50 for ImageNet.
        rel_step: length of a step as a fraction of eps; 0.25 (linf) or 0.5 (l2) by default.
        loss: what is minimised, ``margin`` or ``ce`` (the log-likelihood).

    Source: arXiv:1804.08598, algorithm 1 and its projected sign steps; eta, q and steps as in the public code of
    SignHunter, which compares with it.
    """

    eta: float = 0.01
    q: int | None = None
    rel_step: float | None = None
    loss: Literal["margin", "ce"] = "margin"

    access: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Ilyas et al., 2018, arXiv:1804.08598"

    def __post_init__(self) -> None:
        check(self.eta, self.q, self.rel_step, self.loss, fewest=1)

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's last iterate."""
        q = PAIRS[threat.norm] if self.q is None else self.q
        length = threat.eps * (REL_STEP[threat.norm] if self.rel_step is None else self.rel_step)

        u, rows = x.clone(), torch.arange(len(x), device=x.device)
        labels, clean, now, gradient, streams = y, x, x, torch.zeros_like(x), rng
        left, step = oracle.query_budget, 0
        while left > 0:
            active = oracle.active()
            if len(active) == 0:
                break
            if active is not rows:  # gather anew only when somebody has dropped out
                u[rows] = now
                stay = torch.searchsorted(rows, active)
                labels, clean, now, gradient = (part[stay] for part in (labels, clean, now, gradient))
                rows, streams = active, rng[active]
            pairs = min(q, (left - 1) // 2)
            if pairs > 0:
                gradient = self._estimate(oracle, rows, now, clean, labels, threat, streams.fork(step), pairs)
            now = project(now - length * steepest(gradient, threat.norm), clean, threat)
            oracle.scores(now, rows)
            left, step = left - 2 * pairs - 1, step + 1
        u[rows] = now
        return u

    def _estimate(
        self, oracle: Oracle, rows: Tensor, u: Tensor, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng, pairs: int
    ) -> Tensor:
        """``pairs`` times the gradient (n, C, H, W) of the loss at ``u``, about."""
        gradient = torch.zeros_like(u)
        for noise in directions(rng, u, pairs, 2):                                # (n, k, C, H, W)
            probes = torch.stack((u[:, None] + self.eta * noise, u[:, None] - self.eta * noise), dim=2)
            probes = inside(probes.flatten(1, 2), x, threat)                      # (n, 2 k, C, H, W)
            values = losses(oracle.scores(probes, rows), y, self.loss).unflatten(1, (-1, 2))
            rise = finite(values[..., 0] - values[..., 1]) / (2 * self.eta)       # (n, k)
            apart = (probes[:, ::2] - probes[:, 1::2]) / (2 * self.eta)
            gradient += torch.einsum("nk,nkchw->nchw", rise.to(u), apart)
        return gradient


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
    if loss not in LOSSES:
        raise ConfigError(f"loss is {loss!r}; use one of {', '.join(LOSSES)}")


def directions(rng: SampleRng, u: Tensor, count: int, probes_each: int) -> Iterator[Tensor]:
    """``count`` Gaussian directions of about unit l2 norm for each of ``u`` (n, C, H, W), as many at a time as fit.

    Yields (n, k, C, H, W); how many come at a time depends on the memory, what they are does not.
    """
    samples, size = torch.arange(len(u), device=u.device), u[0].numel()
    at_once = max(1, VALUES // (u.numel() * probes_each))
    for numbers in torch.arange(count, device=u.device).split(at_once):
        streams = rng[samples.repeat_interleave(len(numbers))].fork(numbers.repeat(len(u)))
        yield streams.normal(*u.shape[1:]).to(u).unflatten(0, (len(u), -1)) / size**0.5


def inside(probes: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """``probes`` (n, k, C, H, W) projected into the ball around ``x`` (n, C, H, W) and the box."""
    centres = x[:, None].expand_as(probes).flatten(0, 1)
    return project(probes.flatten(0, 1), centres, threat).view_as(probes)


def losses(logits: Tensor, y: Tensor, loss: str) -> Tensor:
    """The ``loss`` (n, k) of ``logits`` (n, k, K)."""
    n, k, _ = logits.shape
    return LOSSES[loss](logits.flatten(0, 1), y.repeat_interleave(k)).view(n, k)


def finite(values: Tensor) -> Tensor:
    """``values``, with 0 where a query got no answer or no finite one."""
    return torch.where(values.isfinite(), values, 0)
