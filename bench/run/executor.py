"""Who does the units of a run: workers in a pool. The simplest one is this process itself."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple, Protocol

from bench.plan.tasks import Task
from bench.run.units import Unit
from bench.run.worker import Finished, Worker
from bench.system.claims import Held
from bench.tracks import Tools


class Told(NamedTuple):
    """So much of a unit is done: epochs, or queries settled, among them those that a fall has saved."""

    done: int
    total: int
    what: str


class Done(NamedTuple):
    """A unit has ended, and what came of it was told before."""


class Busy(NamedTuple):
    """Another process makes what a unit needs."""


class Lost(NamedTuple):
    """A unit has ended with its worker: ``how``, and the last of what that has ``said``."""

    how: str
    said: str


Event = Told | Finished | Done | Busy | Lost
Listener = Callable[[int, Event], None]  # called with the seat of a worker and what it has to say


class Pool(Protocol):
    """Workers in numbered seats, each with one unit at a time. One that is lost is replaced."""

    def free(self) -> Sequence[int]:
        """The seats whose workers are ready and have no unit."""
        ...

    def hand(self, seat: int, unit: Unit) -> None:
        """Let the worker in ``seat`` begin."""
        ...

    def wait(self, seconds: float, hear: Listener) -> None:
        """Let workers work and tell what they say, until one has said something or so much time is gone.

        The last event of a unit is ``Done``, ``Busy`` or ``Lost``. A shard that is ``Finished`` is safe when ``hear``
        returns.

        Raises:
            StoreError: a worker cannot read or write what all share.
        """
        ...

    def end(self, seat: int) -> str:
        """End the worker in ``seat`` at once, and its unit with it; the last of what it printed."""
        ...


class Executor(Protocol):
    """What makes a pool."""

    def open(self, tasks: Sequence[Task], tools: Tools) -> AbstractContextManager[Pool]:
        """Workers for ``tasks``, which work with tools like these; they end with the context.

        Raises:
            BenchError: there can be none.
        """
        ...


class Local:
    """One worker: this process."""

    @contextmanager
    def open(self, tasks: Sequence[Task], tools: Tools) -> Iterator[Pool]:
        yield _Here(Worker(tasks, tools))


class _Here:
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._unit: Unit | None = None

    def free(self) -> Sequence[int]:
        return [0] if self._unit is None else []

    def hand(self, seat: int, unit: Unit) -> None:
        self._unit = unit

    def wait(self, seconds: float, hear: Listener) -> None:
        assert self._unit is not None
        ended: Event = Done()
        try:
            self._worker.work(self._unit, partial(hear, 0), lambda *told: hear(0, Told(*told)))
        except Held:
            ended = Busy()
        self._unit = None
        hear(0, ended)

    def end(self, seat: int) -> str:
        raise AssertionError("this process cannot end itself")
