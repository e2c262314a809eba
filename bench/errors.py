"""The errors that a caller may want to catch.

    BenchError                  anything that the user can mend; the CLI prints its one line and exits with 2
    ├── ConfigError             a name, an argument, a suite key or a cell that makes no sense
    ├── DataError               a data set that is missing, malformed or outside its range
    ├── WeightsError            weights that are missing, unsafe, or of another architecture
    └── StoreError              a results folder that cannot be written, or a row that cannot be trusted

    RefereeError                an attack or a defense broke a rule; the cell fails, the grid goes on
    ├── AccessError             it asked for what its threat does not grant
    ├── ThreatViolation         it left the ball or the box
    └── ServiceError            a service cannot be asked, or its answer is none
"""

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 2000  # characters of a message; what came may be a key of any length


class BenchError(Exception):
    """Something the user can mend; the message names what came, what was expected and the fix.

    Of a message that is too long to read, the middle is left out.
    """

    def __str__(self) -> str:
        message = super().__str__()
        half = LONGEST // 2
        return message if len(message) <= LONGEST else f"{message[:half]} [...] {message[-half:]}"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The one of ``known`` that ``name`` is most like, if it is by ``cutoff`` of 1; else empty."""
    return next(iter(get_close_matches(name, list(known), n=1, cutoff=cutoff)), "")


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """What to say where ``name`` is none of ``known``: the nearest one, or ``otherwise``, which lists them all."""
    known = list(known)
    if near := nearest(name, known):
        return f"did you mean {near!r}?"
    return f"known: {', '.join(known)}" if otherwise is None else otherwise


class ConfigError(BenchError, ValueError):
    """A name, an argument, a suite key or a cell that makes no sense."""


class DataError(BenchError):
    """A data set that is missing, malformed or outside its range."""


class WeightsError(BenchError):
    """Weights that are missing, unsafe to load, or of another architecture."""


class StoreError(BenchError):
    """A results folder that cannot be written, or a row that cannot be trusted."""


class RefereeError(Exception):
    """A component broke a rule of the game; its cell becomes a failed row and the grid goes on."""


class AccessError(RefereeError):
    """An attack asked the oracle for something that its threat does not grant."""


class ThreatViolation(RefereeError):
    """An attack queried or returned an input outside the ball or the box."""


class ServiceError(RefereeError):
    """A service cannot be asked, or has answered what is no answer; ``attempts`` is how often the call was sent."""

    def __init__(self, message: str, attempts: int = 1) -> None:
        super().__init__(message)
        self.attempts = attempts
