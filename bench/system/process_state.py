"""The process around a cell: what a component changes in it does not reach the next cell."""

import gc
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import TextIOBase
from typing import Any, TextIO

import numpy as np
import torch

from bench.system.interrupt import SIGNALS

PRINTED = 10_000  # characters of what the components of a cell print that are shown

# What is kept, as pairs of a function that reads it and one that puts it back.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (lambda: os.getcwd(), os.chdir),  # noqa: PTH109 - a path for chdir
    (lambda: sys.getrecursionlimit(), lambda kept: sys.setrecursionlimit(kept)),
    (gc.isenabled, lambda kept: gc.enable() if kept else gc.disable()),
    (lambda: _handlers(), lambda kept: [signal.signal(number, handler) for number, handler in kept.items()]),
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (np.geterr, lambda kept: np.seterr(**kept)),
    (torch.get_rng_state, torch.set_rng_state),
    (lambda: torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [], torch.cuda.set_rng_state_all),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda kept: _restore_default_device(kept)),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (lambda: _determinism(), lambda kept: _restore_determinism(kept)),
    (lambda: _backends(), lambda kept: _restore_backends(kept)),
)


# And what a file that is imported may have set for what it imports later.
_IMPORTS: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (lambda: dict(os.environ), lambda kept: _restore(os.environ, kept)),
    (lambda: list(sys.path), lambda kept: sys.path.__setitem__(slice(None), kept)),
)


@contextmanager
def undisturbed(*, importing: bool = False) -> Iterator[None]:
    """Leave the process as it is now, whatever the components that run inside do to it.

    That is the working directory, the environment, the import path, warning filters, signal handlers, numpy's error
    handling, the global random generators (Python's, numpy's, torch's), and torch's default dtype and device, thread
    count, gradient and anomaly modes, determinism and precision. What is printed inside goes to the standard error
    stream, up to ``PRINTED`` characters. A fork that a component makes and does not end is ended where it would leave.

    Args:
        importing: users' files are imported inside, so the environment and the import path stay as those leave them.
    """
    owner = os.getpid()
    kept = [(_read(read), write) for read, write in (*_SETTINGS, *(() if importing else _IMPORTS))]
    shown = _Bounded(sys.stderr)
    try:
        with warnings.catch_warnings(), redirect_stdout(shown), redirect_stderr(shown):
            yield
    finally:
        if os.getpid() != owner:
            os._exit(0)
        for value, write in kept:
            with suppress(OSError):  # the folder that we were in may be gone
                if value is not None:
                    write(value)
        shown.end()


def seed_globals(seed: int) -> None:
    """Set the global generators of Python, numpy and torch, for components that draw from them."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that components share
    torch.manual_seed(seed)


class _Bounded(TextIOBase):
    """Passes on the first ``PRINTED`` characters, and says how many more there were."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._left, self._dropped = stream, PRINTED, 0

    def write(self, text: str) -> int:
        shown = text[: self._left]
        self._left -= len(shown)
        self._dropped += len(text) - len(shown)
        if shown:
            self._stream.write(shown)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def writable(self) -> bool:
        return True

    def end(self) -> None:
        if self._dropped:
            self._stream.write(f"\n({self._dropped:,} more printed characters are not shown)\n")


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError:  # the folder that we are in is gone
        return None


def _restore(mapping: Any, kept: Mapping[str, str]) -> None:
    if dict(mapping) != kept:
        mapping.clear()
        mapping.update(kept)


def _handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}  # only the main thread may set them
    handlers = {int(number): signal.getsignal(number) for number in SIGNALS}
    return {number: handler for number, handler in handlers.items() if handler is not None}


def _restore_default_device(kept: torch.device) -> None:
    if torch.get_default_device() != kept:
        torch.set_default_device(None if kept.type == "cpu" else kept)  # None takes torch's hook away again


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _restore_determinism(kept: tuple[bool, bool]) -> None:
    if _determinism() != kept:  # setting it imports torch's compiler, which takes seconds and may fail
        torch.use_deterministic_algorithms(kept[0], warn_only=kept[1])


def _backends() -> dict[tuple[Any, str], bool]:
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    switches = [(cudnn, "enabled"), (cudnn, "benchmark"), (cudnn, "deterministic"), (mkldnn, "enabled")]
    return {(backend, name): getattr(backend, name) for backend, name in switches}


def _restore_backends(kept: Mapping[tuple[Any, str], bool]) -> None:
    for (backend, name), value in kept.items():
        if getattr(backend, name) != value:
            setattr(backend, name, value)
