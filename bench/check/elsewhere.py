"""A component in another process: pickled there, made anew there, and asked the same."""

import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor

from bench.check.subject import Subject
from bench.check.subject import subject as named
from bench.check.verdict import Broken, Rule, said
from bench.registry import load_plugins
from bench.spec import Spec

START = 180  # seconds until the other process is there, which on a busy machine takes a while
SECONDS = 60  # and from then on, until it has answered
CLOSE = 1e-3  # what another process may move a number by

Trial = Callable[[Subject], Tensor]


def rule(trial: Trial) -> Rule[Subject]:
    """Pickled, and made anew, in a process of its own, a component gives what it gives here: ``trial`` says what."""
    return partial(_same_elsewhere, trial)


def _same_elsewhere(trial: Trial, subject: Subject) -> str:
    try:
        parcel = pickle.dumps(subject)
    except Exception as error:
        raise Broken(
            f"cannot be pickled: {said(error)}",
            "keep no lambda, local function, open file or lock in it; use functions of the module",
        ) from error
    here = trial(subject)
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    try:
        pool.submit(load_plugins).result(timeout=START)
        asked = pool.submit(_there, str(subject.spec), trial, parcel, torch.get_num_threads())
        unpickled, anew = asked.result(timeout=SECONDS)
    except BrokenProcessPool as error:
        raise Broken("ends the process that it runs in", "let it raise an error instead of exiting") from error
    except TimeoutError as error:
        raise Broken(f"has no answer in another process after {SECONDS} s", "start no process or lock in it") from error
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
    for what, there in (("unpickled", unpickled), ("made anew", anew)):
        if isinstance(there, str):
            raise Broken(f"{what} in another process, it fails: {there}", "let it need nothing but its parameters")
        if there.shape != here.shape or not torch.allclose(there.double(), here.double(), atol=CLOSE, equal_nan=True):
            raise Broken(
                f"{what} in another process, it gives another result",
                "order no set, use no hash() or id(), and draw from the streams alone",
            )
    return "the same, pickled and made anew"


def _there(spec: str, trial: Trial, parcel: bytes, threads: int) -> tuple[Tensor | str, Tensor | str]:
    """What ``trial`` gives of the component as it comes out of the ``parcel``, and as it is made by its ``spec``."""
    torch.set_num_threads(threads)
    found = named(Spec.parse(spec))  # loads the user's file, which unpickling needs
    return _tried(lambda: trial(pickle.loads(parcel))), _tried(lambda: trial(found))


def _tried(give: Callable[[], Tensor]) -> Tensor | str:
    try:
        return give()
    except (Exception, SystemExit) as error:
        return said(error)
