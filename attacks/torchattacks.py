"""Attacks of the torchattacks library, by the name of their class: ``torchattacks:PGD(steps=10)``.

The library is imported when one of them is named, not before. Its attacks see the oracle dressed as a network, so they
are counted, checked and stopped like ours. ``bench ls attacks`` lists them.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bench.errors import ConfigError, did_you_mean
from bench.norms import per_sample
from bench.oracle import Oracle, Rules
from bench.oracle.balls import apart, inside
from bench.oracle.foreign import Order, Over
from bench.registry import attacks
from bench.rng import SampleRng
from bench.system.extras import library
from bench.threat import Access, Norm, Threat


@dataclass(frozen=True)
class Kind:
    """What the library does not say of one of its classes.

    Without an ``order`` its calls do not tell whose images they hold, or its samples decide about each other, so it is
    given one sample at a time.
    """

    norms: frozenset[Norm]
    order: Order | None = "batch"
    access: Access = "gradients"
    minimal: bool = False  # looks for the smallest change, and takes no radius
    radius: str = "eps"    # what the library calls it
    colour: bool = False   # filters three channels
    classes: int = 2       # the fewest that it works with


def _kind(*norms: Norm, **traits: Any) -> Kind:
    return Kind(frozenset(norms), **traits)


_STEPS = ("BIM", "DIFGSM", "EOTPGD", "FFGSM", "FGSM", "Jitter", "MIFGSM", "NIFGSM", "PGD", "RFGSM", "SINIFGSM", "TPGD",
          "UPGD", "VMIFGSM", "VNIFGSM")  # fmt: skip
KINDS: Mapping[str, Kind] = {
    **{name: _kind("linf") for name in _STEPS},
    "APGD": _kind("linf", "l2", order="ball"),
    "APGDT": _kind("linf", "l2", order="ball", classes=4),
    "CW": _kind("l2", order=None, minimal=True),
    "DeepFool": _kind("l2", order=None, minimal=True),
    "EADEN": _kind("l1", "l2", order=None, minimal=True),
    "EADL1": _kind("l1", order=None, minimal=True),
    "FAB": _kind("linf", "l2", order=None, minimal=True),
    "JSMA": _kind("l0", order=None, minimal=True),
    "OnePixel": _kind("l0", order=None, access="scores", minimal=True),
    "PGDL2": _kind("l2"),
    "PGDRS": _kind("linf", order="sample"),
    "PGDRSL2": _kind("l2", order="sample"),
    "PIFGSM": _kind("linf", radius="max_epsilon", colour=True),
    "PIFGSMPP": _kind("linf", radius="max_epsilon", colour=True),
    "Pixle": _kind("l0", order=None, access="scores", minimal=True),
    "SPSA": _kind("linf", access="scores"),
    "SparseFool": _kind("l0", order=None, minimal=True),
    "Square": _kind("linf", "l2", order="ball", access="scores"),
    "TIFGSM": _kind("linf", colour=True),
}
REFUSED: Mapping[str, str] = {
    "AutoAttack": "it gives its parts 10 steps each and lets them share one budget; run its parts side by side, as "
    "torchattacks:APGD(steps=100), torchattacks:APGDT(steps=100), torchattacks:FAB(steps=100) and torchattacks:Square, "
    "whose worst case the tables show",
    "GN": "its noise has no radius to hold it to; use noise",
    "LGV": "it trains networks of its own on training data; use transfer",
    "MultiAttack": "it only wraps other attacks; name them side by side, the tables show their worst case",
    "VANILA": "it changes nothing; the clean accuracy is in every table",
}
SET_BY_THE_THREAT = frozenset({"self", "model", "eps", "max_epsilon", "norm", "n_classes"})


@dataclass(frozen=True)
class TorchAttack:
    """One attack of torchattacks; ``params`` are its own arguments, the radius and the norm come from the threat.

    White-box ones may look where they do not go (``lookahead``); an example counts if it is in the ball. What they end
    on, which most of them never ask about, costs one query more. SPSA's probes are moved into ball and box.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)

    version: ClassVar[int] = 2
    paper: ClassVar[str] = "Kim, 2020, arXiv:2010.01950"

    def __post_init__(self) -> None:
        known = self._signature
        for key in self.params:
            if key not in known or key in SET_BY_THE_THREAT:
                takes = ", ".join(name for name in known if name not in SET_BY_THE_THREAT)
                raise ConfigError(f"torchattacks' {self.name} has no parameter {key!r}; it takes: {takes or 'nothing'}")
            default = known[key].default
            if isinstance(default, int | float) and not isinstance(self.params[key], int | float):
                raise ConfigError(f"torchattacks' {self.name}: {key} is {self.params[key]!r}; give a number")
        if self.name not in KINDS and "eps" not in known:
            raise ConfigError(f"torchattacks' {self.name} has no radius to hold it to; choose one with an eps")

    @property
    def access(self) -> Access:
        """``scores`` or ``gradients``."""
        return self._kind.access

    @property
    def norms(self) -> frozenset[Norm]:
        """The norms in which its radius can be meant."""
        return self._kind.norms

    @property
    def rules(self) -> Rules:
        """Some look for the smallest change; the queries of white-box ones may leave the ball and the box."""
        return Rules(minimal=self._kind.minimal, lookahead=self._kind.access == "gradients")

    @property
    def batch_dependent(self) -> bool:
        """Whether samples share random numbers with their batch; those that go one at a time do not."""
        return self._kind.order is not None

    @property
    def rescaled(self) -> bool:
        """Whether its schedule follows the budget, as Square's does by default."""
        return "resc_schedule" in self._signature and bool(self.params.get("resc_schedule", True))

    def check(self, classes: int, shape: tuple[int, int, int]) -> None:
        """Refuse data on which the library's code does not work.

        Raises:
            ConfigError: says why.
        """
        if self._kind.colour and shape[0] != 3:
            raise ConfigError(f"torchattacks' {self.name} filters three channels; these images have {shape[0]}")
        fewest = max(self._kind.classes, 3 if self.params.get("loss") == "dlr" else 2)
        if classes < fewest:
            raise ConfigError(f"torchattacks' {self.name} compares {fewest} classes or more; these data have {classes}")

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`."""
        x_adv = x.clone()
        for rows in self._groups(x, threat):
            x_adv[rows] = self._craft(oracle, rows, x[rows], y[rows], threat, rng[rows])
        if self._kind.minimal:  # the library returns what is misclassified, however far
            near = inside(x_adv, x, threat.norm, threat.eps)
            x_adv = torch.where(per_sample(near), x_adv, x)
        if len(rows := oracle.active()):
            oracle.scores(x_adv[rows], rows)
        return x_adv

    def _groups(self, x: Tensor, threat: Threat) -> list[Tensor]:
        """The rows that can be attacked in one go."""
        rows, order = torch.arange(len(x), device=x.device), self._kind.order
        if order is None:
            return list(rows.split(1))
        if order == "ball":
            return apart(x, threat.norm, threat.eps)
        if order == "sample":  # as many as the library does not split by itself
            return list(rows.split(max(1, self._value("batch_max") // self._value("noise_batch_size"))))
        return [rows]

    def _craft(self, oracle: Oracle, rows: Tensor, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """What the library makes of the samples ``rows``; what they had asked last, where nobody is left."""
        seed = int(rng.keys.sum()) & 0x7FFFFFFF
        network = oracle.as_module(rows, self._kind.order or "batch", moved=self.name == "SPSA", ends=True)
        with _seeded(seed, x.device):
            attack = _find(self.name)(network, **self._arguments(oracle, threat, seed))
            if self.name == "JSMA":  # its own choice of a target takes ten classes for granted
                attack.set_mode_targeted_by_function(lambda _, labels: (labels + 1) % oracle.classes, quiet=True)
            try:
                x_adv: Tensor = attack(x, y).detach()
            except Over:
                x_adv = network.latest
                x_adv = torch.where(per_sample(inside(x_adv, x, threat.norm, threat.eps)), x_adv, x)
        return x_adv

    def _arguments(self, oracle: Oracle, threat: Threat, seed: int) -> dict[str, Any]:
        """What the class is created with."""
        known = {
            self._kind.radius: threat.eps,
            "norm": {"linf": "Linf", "l2": "L2"}.get(threat.norm),
            "n_queries": oracle.query_budget,
            "seed": seed,
        }
        if "n_classes" in self._signature:
            known["n_classes"] = oracle.classes
        return {**{key: value for key, value in known.items() if key in self._signature}, **self.params}

    def _value(self, name: str) -> Any:
        return self.params.get(name, self._signature[name].default)

    @property
    def _kind(self) -> Kind:
        """A class that is new in the library is given one sample at a time, which is right for all of them."""
        return KINDS.get(self.name, _kind("linf", order=None))

    @property
    def _signature(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(_find(self.name).__init__).parameters


@attacks("torchattacks:")
def torchattack(name: str, **params: Any) -> TorchAttack:
    """The torchattacks class ``name`` with its own arguments.

    Raises:
        ConfigError: the library cannot be imported, has no such attack or argument, or cannot be used for this.
    """
    return TorchAttack(name, params)


def _says(access: str, norms: Iterable[str], paper: str) -> dict[str, Any]:
    return {"access": access, "norms": sorted(norms), "parameters": {}, "paper": paper}


torchattack.members = {  # type: ignore[attr-defined]
    **{name: _says(kind.access, kind.norms, "") for name, kind in KINDS.items()},
    **{name: _says("", (), f"not usable: {why}") for name, why in REFUSED.items()},
}


def _find(name: str) -> Any:
    """The class ``name`` of the library."""
    if name in REFUSED:
        raise ConfigError(f"torchattacks' {name} cannot be used: {REFUSED[name]}")
    foreign = library("torchattacks", "foreign")
    names = [key for key, value in vars(foreign).items() if inspect.isclass(value)]
    if name not in names:
        raise ConfigError(f"torchattacks has no attack {name!r}; {did_you_mean(name, sorted(names))}")
    return getattr(foreign, name)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The library draws from the global generators of torch and numpy, and seeds them."""
    state = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002
