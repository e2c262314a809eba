"""Small classifiers whose answers are known in closed form, and the pieces that tests build batches from."""

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from bench.losses import margin
from bench.oracle import Referee, Rules
from bench.oracle.served import ServedModel
from bench.rng import SampleRng
from bench.rules import rules_of
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


class Recorded(nn.Module):
    """Every query that a model was asked, in order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x)
        return self.model(x)


def curved(shape: tuple[int, int, int] = (1, 5, 5)) -> nn.Module:
    """A small network of four classes with curved boundaries, in float64; always the same one."""
    torch.manual_seed(0)
    size = math.prod(shape)
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 24), nn.Tanh(), nn.Linear(24, 4)).double().eval()


def images(n: int, shape: tuple[int, int, int] = (3, 8, 8), seed: int = 1) -> Tensor:
    """(n, *shape) float64, uniform on [0.2, 0.8], away from the box."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, *shape, dtype=torch.float64, generator=generator) * 0.6 + 0.2


def linear_problem(
    n: int = 4, shape: tuple[int, int, int] = (1, 4, 4), norm: Norm = "linf"
) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Images near the middle of the box, whose sides are far from the boundary of the classes, and their distances."""
    model = Linear(shape)
    w = model.weight[0] - model.weight[1]
    sides = torch.tensor([1, -1] * (n // 2)).view(n, 1, 1, 1)
    x = 0.5 + (images(n, shape) - 0.5) / 6 + 0.05 * sides * w.sign().view(shape)
    y = model(x).argmax(1)
    return model, x, y, margin(model(x), y) / w.norm(p={"linf": 1, "l2": 2}[norm])  # over the dual norm


class Bench(Referee):
    """A referee with the questions that it grants to attacks, in one hand."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["oracle"], name)


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
) -> "Bench":
    """A referee over ``model`` for the batch ``x``, ``y``; a rule may be given by its name."""
    named = {rule.name: settings.pop(rule.name) for rule in fields(Rules) if isinstance(settings.get(rule.name), bool)}
    if named:
        settings["rules"] = Rules(**named)
    ids = torch.arange(len(x)) if ids is None else ids
    threat = Threat(norm, eps, access, budget)
    return Bench(ServedModel(model, random), x, y, threat, SampleRng.create(seed, ids, "defense"), **settings)


def asks_for(attack: Any, model: nn.Module) -> dict[str, Any]:
    """What a referee is told of ``attack``, whose undefended network is ``model``."""
    rules = rules_of(attack)
    return {"access": attack.access, "rules": rules, "surrogate": ServedModel(model) if rules.surrogate else None}


def attack_with(
    attack: Any, referee: Referee, x: Tensor, y: Tensor, seed: int = 0, ids: Tensor | None = None
) -> Tensor:
    """Run ``attack`` before ``referee`` and return the final examples."""
    ids = torch.arange(len(x)) if ids is None else ids
    stream = SampleRng.create(seed, ids, "attack")
    return referee.finish(attack(referee.oracle, x.clone(), y, referee.threat, stream))
