"""What a component does to the process ends with its cell."""

import os
import random
import signal
import sys
import warnings

import numpy as np
import pytest
import torch

from bench.system.process_state import PRINTED, undisturbed


def swallowing(*arguments):
    pass


CHANGES = {
    "working directory": (os.getcwd, lambda: os.chdir("/")),
    "environment": (lambda: dict(os.environ), lambda: os.environ.update(SOMETHING="new", PATH="")),
    "import path": (lambda: list(sys.path), lambda: sys.path.insert(0, "elsewhere")),
    "signal handler": (lambda: signal.getsignal(signal.SIGTERM), lambda: signal.signal(signal.SIGTERM, swallowing)),
    "warning filters": (lambda: list(warnings.filters), lambda: warnings.simplefilter("ignore")),
    "python's generator": (random.getstate, lambda: random.seed(3)),
    "numpy's generator": (lambda: np.random.get_state()[1].tolist(), lambda: np.random.seed(3)),  # noqa: NPY002 - the shared one
    "numpy's errors": (np.geterr, lambda: np.seterr(all="raise")),
    "torch's generator": (lambda: torch.get_rng_state().tolist(), lambda: torch.manual_seed(3)),
    "default dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "default device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "threads": (torch.get_num_threads, lambda: torch.set_num_threads(3)),
    "gradient mode": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(False)),
    "anomaly mode": (torch.is_anomaly_enabled, lambda: torch.set_anomaly_enabled(True)),
    "determinism": (torch.are_deterministic_algorithms_enabled, lambda: torch.use_deterministic_algorithms(True)),
    "precision": (torch.get_float32_matmul_precision, lambda: torch.set_float32_matmul_precision("high")),
    "kernels": (
        lambda: torch.backends.cudnn.deterministic, lambda: setattr(torch.backends.cudnn, "deterministic", True)
    ),
    "output": (lambda: sys.stdout, lambda: setattr(sys, "stdout", None)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_afterwards_as_it_was(name):
    read, change = CHANGES[name]
    before = read()
    with undisturbed():
        change()
        assert read() != before
    assert read() == before


def test_it_is_as_it_was_after_an_error_too():
    def leave():
        torch.set_default_dtype(torch.float64)
        sys.exit(0)

    with pytest.raises(SystemExit), undisturbed():
        leave()
    assert torch.get_default_dtype() == torch.float32


def test_a_little_that_is_printed_is_shown_beside_the_tables_and_much_is_cut(capsys):
    with undisturbed():
        print("hello")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "hello\n")
    with undisturbed():
        print("x" * 1_000_000)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err) < PRINTED + 100
    assert shown.err.endswith("\n(990,001 more printed characters are not shown)\n")


def test_a_folder_that_is_gone_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with undisturbed():
        os.chdir("/")
