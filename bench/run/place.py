"""A place in a cluster: it keeps a worker in a process of its own machine, and passes on what that says.

The worker shares no disk with whoever began it. What others have made for it is brought here, and what it makes is
given away. It lies in the temporary folder of the worker, and ends with it.
"""

import ctypes
import faulthandler
import json
import platform
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

from bench.system.files import keep_file
from bench.system.frames import exactly, receive, send
from bench.system.nursery import Begun, begin

ENTRY = "bench.run.place:serve"
PATIENCE = 60.0  # seconds in which a message has to arrive once it has begun to
PAUSE = 1.0      # seconds that a place waits for its worker before it says that there is nothing
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG, prctl(2)


class Said(NamedTuple):
    """One message of a worker: what it has ``told``, with ``blobs``; what it ``printed``; the files that it has made.

    Told is ``{"say": "nothing"}`` where it has said nothing for a while, and ``{"say": "lost"}`` where it has ended.
    """

    told: Mapping[str, Any]
    blobs: Sequence[bytes] = ()
    printed: str = ""
    made: Mapping[str, bytes] = {}


class Place:
    """One worker at a time. Every method but :meth:`end` gives the next that the worker says."""

    def __init__(self) -> None:
        self._begun: Begun | None = None
        self._folder = Path()
        self._makes: Sequence[str] = ()

    def begin(self, told: Mapping[str, Any], parcel: bytes) -> Said:
        """Begin a worker of a packed :class:`bench.run.worker.Setup`, which is told its device and its threads."""
        self.end()
        self._begun = begin(ENTRY, walled=False)
        self._begun.channel.settimeout(PATIENCE)
        return self._ask(json.dumps(told).encode(), parcel)

    def work(self, unit: bytes, makes: Sequence[str], *brought: Mapping[str, bytes]) -> Said:
        """Let it do ``unit``, which needs the files that are ``brought``, and makes those of such names."""
        for files in brought:
            for name, content in files.items():
                keep_file(self._folder / name, content)
        self._makes = makes
        return self._ask(unit)

    def kept(self) -> Said:
        """Tell it that what it has finished is safe."""
        return self._ask(b"kept")

    def next(self) -> Said:
        """Wait for it."""
        return self._ask()

    def end(self) -> None:
        """End it at once."""
        if self._begun is not None:
            self._begun.kill()
            self._begun.end()

    def _ask(self, *frames: bytes) -> Said:
        begun = self._begun
        assert begun is not None
        try:
            for frame in frames:
                send(begun.channel, frame)
            if not wait([begun.channel], PAUSE):
                return Said({"say": "nothing"}, printed=begun.unseen())
            told = json.loads(receive(begun.channel))
            blobs = [bytes(exactly(begun.channel, size)) for size in told.get("sizes", ())]
        except (EOFError, OSError, ValueError):
            return Said({"say": "lost", "how": begun.end()}, printed=begun.unseen())
        if told["say"] == "ready":
            self._folder = Path(told["networks"])
        made = [self._folder / name for name in self._makes] if told["say"] == "done" else []
        files = {path.name: path.read_bytes() for path in made if path.is_file()}
        return Said(told, blobs, begun.unseen(), files)


# What follows runs in the process of a worker.


def prepare() -> None:
    """Load what every worker needs, in the process that they are forked from."""
    from bench.run import processes

    processes.prepare()


def serve(channel: socket.socket) -> None:
    """Become a worker of what is sent, then do unit after unit until the channel is closed."""
    import torch

    from bench.errors import BenchError
    from bench.registry import code_hash
    from bench.run.processes import Link, settle
    from bench.system.parcel import unpack_elsewhere

    if sys.platform == "linux":  # Ray may end the nursery, which then ends nobody
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    link = Link(channel)
    try:
        told, parcel = json.loads(receive(channel)), receive(channel)
        device = settle(told)
        ours = {"code": code_hash(), "torch": torch.__version__}
        try:
            for what, version in ours.items():
                if told[what] != version:
                    raise BenchError(f"{what} {version} is another than {told[what]} here; install the same there")
            setup = unpack_elsewhere(parcel)
            for folder in {task.model_dir for task in setup.tasks if task.model_dir}:
                if not folder.is_dir():
                    raise BenchError(f"--model-dir {folder} is not there; put the weights at the same path there")
        except BenchError as error:
            link.say("refused", why=f"on the machine {platform.node()}, {error}")
            return
        networks = Path(tempfile.gettempdir()) / "networks"
        worker = setup.worker(device, networks)
        del parcel
        link.say("ready", networks=str(networks))
        link.serve(worker)
    except EOFError:
        return
