"""Attacks of the torchattacks library, by the name of their class: ``torchattacks:PGD(steps=10)``.

The library is imported when one of them is named, not before. Its attacks see the oracle dressed as a network, so they
are counted, checked and stopped like ours.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.errors import ConfigError
from bench.extras import library
from bench.oracle import Oracle
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

SCORE_BASED = frozenset({"Square", "SPSA"})  # the others differentiate
SET_BY_THE_THREAT = frozenset({"self", "model", "eps", "norm"})


@dataclass(frozen=True)
class TorchAttack:
    """One attack of torchattacks; ``params`` are its own arguments, the radius and the norm come from the threat.

    Its samples share random numbers with their batch, hence ``batch_dependent``. Its last iterate, which it never asks
    about, costs one query more.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Kim, 2020, arXiv:2010.01950"
    batch_dependent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        known = self._signature
        for key in self.params:
            if key not in known or key in SET_BY_THE_THREAT:
                takes = ", ".join(name for name in known if name not in SET_BY_THE_THREAT)
                raise ConfigError(f"torchattacks' {self.name} has no parameter {key!r}; it takes: {takes or 'nothing'}")
            default = known[key].default
            if isinstance(default, int | float) and not isinstance(self.params[key], int | float):
                raise ConfigError(f"torchattacks' {self.name}: {key} is {self.params[key]!r}; give a number")
        if "eps" not in known:
            raise ConfigError(f"torchattacks' {self.name} has no radius to hold it to; choose one with an eps")

    @property
    def access(self) -> Access:
        """``scores`` or ``gradients``."""
        return "scores" if self.name in SCORE_BASED else "gradients"

    @property
    def norms(self) -> frozenset[Norm]:
        """The norms in which its radius can be meant."""
        if "norm" in self._signature:
            return frozenset({"linf", "l2"})
        return frozenset({"l2"}) if self.name.endswith("L2") else frozenset({"linf"})

    @property
    def rescaled(self) -> bool:
        """Whether its schedule follows the budget, as Square's does by default."""
        return "resc_schedule" in self._signature and bool(self.params.get("resc_schedule", True))

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`."""
        params = {"eps": threat.eps, **self.params}
        if "norm" in self._signature:
            params["norm"] = {"linf": "Linf", "l2": "L2"}[threat.norm]
        if "n_queries" in self._signature:
            params.setdefault("n_queries", oracle.query_budget)
        seed = int(rng.keys.sum()) & 0x7FFFFFFF
        if "seed" in self._signature:
            params.setdefault("seed", seed)
        # The library draws from the global generators, and seeds them.
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            attack = _find(self.name)(oracle.as_module(), **params)
            x_adv: Tensor = attack(x, y).detach()
        if len(rows := oracle.active()):
            oracle.scores(x_adv[rows], rows)
        return x_adv

    @property
    def _signature(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(_find(self.name).__init__).parameters


@attacks("torchattacks:")
def torchattack(name: str, **params: Any) -> TorchAttack:
    """The torchattacks class ``name`` with its own arguments.

    Raises:
        ConfigError: the library cannot be imported, or has no such attack or argument.
    """
    return TorchAttack(name, params)


def _find(name: str) -> Any:
    """The class ``name`` of the library."""
    foreign = library("torchattacks", "foreign")
    names = [key for key, value in vars(foreign).items() if inspect.isclass(value) and not key.endswith("Attack")]
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(names))}"
        raise ConfigError(f"torchattacks has no attack {name!r}; {hint}")
    return getattr(foreign, name)
