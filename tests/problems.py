"""Small classifiers whose answers are known in closed form, and the pieces that tests build batches from."""

from typing import Any

import torch
from torch import Tensor, nn

from bench.oracle import Oracle
from bench.rng import SampleRng
from bench.served import ServedModel
from bench.threat import Access, Norm, Threat


class Linear(nn.Module):
    """Logits linear in the pixels, in float64: no rounding of kernels decides anything."""

    def __init__(self, shape: tuple[int, int, int] = (3, 8, 8), classes: int = 2, seed: int = 0) -> None:
        super().__init__()
        size = shape[0] * shape[1] * shape[2]
        weight = torch.randn(classes, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


class Noisy(nn.Module):
    """Gaussian noise on the logits of another model, keyed by sample and query."""

    def __init__(self, model: nn.Module, sigma: float = 1.0) -> None:
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, x: Tensor, rng: SampleRng) -> Tensor:
        logits = self.model(x)
        return logits + self.sigma * rng.normal(logits.shape[1]).to(logits)


class Scripted(nn.Module):
    """Right until its ``wrong_at``-th forward pass, wrong in that pass and after; two classes, true class 0."""

    def __init__(self, wrong_at: float) -> None:
        super().__init__()
        self.wrong_at, self.passes = wrong_at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        right = 1.0 if self.passes < self.wrong_at else -1.0
        flat = x.flatten(1).sum(dim=1) * 0  # keeps a graph
        return torch.stack((flat + right, flat), dim=1)


def images(n: int, shape: tuple[int, int, int] = (3, 8, 8), seed: int = 1) -> Tensor:
    """(n, *shape) float64, uniform on [0.2, 0.8], away from the box."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, *shape, dtype=torch.float64, generator=generator) * 0.6 + 0.2


def referee(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    eps: float = 0.05,
    access: Access = "scores",
    budget: int = 50,
    seed: int = 0,
    ids: Tensor | None = None,
    random: bool = False,
    **settings: Any,
) -> Oracle:
    """An oracle over ``model`` for the batch ``x``, ``y``."""
    ids = torch.arange(len(x)) if ids is None else ids
    threat = Threat(norm, eps, access, budget)
    return Oracle(ServedModel(model, random), x, y, threat, SampleRng.create(seed, ids, "defense"), **settings)


def attack_with(attack: Any, oracle: Oracle, x: Tensor, y: Tensor, seed: int = 0, ids: Tensor | None = None) -> Tensor:
    """Run ``attack`` through ``oracle`` and return the final examples."""
    ids = torch.arange(len(x)) if ids is None else ids
    stream = SampleRng.create(seed, ids, "attack")
    return oracle.finish(attack(oracle, x.clone(), y, oracle._threat, stream))
