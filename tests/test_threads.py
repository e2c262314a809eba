"""Weights do not depend on the machine's threads, and threads do not fight over processors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attacks.learners.standard import Standard
from bench.dataset import Split
from bench.measure.pipeline import Pipeline
from bench.models import resolve
from bench.system.threads import TRAINING, spare, training_threads, use_spare_threads
from tests.test_runner import grid

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("allowed", "cores", "machine", "load", "threads"),
    [
        (8, 8, 8, 0.1, 8),      # idle
        (8, 4, 8, 0.1, 4),      # one for each core, whatever hyper-threads there are
        (8, 8, 8, 5.2, 3),      # busy
        (2, 2, 2, 14.0, 1),     # overloaded
        (1.5, 64, 64, 3.0, 2),  # a container with a quota
        (0.2, 64, 64, 3.0, 1),
        (4, 64, 64, 30.0, 4),   # bound to four processors of a half-busy machine
    ],
)  # fmt: skip
def test_there_are_as_many_threads_as_idle_processors(allowed, cores, machine, load, threads):
    assert spare(allowed, cores, machine, load) == threads


def test_somebody_who_sets_the_number_is_obeyed(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert use_spare_threads() == torch.get_num_threads() == 1


def test_every_training_has_the_same_number_of_threads(tmp_path):
    seen = []

    def progress(done, total):
        seen.append(torch.get_num_threads())

    (task,) = grid(attack=["standard(epochs=1)"])
    with Pipeline(tmp_path, torch.device("cpu"), 256).learning(task, progress) as job:
        few = Split(task.data.train.images[:128], task.data.train.labels[:128])
        Standard(epochs=1)(lambda: resolve("cnn(width=4)")(10, (1, 8, 8), None), task.data.released(few), job)
    assert seen == [TRAINING]
    assert torch.get_num_threads() == 1


def test_threads_are_as_they_were_after_an_error():
    with pytest.raises(ZeroDivisionError), training_threads():
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_that_wait_sleep_unless_somebody_wants_them_to_spin(given):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    code = "import os, bench; print(os.environ['OMP_WAIT_POLICY'])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert run.stdout.strip() == (given or "PASSIVE")
