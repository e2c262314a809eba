"""What is seen of a served module beside its answers: its mode, its weights, and what it does to answer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bench.rng import global_generators


class Look(NamedTuple):
    """How many modules are in ``training`` mode, and a hash of each parameter and buffer."""

    training: int
    weights: tuple[str, ...]


def look(module: nn.Module) -> Look:
    """What ``module`` is now; see :class:`Look`."""
    tensors = (*module.parameters(), *module.buffers())
    return Look(sum(part.training for part in module.modules()), tuple(map(_hash, tensors)))


@contextmanager
def seeded(module: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
    """Every generator that ``module`` may draw from at ``seed``: torch's, NumPy's, Python's and torch ones of its own.

    The global ones go on afterwards as if nothing had been drawn.
    """
    own = [value for part in module.modules() for value in vars(part).values() if isinstance(value, torch.Generator)]
    with global_generators(seed, device):
        for generator in own:
            generator.manual_seed(seed)
        yield


@contextmanager
def optimisation() -> Iterator[list[str]]:
    """A list of the backward passes and optimiser steps that begin while it is open.

    ``torch.autograd.grad`` and every ``backward`` look up one function to run the engine, however they were imported.
    """
    seen: list[str] = []
    autograd = vars(torch.autograd)
    engine: Callable[..., Any] = autograd["_engine_run_backward"]

    def run(*args: Any, **kwargs: Any) -> Any:
        seen.append("backward")
        return engine(*args, **kwargs)

    hook = register_optimizer_step_pre_hook(lambda *_: seen.append("step"))
    autograd["_engine_run_backward"] = run
    try:
        yield seen
    finally:
        autograd["_engine_run_backward"] = engine
        hook.remove()


def _hash(value: Tensor) -> str:
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return sha256(raw.numpy().data).hexdigest()
