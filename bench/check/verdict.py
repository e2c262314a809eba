"""What a rule of the contract says of a component, and how it is asked when the component's code may do anything."""

import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal, TypeVar

from bench.errors import BenchError, RefereeError
from bench.system.interrupt import Stopped
from bench.system.process_state import undisturbed

SECONDS = 20  # of the processor that one rule may take; a busy machine must fail nobody

Outcome = Literal["pass", "note", "FAIL"]
Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Verdict:
    """What was seen of one rule and, where it failed, how to mend it; a note is a fact that breaks no rule."""

    rule: str
    outcome: Outcome
    saw: str
    fix: str = ""

    @property
    def failed(self) -> bool:
        """Whether the rule is broken."""
        return self.outcome == "FAIL"


class Broken(Exception):
    """The rule is broken: what was seen, and the fix in words."""

    def __init__(self, saw: str, fix: str) -> None:
        super().__init__(f"{saw}; {fix}")
        self.saw, self.fix = saw, fix


class Remark(str):
    """What a rule has seen that the author should know, and that breaks nothing."""

    __slots__ = ()


class _TimeUp(BaseException):
    """A rule has taken too long."""


Rule = Callable[[Subject], str]  # returns what it saw, or raises Broken
Rules = dict[str, Rule[Subject]]


def require(holds: object, saw: str, fix: str) -> None:
    """Raise :class:`Broken` unless ``holds``."""
    if not holds:
        raise Broken(saw, fix)


def judge(name: str, rule: Rule[Subject], subject: Subject, file: str = "", seconds: float = SECONDS) -> Verdict:
    """What ``rule`` says of ``subject``, whose code may raise anything, exit, print, or never end.

    Args:
        file: the user's, whose lines are named where its code fails.
        seconds: it may take.
    """
    try:
        with _time_limit(seconds), undisturbed(importing=True):
            saw = rule(subject)
    except Broken as broken:
        return Verdict(name, "FAIL", broken.saw, broken.fix)
    except _TimeUp:
        return Verdict(
            name, "FAIL", f"took more than {seconds:g} s on tiny data",
            "look for a loop over images or one that never ends: an attack stops when oracle.active() is empty",
        )  # fmt: skip
    except (Stopped, KeyboardInterrupt):
        raise
    except (BenchError, RefereeError) as error:
        saw, _, fix = str(error).rpartition("; ")
        return Verdict(name, "FAIL", saw or fix, fix if saw else "")
    except BaseException as error:  # sys.exit among it
        return Verdict(name, "FAIL", said(error), f"mend {_where(error, file)}")
    return Verdict(name, "note" if isinstance(saw, Remark) else "pass", str(saw))


def said(error: BaseException) -> str:
    """The kind of ``error`` and the first line of its message."""
    message = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {message}"[:300].rstrip(": ")


def _where(error: BaseException, file: str) -> str:
    """The last line of ``file`` that ``error`` came by, or the last line at all."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if file and frame.filename == file), frames[-1])
    return f"line {frame.lineno} of {frame.filename}, in {frame.name}"


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`_TimeUp` inside after ``seconds`` of the processor, and again each second, should it be swallowed.

    Only the main thread can be told.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def up(number: int, frame: FrameType | None) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGPROF, up)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
