"""A model as it is deployed: its output defense around it, its randomness keyed by sample and query."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import RefereeError
from bench.numerics import TORCH
from bench.precision import COARSE
from bench.rng import SampleRng
from bench.service import Desk


def as_module(made: object, maker: str) -> nn.Module:
    """What a defense or a learner of the name ``maker`` has returned.

    Raises:
        RefereeError: it is no module.
    """
    if not isinstance(made, nn.Module):
        raise RefereeError(f"{maker} returned a {type(made).__name__}; return a torch.nn.Module")
    return made


@dataclass(frozen=True)
class ServedModel:
    """Logits (B, K) from images (B, C, H, W) in [0, 1], at most ``batch_size`` images in each forward.

    ``random`` models take a SampleRng beside the images, with one stream for each of them. ``numbers`` says which
    numbers the network computes in, as :attr:`bench.numerics.Converted.facts`. The module gets a copy of the images,
    and its answers are copied, so that neither side can write into what the other holds. One that asks a service does
    so at a ``desk``, where every question counts.
    """

    module: nn.Module
    random: bool = False
    batch_size: int = 256
    numbers: Mapping[str, Any] = field(default_factory=dict)
    desk: Desk | None = None

    @property
    def coarse(self) -> bool:
        """Whether a hit needs another look: its numbers round more than float32 does, or are not torch's own."""
        return str(self.numbers.get("used", "")).startswith(COARSE) or self.by_engine

    @property
    def by_engine(self) -> bool:
        """Whether something else than torch's own forward answers for its network."""
        return not str(self.numbers.get("engine", TORCH)).startswith(TORCH)

    def fresh(self) -> "ServedModel":
        """It as it was deployed, to be asked what leaves no trace in it; itself, if it cannot be copied."""
        try:
            return replace(self, module=copy.deepcopy(self.module))
        except Exception:  # copying runs the module's own code, which may raise anything at all
            return self

    def __call__(self, x: Tensor, rng: SampleRng) -> Tensor:
        """Answer ``x``; ``rng`` (one stream for each image) goes unused where the model is deterministic.

        Raises:
            RefereeError: the module answers with something other than scores (B, K).
        """
        if len(x) <= self.batch_size:
            return self._forward(x, rng)
        parts = torch.arange(len(x), device=x.device).split(self.batch_size)
        streams = [rng[part] if self.random else rng for part in parts]
        return torch.cat([self._forward(*pair) for pair in zip(x.split(self.batch_size), streams, strict=True)])

    def _forward(self, x: Tensor, rng: SampleRng) -> Tensor:
        logits: object = self.module(x.clone(), rng) if self.random else self.module(x.clone())
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            came = f"{tuple(logits.shape)} scores" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise RefereeError(f"{type(self.module).__name__} answers {len(x)} images with {came}; expected (B, K)")
        return logits.clone()


@dataclass(frozen=True)
class Target:
    """What an attack is aimed at, and the undefended network behind it, if there is one: a service has none.

    Each of them in the numbers that attacks search in, and in plain float32, which results are judged in. ``isolated``
    tells whether the defense acts in a process of its own. ``fitted`` is what an attack that is fitted came to.
    """

    searched: ServedModel
    plain: ServedModel
    undefended_searched: ServedModel | None
    undefended: ServedModel | None
    sources: tuple[ServedModel, ...] = ()  # the networks that the attack names to work on, in plain numbers
    isolated: bool = False
    fitted: Mapping[str, Tensor] | None = None

    @property
    def numbers(self) -> Mapping[str, Any]:
        """What a row remembers of the numbers that were searched in."""
        return {**self.searched.numbers, **({"hits": "confirmed in float32"} if self.searched.coarse else {})}
