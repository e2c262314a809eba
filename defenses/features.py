"""Where a network has its features: the input of the last linear layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.errors import ConfigError


def last_linear(model: nn.Module, x: Tensor) -> nn.Linear:
    """The linear layer whose output are the logits of ``model``.

    Found by running ``x`` (B, C, H, W) through it; where B is 0, it is taken to be the last linear layer defined.

    Raises:
        ConfigError: there is none: something comes after it, or the classifier is no ``nn.Linear`` of one vector.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers, why = list(names), "it has none"
    if len(x) and layers:
        outputs: list[tuple[nn.Linear, Tensor, Tensor]] = []

        def record(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            assert isinstance(layer, nn.Linear)
            outputs.append((layer, inputs[0], output))

        handles = [layer.register_forward_hook(record) for layer in layers]
        try:
            with torch.no_grad():
                logits: Tensor = model(x)
        finally:
            for handle in handles:
                handle.remove()
        calls = [layer for layer, _, _ in outputs]
        if calls:
            edited = "gives something else, which is made into the logits afterwards"
            fault = "runs more than once" if calls.count(calls[-1]) > 1 else edited
            why = f"the last one, {names[calls[-1]]!r}, {fault}"
        layers = [
            layer for layer, given, output in outputs
            if given.ndim == 2 and torch.equal(output.to(logits), logits) and calls.count(layer) == 1
        ]  # fmt: skip
    if not layers:
        raise ConfigError(
            "features are the input of the nn.Linear whose output are the logits; this network cannot be split there: "
            f"{why}; use a network that ends in nn.Linear"
        )
    return layers[-1]


@contextmanager
def features_of(head: nn.Linear) -> Iterator[list[Tensor]]:
    """A list of what ``head`` is given while it is open."""
    seen: list[Tensor] = []
    with head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        yield seen
