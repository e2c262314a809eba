"""One pure function of many things, worked out on all processors at once.

What is asked is known to every process, as each is a fork of this one, and only answers travel. A process that ends
without its answers, whatever ended it, is no failure: they are worked out here, where an error is raised as ever.
"""

import gc
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from signal import SIG_DFL, SIGKILL, signal
from typing import TypeVar, cast

from bench.system.interrupt import SIGNALS, deferred
from bench.system.processors import processors

T = TypeVar("T")
R = TypeVar("R")

FEW = 100  # things, of milliseconds each, for which processes are not worth their start
MOST = 16  # processes: answers are collected by one
TOLD = 16  # answers in a message


def spread(function: Callable[[T], R], things: Sequence[T], processes: int | None = None) -> list[R]:
    """``function`` of each of ``things``, in their order, by so many ``processes``; as many as help by default.

    The function depends on nothing that it changes, its answers can be pickled, and it does not compute with torch:
    where this process has done so on several threads, a fork that does waits for ever.
    """
    count = _helpful(len(things)) if processes is None else processes
    found: dict[int, R] = {}
    begun: list[tuple[int, Connection]] = []
    try:
        with deferred(), suppress(OSError):  # no more processes, or no memory for one: the others do theirs
            while count > 1 and len(begun) < count:
                begun.append(_begin(function, things, range(len(begun), len(things), count)))
        _collect([end for _, end in begun], found)
    finally:
        for process, end in begun:
            end.close()
            with suppress(ProcessLookupError):
                os.kill(process, SIGKILL)
            os.waitpid(process, 0)
    return [found[place] if place in found else function(thing) for place, thing in enumerate(things)]


def _collect(ends: list[Connection], found: dict[int, R]) -> None:
    """Put what comes out of ``ends`` into ``found``, until each has ended, or broken off."""
    while ends:
        for end in wait(ends):
            try:
                found |= cast(Connection, end).recv()
            except Exception:  # the end, half a message, or an answer that cannot be made again here
                ends.remove(cast(Connection, end))


def _helpful(things: int) -> int:
    """How many processes help; this one alone where another thread may hold a lock that nobody would open in a fork."""
    alone = sys.platform == "linux" and threading.active_count() == 1
    return min(round(processors()), MOST) if alone and things >= FEW else 1


def _begin(function: Callable[[T], R], things: Sequence[T], places: Sequence[int]) -> tuple[int, Connection]:
    """A process that works out ``places`` of ``things``, and the end at which its answers come out."""
    ours, theirs = Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: those of numpy and pyarrow bear a fork
        process = os.fork()
    if process:
        theirs.close()
        return process, ours
    try:
        for number in SIGNALS:
            signal(number, SIG_DFL)
        gc.disable()  # which would copy all that is shared, to look whether it can go
        for first in range(0, len(places), TOLD):
            theirs.send({place: function(things[place]) for place in places[first : first + TOLD]})
    finally:
        os._exit(0)
