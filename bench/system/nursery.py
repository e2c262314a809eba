"""Processes that begin clean: each knows what it is sent, and nothing else of the process that asks for it.

A nursery is started afresh, never forked from us, and loads what all of them need once. Every process is a fork of it,
so it begins in milliseconds, in a session of its own, and whatever it starts ends with it. It writes no files but in a
temporary folder of its own, where the system can see to that. The nursery ends with us, and with it all that it has
begun.
"""

import atexit
import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from bench.errors import RefereeError
from bench.system.walls import adopt_orphans, children, confine

PRINTED = 10_000  # characters of what a process prints that are kept, of the beginning and of the end
GRACE = 2.0       # seconds for a process that has hung up to be gone
# What its processes may need and takes seconds to load, where we have loaded it, too.
SHARED = ("scipy.stats", "sklearn.datasets", "torchvision", "timm")
BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from bench.system.nursery import nurse; nurse(int(sys.argv[2]), json.loads(sys.argv[3]))"
)


class Begun:
    """A process of its own, at the other end of ``channel``."""

    def __init__(self, pid: int, channel: socket.socket, output: int, nursery: "_Nursery") -> None:
        self.channel, self.pid, self._nursery = channel, pid, nursery
        self._output, self._last, self._fresh, self._how = bytearray(), bytearray(), bytearray(), ""
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._reader.start()

    def end(self) -> str:
        """End it, if it has not ended by itself, and say how it has."""
        if not self._how:
            self.channel.close()
            self._how = self._nursery.end(self.pid)
            self._reader.join(GRACE)  # whatever it has left running may hold the pipe open
        return self._how

    def kill(self) -> None:
        """End it at once, with what it has begun."""
        if not self._how:
            _kill(self.pid)

    @property
    def printed(self) -> str:
        """The beginning of what it has printed, without what a terminal would obey."""
        return _plain(self._output)

    @property
    def last(self) -> str:
        """The end of what it has printed, likewise."""
        return _plain(self._last)

    def unseen(self) -> str:
        """The beginning of what it has printed since this was last asked for, likewise."""
        fresh = bytes(self._fresh)
        del self._fresh[: len(fresh)]
        return _plain(fresh)

    def _read(self, output: int) -> None:
        with os.fdopen(output, "rb", buffering=0) as pipe:
            while part := pipe.read(65536):
                self._output += part[: PRINTED - len(self._output)]
                self._fresh += part[: PRINTED - len(self._fresh)]
                self._last = (self._last + part)[-PRINTED:]


def _plain(text: "bytes | bytearray") -> str:
    letters = bytes(text).decode(errors="replace")
    return "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in letters)


def begin(entry: str, *, walled: bool = True) -> Begun:
    """A process that calls ``entry``, which is ``module:function``, with its end of the channel.

    One that is ``walled`` writes no files but temporary ones; see :mod:`bench.system.walls`.

    Raises:
        RefereeError: the system gives none.
    """
    global _nursery
    for last in (False, True):
        if _nursery is None or _nursery.owner != os.getpid():  # a fork of ours has none
            _nursery = _Nursery(entry.partition(":")[0])
        try:
            return _nursery.begin(entry, walled)
        except (OSError, ValueError) as error:  # somebody has ended it
            _nursery = None
            if last:
                raise RefereeError(f"no process could be started ({error})") from error
    raise AssertionError


class _Nursery:
    """Our side of it: one request at a time, each with its answer."""

    def __init__(self, module: str) -> None:
        self.owner = os.getpid()
        self._control, theirs = socket.socketpair()
        preload = [module, *(name for name in SHARED if name in sys.modules)]
        number = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", BOOT, json.dumps(sys.path), str(number), json.dumps(preload)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(number,), start_new_session=True,
        )  # fmt: skip
        theirs.close()
        atexit.register(self.close)

    def begin(self, entry: str, walled: bool) -> Begun:
        ours, theirs = socket.socketpair()
        output, printing = os.pipe()
        try:
            answer = self._ask({"begin": entry, "walled": walled}, (theirs.fileno(), printing))
        except BaseException:
            ours.close()
            os.close(output)
            raise
        finally:
            theirs.close()
            os.close(printing)
        return Begun(int(answer), ours, output, self)

    def end(self, pid: int) -> str:
        try:
            return self._ask({"end": pid}) if self.owner == os.getpid() else "is another's"
        except (OSError, ValueError):  # it is gone, and its processes with it
            return "was ended from outside"

    def close(self) -> None:
        if self.owner == os.getpid():
            self._control.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)

    def _ask(self, request: dict[str, Any], files: tuple[int, ...] = ()) -> str:
        try:
            socket.send_fds(self._control, [json.dumps(request).encode() + b"\n"], files)
            return str(json.loads(_line(self._control)))
        except BaseException:  # a signal, too: an answer that nobody has read would be taken for the next one's
            self._control.close()
            raise


_nursery: _Nursery | None = None


def nurse(number: int, preload: list[str]) -> None:
    """What the nursery does until nobody holds the other end of its socket ``number``."""
    control = socket.socket(fileno=number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # libraries have threads of their own, which know how to be forked
    for name in preload:
        with contextlib.suppress(Exception):  # whoever needs it will hear of that
            getattr(importlib.import_module(name), "prepare", lambda: None)()
    adopt_orphans()
    running: dict[int, str] = {}  # their temporary folders
    try:
        while request := _received(control):
            told, files = request
            if "begin" in told:
                folder = tempfile.mkdtemp(prefix="parry-")
                pid = os.fork()
                if pid == 0:
                    control.close()
                    _grow_up(told["begin"], folder, told["walled"], *files)
                running[pid] = folder
                answer: object = pid
                for file in files:
                    os.close(file)
            else:
                answer = _ended(told["end"])
                shutil.rmtree(running.pop(told["end"], ""), ignore_errors=True)
                _end_orphans(running)
            control.sendall(json.dumps(answer).encode() + b"\n")
    finally:
        for pid in running:
            _kill(pid)
        _end_orphans(())
        for folder in running.values():
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)


def _grow_up(entry: str, folder: str, walled: bool, channel: int, output: int) -> None:
    """Become the process that was asked for, whose temporary files lie in ``folder``; never returns."""
    code = 1
    try:
        os.setsid()
        tempfile.tempdir = folder
        if walled:
            confine(Path(folder))
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        module, _, function = entry.partition(":")
        serve: Callable[[socket.socket], None] = getattr(importlib.import_module(module), function)
        with socket.socket(fileno=channel) as ours:
            os.register_at_fork(after_in_child=ours.close)  # a fork of it neither answers nor keeps us waiting
            serve(ours)
        code = 0
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _ended(pid: int) -> str:
    """How the process ``pid`` ended: by itself, if it has or is about to, or by us."""
    deadline = time.monotonic() + GRACE
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.005)
    if found[0] == 0:
        _kill(pid)
        os.waitpid(pid, 0)
        return "was ended by us"
    _kill(pid)  # what it has left behind in its session
    status = os.waitstatus_to_exitcode(found[1])
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with code {status}"


def _end_orphans(running: Collection[int]) -> None:
    """End what ended processes have left in sessions of their own; while others are ``running``, it may be theirs."""
    while not running and (left := children()):
        for pid in left:
            _kill(pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _received(control: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    message, files, _, _ = socket.recv_fds(control, 4096, 2)
    return (json.loads(message), files) if message else None


def _line(control: socket.socket) -> bytes:
    """An answer, which ends with its line."""
    answer = b""
    while not answer.endswith(b"\n"):
        part = control.recv(4096)
        if not part:
            raise OSError("the nursery is gone")
        answer += part
    return answer
