"""Work on all processors comes to what one would have made of it, whatever happens to the others."""

import os
import signal
from multiprocessing.connection import Connection

import pytest

from bench.system.interrupt import Stopped, stoppable
from bench.system.spread import spread

HERE = os.getpid()


def test_answers_come_in_the_order_of_what_was_asked():
    assert spread(lambda number: number**2, range(101), processes=3) == [number**2 for number in range(101)]


def test_they_are_worked_out_in_other_processes():
    assert os.getpid() not in spread(lambda _: os.getpid(), range(4), processes=2)


@pytest.mark.parametrize("end", [lambda: os._exit(0), lambda: os.kill(os.getpid(), signal.SIGKILL)])
def test_what_a_process_did_not_answer_is_worked_out_here(end):
    here = os.getpid()

    def answer(number):
        if number == 40 and os.getpid() != here:
            end()
        return number

    assert spread(answer, range(60), processes=2) == list(range(60))


class Odd(Exception):
    """Cannot be made again from its message alone, as unpickling does."""

    def __init__(self, one, other):
        super().__init__(one)


def test_an_answer_that_does_not_travel_is_worked_out_here():
    assert [type(answer) for answer in spread(lambda _: Odd(1, 2), range(4), processes=2)] == [Odd] * 4


def test_a_message_that_ends_in_the_middle_is_no_failure(monkeypatch):
    here, whole = os.getpid(), Connection._send

    def half(self, buffer, *more):
        if os.getpid() != here and len(buffer) > 1000:
            whole(self, buffer[:500], *more)
            os._exit(0)
        whole(self, buffer, *more)

    monkeypatch.setattr(Connection, "_send", half)
    assert spread(lambda number: bytes(2000 + number), range(4), processes=2) == [bytes(2000 + n) for n in range(4)]


def test_where_no_process_can_begin_the_others_do_all(monkeypatch):
    fork, begun = os.fork, []

    def at_most_one():
        if begun:
            raise BlockingIOError
        begun.append(1)
        return fork()

    monkeypatch.setattr(os, "fork", at_most_one)
    assert spread(lambda number: number, range(9), processes=3) == list(range(9))


def test_a_signal_that_comes_while_processes_begin_ends_them_all_and_is_raised_here_alone(monkeypatch, tmp_path):
    fork, begun = os.fork, []

    def interrupted():
        begun.append(fork())
        os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does to both
        return begun[-1]

    monkeypatch.setattr(os, "fork", interrupted)

    def asked():
        try:
            spread(lambda number: number, range(4), processes=2)
        finally:
            if os.getpid() != HERE:
                os._exit(1)

    with pytest.raises(Stopped), stoppable():
        asked()
    assert len(begun) == 2
    for process in begun:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_an_error_is_raised_as_if_there_were_one_process():
    with pytest.raises(ZeroDivisionError):
        spread(lambda number: 1 / number, range(3), processes=2)


def test_few_things_begin_no_process():
    assert set(spread(lambda _: os.getpid(), range(5))) == {os.getpid()}


def test_nothing_is_left_running():
    for process in set(spread(lambda _: os.getpid(), range(4), processes=2)):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
