"""Workers in processes of this machine, each begun clean: one for each device, or one for each idle core.

A worker is sent all tasks once, then units one at a time, and answers each with what came of it. It ends with us, by a
signal or however we end; one that ends before is replaced by a fresh one.
"""

import faulthandler
import json
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from typing import Any

import torch

from bench.errors import BenchError, RefereeError, StoreError
from bench.plan.tasks import Task
from bench.registry import load_plugins
from bench.run.executor import Busy, Done, Listener, Lost, Pool, Told
from bench.run.units import Unit
from bench.run.worker import Finished, Setup, Worker
from bench.system.claims import Held
from bench.system.frames import exactly, receive, send
from bench.system.nursery import Begun, begin
from bench.system.parcel import unpack
from bench.tracks import Tools

ENTRY = "bench.run.processes:serve"
PATIENCE = 60.0  # seconds in which a message has to arrive once it has begun to
OFTEN = 0.2      # seconds between two messages about how far a unit is
LAST = 500       # characters of what such a worker has printed
STARTS = 3       # workers in a row that may end before they are ready


@dataclass(frozen=True)
class Processes:
    """A worker for each of ``devices``, which may come several times, with so many ``threads``."""

    devices: Sequence[torch.device]
    threads: int = 1

    def __str__(self) -> str:
        places = " on " + ", ".join(map(str, dict.fromkeys(self.devices))) if self.devices[0].type != "cpu" else ""
        return f"workers: {len(self.devices)}{places}; threads: {self.threads} each"

    @contextmanager
    def open(self, tasks: Sequence[Task], tools: Tools) -> Iterator[Pool]:
        pool = _Pool(self.devices, self.threads, Setup.of(tasks, tools).packed())
        try:
            pool.begin()
            yield pool
        finally:
            pool.close()


@dataclass
class _Seat:
    """One worker, and whether it is ``ready`` for a unit; ``at`` is the unit that it has."""

    device: torch.device
    begun: Begun
    ready: bool = False
    at: Unit | None = None


class _Pool:
    def __init__(self, devices: Sequence[torch.device], threads: int, parcel: bytes) -> None:
        self._devices, self._threads, self._parcel = devices, threads, parcel
        self._seats: list[_Seat] = []
        self._stillborn = 0

    def begin(self) -> None:
        for device in self._devices:
            self._seats.append(self._begun(device))

    def free(self) -> Sequence[int]:
        return [number for number, seat in enumerate(self._seats) if seat.ready and seat.at is None]

    def hand(self, seat: int, unit: Unit) -> None:
        self._seats[seat].at = unit
        with suppress(OSError):  # it is gone, which is heard when it is waited for
            send(self._seats[seat].begun.channel, json.dumps(asdict(unit)).encode())

    def wait(self, seconds: float, hear: Listener) -> None:
        channels = {seat.begun.channel: number for number, seat in enumerate(self._seats)}
        for channel in wait(list(channels), seconds):
            number = channels[channel]  # type: ignore[index]
            self._heard(number, hear)
        for seat in self._seats:
            _show(seat.begun)

    def end(self, seat: int) -> str:
        begun = self._seats[seat].begun
        begun.kill()
        begun.end()
        self._replace(seat)
        return begun.last

    def close(self) -> None:
        for seat in self._seats:
            seat.begun.kill()
        for seat in self._seats:
            seat.begun.end()
            _show(seat.begun)

    def _begun(self, device: torch.device) -> _Seat:
        try:
            seat = _Seat(device, begin(ENTRY, walled=False))
        except RefereeError as error:
            raise BenchError(f"{error}; use --executor local") from error
        seat.begun.channel.settimeout(PATIENCE)
        with suppress(OSError):  # it is gone, which is heard when it is waited for
            send(seat.begun.channel, json.dumps({"device": str(device), "threads": self._threads}).encode())
            send(seat.begun.channel, self._parcel)
        return seat

    def _replace(self, number: int) -> None:
        _show(self._seats[number].begun)
        self._seats[number] = self._begun(self._seats[number].device)

    def _heard(self, number: int, hear: Listener) -> None:
        """Read one message of the worker in seat ``number``, and tell what it says."""
        seat = self._seats[number]
        try:
            told = json.loads(receive(seat.begun.channel))
            blobs = [bytes(exactly(seat.begun.channel, size)) for size in told.get("sizes", ())]
        except (EOFError, OSError, ValueError):
            self._lost(number, hear)
            return
        if told["say"] == "ready":
            seat.ready, self._stillborn = True, 0
            return
        event = event_of(told, blobs)
        if isinstance(event, Done | Busy):
            seat.at = None
        hear(number, event)
        if isinstance(event, Finished):
            with suppress(OSError):
                send(seat.begun.channel, b"kept")

    def _lost(self, number: int, hear: Listener) -> None:
        seat = self._seats[number]
        how = seat.begun.end()
        self._stillborn += not seat.ready
        if self._stillborn >= STARTS:
            raise BenchError(f"workers end before they begin (the last one {how}): {seat.begun.last.strip()[-LAST:]}")
        self._replace(number)
        if seat.at is not None:
            hear(number, Lost(how, seat.begun.last))


def event_of(told: Mapping[str, Any], blobs: Sequence[bytes]) -> Told | Finished | Done | Busy:
    """What a worker that is at a unit has ``told``.

    Raises:
        StoreError: it cannot read or write what all share.
    """
    match told["say"]:
        case "told":
            return Told(*told["told"])
        case "finished":
            return Finished(told["facts"], *blobs)
        case "done":
            return Done()
        case "busy":
            return Busy()
    raise StoreError(told["why"])


def _show(begun: Begun) -> None:
    """Show what a worker has printed since we looked last."""
    if said := begun.unseen():
        print(said, end="", file=sys.stderr)


# What follows runs in the process of a worker.


def prepare() -> None:
    """Load what every worker needs, in the process that they are forked from."""
    load_plugins()


def serve(channel: socket.socket) -> None:
    """Become a worker of what is sent, then do unit after unit until the channel is closed."""
    faulthandler.enable()  # a crash in a library says where
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = Link(channel)
    try:
        told, parcel = json.loads(receive(channel)), receive(channel)
        device = settle(told)
        worker = unpack(parcel).worker(device)
        del parcel
        link.say("ready")
        link.serve(worker)
    except EOFError:
        return


def settle(told: Mapping[str, Any]) -> torch.device:
    """Compute on the device, and with the threads, that we were told; the device."""
    torch.set_num_threads(told["threads"])
    device = torch.device(told["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


class Link:
    """What a worker says to whoever began it."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._told = channel, 0.0

    def say(self, what: str, *blobs: bytes, **more: Any) -> None:
        header = {"say": what, "sizes": [len(blob) for blob in blobs], **more}
        send(self._channel, json.dumps(header).encode(), *blobs)

    def serve(self, worker: Worker) -> None:
        """Unit after unit.

        Raises:
            EOFError: the channel is closed.
        """
        while True:
            self.do(worker, Unit(**json.loads(receive(self._channel))))

    def do(self, worker: Worker, unit: Unit) -> None:
        """One unit, and at last how it ended."""
        try:
            worker.work(unit, self._keep, self._hear)
        except Held:
            self.say("busy")
        except StoreError as error:
            self.say("stop", why=str(error))
        else:
            self.say("done")

    def _keep(self, finished: Finished) -> None:
        blobs = [blob for blob in (finished.records, finished.examples) if blob is not None]
        self.say("finished", *blobs, facts=finished.facts)
        receive(self._channel)  # it is safe

    def _hear(self, done: int, total: int, what: str) -> None:
        if done == total or time.monotonic() - self._told > OFTEN:
            self._told = time.monotonic()
            self.say("told", told=(done, total, what))
