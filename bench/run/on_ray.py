"""Workers in a cluster of Ray, or in one that is started on this machine and ends with the run.

Each worker has a place (:mod:`bench.run.place`), an actor with one processor or one GPU, and is asked for one message
at a time. No disk is shared: tasks with their data go through the object store once, and so does each network, which
whoever has made it sends here. A worker or a machine that is lost is replaced by a fresh place, wherever there is one.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench.errors import BenchError, ConfigError
from bench.measure.needs import needs
from bench.measure.pipeline import Pipeline
from bench.plan.tasks import Task
from bench.registry import code_hash
from bench.run.cluster import connected, ray_library
from bench.run.executor import Busy, Done, Event, Listener, Lost, Pool
from bench.run.place import Place, Said
from bench.run.processes import LAST, STARTS, event_of
from bench.run.units import Unit
from bench.run.worker import Finished, Setup
from bench.system.claims import Held
from bench.system.files import keep_file
from bench.system.interrupt import deferred
from bench.tracks import Tools

BEGIN = 300.0   # seconds in which the cluster has to give a worker where there is none
GRACE = 5.0     # seconds for a place to end its worker
SAID = 10_000   # characters of what a worker has printed that are kept


@dataclass(frozen=True)
class OnRay:
    """So many ``workers`` (as many as there is room for, by default) on devices of this ``kind``, cpu or cuda.

    Raises:
        ConfigError: Ray is not installed, or the address is none.
    """

    address: str | None
    workers: int | None
    kind: str
    threads: int = 1

    def __post_init__(self) -> None:
        ray_library(self.address)
        if self.kind not in ("cpu", "cuda"):
            raise ConfigError(f"Ray gives out processors and GPUs of CUDA, not {self.kind}; use --executor processes")

    def __str__(self) -> str:
        where = f"the Ray cluster at {self.address}" if self.address else "Ray on this machine"
        return f"workers: {self.workers or 'as many as there is room for'} in {where}; threads: {self.threads} each"

    @contextmanager
    def open(self, tasks: Sequence[Task], tools: Tools) -> Iterator[Pool]:
        parcel = Setup.of(tasks, tools).packed()
        processors = self.workers if self.kind == "cpu" else None
        with connected(self.address, processors) as ray:
            pool = _Pool(ray, self, parcel, {task.cell.key: task for task in tasks}, tools.pipeline)
            del parcel
            try:
                pool.begin()
                yield pool
            finally:
                pool.close()


@dataclass
class _Seat:
    """A place, and what it ``says`` next, unless its worker is ready and has no unit; ``at`` is the unit it has."""

    place: Any
    says: Any
    ready: bool = False
    at: Unit | None = None
    brought: set[str] = field(default_factory=set)  # keys of what others have made, and is there
    claims: ExitStack = field(default_factory=ExitStack)
    printed: str = ""


class _Pool:
    # Ray's compiled code makes a SystemError of what the handler of a signal raises in it, so signals have to wait.

    def __init__(self, ray: Any, asked: OnRay, parcel: bytes, tasks: dict[str, Task], pipeline: Pipeline) -> None:
        self._ray, self._asked, self._tasks, self._pipeline = ray, asked, tasks, pipeline
        self._told = {"device": "cuda:0" if asked.kind == "cuda" else "cpu", "threads": asked.threads}
        self._told |= {"code": code_hash(), "torch": torch.__version__}
        self._parcel = ray.put(parcel)
        self._made: dict[str, Any] = {}  # by key, the files that keep it, in the object store
        self._seats: list[_Seat] = []
        self._events: deque[tuple[int, Event]] = deque()  # of units that no worker had to do
        self._stillborn, self._alive = 0, time.monotonic()

    @deferred()
    def begin(self) -> None:
        resource, needed = ("GPU", "num_gpus") if self._asked.kind == "cuda" else ("CPU", "num_cpus")
        room = int(self._ray.cluster_resources().get(resource, 0))
        workers = self._asked.workers or room
        if not room or workers > room:
            many = workers or "any"
            raise ConfigError(f"there is room for {room} workers in the cluster ({resource}), not for {many}")
        self._actor = self._ray.remote(Place).options(**{"num_cpus": 1, needed: 1}, max_restarts=0)
        self._seats = [self._begun() for _ in range(workers)]

    def free(self) -> Sequence[int]:
        return [number for number, seat in enumerate(self._seats) if seat.ready and seat.at is None]

    @deferred()
    def hand(self, seat: int, unit: Unit) -> None:
        here = self._seats[seat]
        here.at, here.printed = unit, ""
        if unit.makes:
            try:
                here.claims.enter_context(self._pipeline.making(unit.makes))
            except Held:
                self._events.append((seat, Busy()))
                return
            if self._pipeline.has(unit.makes):  # another run has made it
                self._events.append((seat, Done()))
                return
        brings = [need.key for need in needs(self._tasks[unit.cell]) if need.key not in here.brought]
        brings = [key for key in dict.fromkeys(brings) if self._pipeline.has(key)]
        here.brought.update(brings)
        makes = [path.name for path in self._pipeline.files(unit.makes)] if unit.makes else []
        here.says = here.place.work.remote(json.dumps(asdict(unit)).encode(), makes, *map(self._files, brings))

    @deferred()
    def wait(self, seconds: float, hear: Listener) -> None:
        if self._events:
            number, event = self._events.popleft()
            self._end_unit(number)
            hear(number, event)
            return
        says = {seat.says: number for number, seat in enumerate(self._seats) if seat.says is not None}
        if self._ray.wait(list(says), timeout=seconds)[0]:
            for ref in self._ray.wait(list(says), num_returns=len(says), timeout=0)[0]:
                self._heard(says[ref], hear)
        if any(seat.ready for seat in self._seats):
            self._alive = time.monotonic()
        elif time.monotonic() - self._alive > BEGIN:
            raise BenchError(f"the cluster has given no worker for {BEGIN:.0f} s; see `ray status` for what it is at")

    @deferred()
    def end(self, seat: int) -> str:
        printed = self._seats[seat].printed
        self._drop([self._seats[seat]])
        self._seats[seat] = self._begun()
        return printed

    @deferred()
    def close(self) -> None:
        self._drop(self._seats)

    def _begun(self) -> _Seat:
        place = self._actor.remote()
        return _Seat(place, place.begin.remote(self._told, self._parcel))

    def _drop(self, seats: Sequence[_Seat]) -> None:
        """End places, and with them their workers."""
        for seat in seats:
            seat.claims.close()
        ending = [seat.place.end.remote() for seat in seats if seat.ready]
        if ending:
            self._ray.wait(ending, num_returns=len(ending), timeout=GRACE)
        for seat in seats:
            self._ray.kill(seat.place, no_restart=True)

    def _files(self, key: str) -> Any:
        """The files that keep what ``key`` stands for, which are read once."""
        if key not in self._made:
            files = [path for path in self._pipeline.files(key) if path.is_file()]
            self._made[key] = self._ray.put({path.name: path.read_bytes() for path in files})
        return self._made[key]

    def _heard(self, number: int, hear: Listener) -> None:
        """Read what the place in seat ``number`` says."""
        seat = self._seats[number]
        try:
            said: Said = self._ray.get(seat.says)
        except self._ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
            why = f"{type(error).__name__}: {lines[-1] if lines else ''}"
            fresh = self._begun()
            self._ray.kill(seat.place, no_restart=True)
            self._lost(number, fresh, f"was lost with its place ({why})", hear)
            return
        print(said.printed, end="", file=sys.stderr)
        seat.printed = (seat.printed + said.printed)[-SAID:]
        match said.told["say"]:
            case "nothing":
                seat.says = seat.place.next.remote()
            case "ready":
                seat.ready, seat.says, self._stillborn = True, None, 0
            case "refused":
                raise BenchError(said.told["why"])
            case "lost":
                fresh = _Seat(seat.place, seat.place.begin.remote(self._told, self._parcel))
                self._lost(number, fresh, said.told["how"], hear)
            case _:
                self._event(number, said, hear)

    def _event(self, number: int, said: Said, hear: Listener) -> None:
        """Tell what a worker says of its unit."""
        seat, event = self._seats[number], event_of(said.told, said.blobs)
        if isinstance(event, Done | Busy):
            for name, content in said.made.items():
                keep_file(self._pipeline.folder / name, content)
            if said.made and seat.at is not None:
                seat.brought.add(seat.at.makes)
            self._end_unit(number)
            hear(number, event)
            return
        hear(number, event)
        seat.says = (seat.place.kept if isinstance(event, Finished) else seat.place.next).remote()

    def _end_unit(self, number: int) -> None:
        seat = self._seats[number]
        seat.at, seat.says = None, None
        seat.claims.close()

    def _lost(self, number: int, fresh: _Seat, how: str, hear: Listener) -> None:
        """The worker in seat ``number`` has ended; a ``fresh`` one takes it."""
        seat = self._seats[number]
        self._stillborn += not seat.ready
        if self._stillborn >= STARTS:
            raise BenchError(f"workers end before they begin (the last one {how}): {seat.printed.strip()[-LAST:]}")
        seat.claims.close()
        self._seats[number] = fresh
        if seat.at is not None:
            hear(number, Lost(how, seat.printed))
