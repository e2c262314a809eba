"""Ending a job from outside (Ctrl-C, SIGTERM, SIGHUP), told apart from whatever a component raises."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """Someone has asked this process to end, by ``signal``; ``exit_code`` is what shells expect of it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal."""
        return 128 + self.signal


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Have Ctrl-C, SIGTERM and SIGHUP raise :class:`Stopped`, and afterwards do what they did before.

    A signal that is ignored (``nohup``) stays so. Threads other than the main one are given no signals, so there
    nothing changes.

    Yields:
        A function that raises :class:`Stopped` again if it was raised and somebody has swallowed it.
    """
    asked: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        raise Stopped(number)

    def check() -> None:
        if asked:
            raise Stopped(asked[0])

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, end)
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Have signals that come inside act when it ends, around compiled code that cannot bear what a handler raises.

    Handlers that are set inside are gone afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    handlers = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            number, frame = came[0]
            handlers[number](number, frame)
