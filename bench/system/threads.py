"""How many threads compute: a fixed number where weights come of it, elsewhere what the machine has to spare.

Sums are split over threads, so a network that was trained with two differs from one that was trained with one (by up to
half a unit of margin), on any machine. Two waiting threads that sleep cost no more than one; spinning, as OpenMP has it
by default, cost six times as much on a busy machine. So they sleep (``bench/__init__.py``).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bench.system.processors import processors

TRAINING = 2  # of every training and data defense; other numbers train other networks under the same keys


@contextmanager
def training_threads() -> Iterator[None]:
    """Compute with ``TRAINING`` threads inside, whatever the machine has, and afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(TRAINING)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def use_spare_threads() -> int:
    """Compute with as many threads as there are idle processors for this process, and say how many.

    Somebody who sets ``OMP_NUM_THREADS`` is obeyed.
    """
    if not asked_threads():
        torch.set_num_threads(spare(processors(), torch.get_num_threads(), os.cpu_count() or 1, _load()))
    return torch.get_num_threads()


def asked_threads() -> int:
    """What somebody has set ``OMP_NUM_THREADS`` to, 0 where nobody has."""
    return torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 0


def idle_processors() -> int:
    """How many workers with one thread each find a processor; to be asked before threads are set."""
    machine = os.cpu_count() or 1
    return spare(processors(), machine if asked_threads() else torch.get_num_threads(), machine, _load())


def spare(allowed: float, cores: int, machine: int, load: float) -> int:
    """How many threads find a processor: at most those ``allowed`` and one for each of ``cores``, and at least one.

    Args:
        allowed: processors that this process may use, in parts where it has a share of their time.
        machine: processors of the whole machine, of which ``load`` are busy.
    """
    return max(1, round(min(allowed, cores, machine - load)))


def _load() -> float:
    try:
        return os.getloadavg()[0]
    except OSError:  # not known here
        return 0.0
