"""A job that is asked to end, and one that only looks like it."""

import os
import signal
from contextlib import suppress

import pytest

from bench.system.interrupt import SIGNALS, Stopped, deferred, stoppable


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_and_is_as_it_was_afterwards(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, stoppable():
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) == before


def test_a_signal_that_somebody_swallows_is_remembered():
    with stoppable() as check:
        check()
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            check()


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_can_be_put_off_until_compiled_code_has_returned():
    done = []

    def compiled():
        with deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("all of it")
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), stoppable():
        compiled()
    assert done
    assert signal.getsignal(signal.SIGTERM) == before
