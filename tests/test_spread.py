"""Work on all processors comes to what one would have made of it, whatever happens to the others."""

import os
import signal

import pytest

from bench.system.spread import spread


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


def test_an_error_is_raised_as_if_there_were_one_process():
    with pytest.raises(ZeroDivisionError):
        spread(lambda number: 1 / number, range(3), processes=2)


def test_few_things_begin_no_process():
    assert set(spread(lambda _: os.getpid(), range(5))) == {os.getpid()}


def test_nothing_is_left_running():
    for process in set(spread(lambda _: os.getpid(), range(4), processes=2)):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
