"""Bandits: steps along a coarse guess of the gradient that each step improves with two opposite probes."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.estimation import Walk, check, descend, finite
from attacks.scored import Scored
from bench.errors import ConfigError
from bench.norms import box, per_sample, steepest
from bench.oracle import Oracle
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

# Arguments are on the scale of the authors' code. Two codes with settings for CIFAR-10 use others: pixels of 0 to 255,
# so that 1/255 of their prior rate is meant, and in place of noise of length e ...
SIDE = 20
ROOT = (3 * SIDE**2) ** 0.5
# ... noise of e in each value, which enters the estimate divided by e (BlackboxBench, e = 0.1, rate 0.1),
BLACKBOX_BENCH = {"exploration": 0.1 * ROOT, "prior_rate": 0.1 / 255 * ROOT / 0.1}
# ... or of length e, divided by e, too (SignHunter, e = 0.1, rate 1e-5).
SIGN_HUNTER = {"exploration": 0.1, "prior_rate": 1e-5 / 255 / 0.1}

# What each source sets, by norm.
PRESETS: dict[str | None, dict[Norm, dict[str, Any]]] = {
    None: {
        "linf": {"eta": 0.01, "rel_step": 0.25, "side": SIDE, "loss": "margin", **BLACKBOX_BENCH},
        "l2": {"eta": 0.01, "rel_step": 12 / 127, "side": SIDE, "loss": "margin", **SIGN_HUNTER},
    },
    "iclr2019": {
        "linf": {"eta": 0.1, "rel_step": 0.2, "prior_rate": 100.0, "exploration": 1.0, "side": 50, "loss": "ce"},
        "l2": {"eta": 0.01, "rel_step": 0.1, "prior_rate": 0.1, "exploration": 0.01, "side": 50, "loss": "ce"},
    },
    "unig": {
        "linf": {"eta": 0.1, "rel_step": 2.55 / 8, "prior_rate": 100.0, "exploration": 1.0, "side": 50, "loss": "ce"},
    },
}


@attacks("bandits")
@dataclass(frozen=True, kw_only=True)
class Bandits(Scored):
    """Bandits with time and data priors (Ilyas et al., ICLR 2019), untargeted, in linf and l2.

    Keeps a prior, a coarse image that says in which direction the loss falls, from step to step. Each step costs three
    queries: two probes, along the prior plus and minus one noise, which move the prior towards the better of them, and
    the new iterate, one step along the prior. The prior moves straight on in l2 and stays inside (-1, 1) in linf.
    Queries too few for probes, at the end of the budget, go to further steps.

    At the surface of the linf ball both probes would leave it on the side that the prior points to, and projecting them
    would leave no difference to see. There they start from the iterate moved in by their own length. In l2 projecting
    keeps the difference, all but what points outwards.

    Args:
        preset: ``iclr2019``, the authors' settings for ImageNet, or ``unig``, those with which UniG was attacked on
            CIFAR-10 in linf; arguments that are given win over the preset. The default is for CIFAR-10.
        eta: l2 length of a probe. A service that rounds to 8 bit hides probes much shorter than sqrt(d) / 255.
        rel_step: length of a step as a fraction of eps.
        prior_rate: how far the prior moves for each unit of the estimated slope.
        exploration: l2 length of the noise in the prior, about: noise is divided by the root of the prior's size.
        side: rows and columns of the prior, spread over the image by nearest-neighbour upsampling; the image's own
            where that has less.
        loss: what is minimised, ``margin``, ``ce`` (the log-likelihood, as in the paper; in float32 it is the same for
            all probes where a network is confident) or ``dlr``, which no scale of scores moves.

    Source: arXiv:1807.07978, algorithms 2 and 3 and appendix; settings as in the authors' code, in UniG's, and by
    default in BlackboxBench's (linf) and SignHunter's (l2).
    """

    preset: Literal["iclr2019", "unig"] | None = None
    eta: float | None = None
    rel_step: float | None = None
    prior_rate: float | None = None
    exploration: float | None = None
    side: int | None = None
    loss: Literal["margin", "ce", "dlr"] | None = None

    access: ClassVar[Access] = "scores"
    fine_scores: ClassVar[bool] = True
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Ilyas et al., 2019, arXiv:1807.07978"

    @property
    def norms(self) -> frozenset[Norm]:
        return frozenset(PRESETS[self.preset])

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            names = ", ".join(name for name in PRESETS if name)
            raise ConfigError(f"preset is {self.preset!r}; use one of {names}, or none")
        for norm in self.norms:
            settings = self._settings(norm)
            check(settings["eta"], None, settings["rel_step"], settings["loss"], fewest=1)
        if self.prior_rate is not None and not self.prior_rate >= 0:
            raise ConfigError(f"prior_rate is {self.prior_rate:g}; it is zero or more")
        if self.exploration is not None and not self.exploration > 0:
            raise ConfigError(f"exploration is {self.exploration:g}; it is the length of the noise, above 0")
        if self.side is not None and self.side < 1:
            raise ConfigError(f"side is {self.side}; a prior has at least one row")

    def _settings(self, norm: Norm) -> dict[str, Any]:
        """All parameters for ``norm``: what was given, and the preset for the rest."""
        preset = PRESETS[self.preset][norm]
        return {name: preset[name] if getattr(self, name) is None else getattr(self, name) for name in preset}

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's last iterate."""
        settings = self._settings(threat.norm)
        eta, rate, exploration = settings["eta"], settings["prior_rate"], settings["exploration"]
        shape = (x.shape[1], *(min(length, settings["side"]) for length in x.shape[2:]))

        def prior(memory: Tensor) -> Tensor:
            # The multiplicative update of the paper's linf prior v is v = tanh(m), m += k g, without its overflows.
            return memory.tanh() if threat.norm == "linf" else memory

        def spread(prior: Tensor) -> Tensor:
            return F.interpolate(prior, x.shape[2:], mode="nearest")

        def estimate(walk: Walk, rng: SampleRng, spare: int) -> tuple[Tensor, int]:
            """The prior moved along the slope between two probes."""
            if spare < 2:
                return walk.memory, 0
            now = prior(walk.memory)
            noise = exploration * rng.normal(*shape).to(now) / now[0].numel() ** 0.5
            ways = torch.stack([eta * steepest(spread(now + side), "l2") for side in (noise, -noise)], dim=1)
            values, _ = walk.ask(_room(walk, ways)[:, None] + ways)                      # (n, 2)
            fall = finite(values[:, 1] - values[:, 0]).to(now)
            return walk.memory + rate * per_sample(fall) / (eta * exploration) * noise, 2

        memory = torch.zeros(len(x), *shape, dtype=x.dtype, device=x.device)
        length = threat.eps * settings["rel_step"]
        return descend(
            oracle, x, y, threat, rng, estimate, loss=settings["loss"], length=length, memory=memory,
            gradient=lambda memory: -spread(prior(memory)),
        )  # fmt: skip


def _room(walk: Walk, ways: Tensor) -> Tensor:
    """The iterates (n, C, H, W), in linf moved in as far as ``ways`` (n, k, C, H, W) need to stay inside."""
    if walk.threat.norm == "l2":
        return walk.u
    low, high = box(walk.x, walk.threat)
    middle, half = (low + high) / 2, (high - low) / 2
    free = (half - ways.abs().amax(dim=1)).clamp(min=0)
    return middle + torch.maximum(torch.minimum(walk.u - middle, free), -free)
