"""What the adversary may change, see and spend."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from bench.errors import ConfigError

Norm = Literal["l0", "l1", "l2", "linf"]
Access = Literal["scores", "labels", "gradients", "training-data", "certificate"]


@dataclass(frozen=True)
class Threat:
    """At most ``eps`` in ``norm``, inside the box [0, 1], with ``access`` and ``query_budget`` per sample.

    ``eps`` is on the pixel scale (``8/255``, not ``8``); for ``l0`` it counts pixels. ``query_budget`` is the number of
    forward passes that one sample may cost, ``None`` where no attacker asks: on training data, and in a certificate,
    which finds a radius for each sample and has none of its own.

    Raises:
        ConfigError: an unknown norm or access, or a radius or a budget that cannot be meant.
    """

    norm: Norm
    eps: float
    access: Access
    query_budget: int | None = None

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ConfigError(f"norm is {self.norm!r}; use one of {', '.join(get_args(Norm))}")
        if self.access not in get_args(Access):
            raise ConfigError(f"access is {self.access!r}; use one of {', '.join(get_args(Access))}")
        if not self.eps >= 0:
            raise ConfigError(f"{self.norm} eps is {self.eps:g}; a radius is zero or more")
        if self.norm == "linf" and 1 < self.eps < math.inf:
            raise ConfigError(f"linf eps is {self.eps:g}, above the pixel range; write {self.eps:g}/255 for levels")
        if self.query_budget is not None and self.query_budget < 1:
            raise ConfigError(f"query budget is {self.query_budget}; allow at least one query")

    @property
    def free(self) -> "Threat":
        """The same, whatever a sample may cost."""
        return replace(self, query_budget=None)

    @property
    def asks(self) -> bool:
        """Whether an attacker asks a served model, question by question."""
        return self.access in ("scores", "labels", "gradients")

    @property
    def proves(self) -> bool:
        """Whether nobody attacks: a certifier proves a radius for each sample."""
        return self.access == "certificate"

    def __str__(self) -> str:
        if self.access == "training-data":
            return "released training data"
        if self.proves:
            return f"certified {self.norm}"
        return f"{self.norm} {format_eps(self.eps, self.norm)}"


def parse_eps(value: str | float) -> float:
    """Read a radius such as ``0.5`` or ``"8/255"``.

    Raises:
        ConfigError: not a number or a fraction of two numbers.
    """
    try:
        numerator, slash, denominator = str(value).partition("/")
        return float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"eps is {value!r}; write a number or a fraction, such as 0.5 or 8/255") from None


def format_eps(eps: float, norm: Norm) -> str:
    """Write a radius the way the field does: ``8/255`` for whole grey levels in linf, a plain number otherwise."""
    levels = eps * 255
    if norm == "linf" and 0 < eps < math.inf and abs(levels - round(levels)) < 1e-6:
        return f"{round(levels)}/255"
    return f"{eps:g}"
