"""Tiny problems on which components are tried: a network that nobody trains, and a handful of digits."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.models.pretrained import Pretrained
from bench.registry import datasets, models

SAMPLES, SHAPE, CLASSES = 12, (3, 15, 15), 6  # what attacks meet
DIGITS = 120  # in each split of what everything else meets


def network() -> nn.Module:
    """The network that attacks meet, always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(392, CLASSES)]
        return nn.Sequential(*layers).eval()


def images() -> tuple[Tensor, Tensor]:
    """Random images and the classes that :func:`network` gives them, so that all are right when clean."""
    x = torch.rand(SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, network()(x).argmax(1)


def others() -> Dataset:
    """Images like :func:`images`, with no class that means anything, for attacks that are fitted."""
    x = torch.rand(2 * SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(2))
    split = Split(x, torch.arange(len(x)) % CLASSES)
    nothing = split.subset(slice(0))
    return Dataset("others", tuple(map(str, range(CLASSES))), split, nothing, nothing)


@cache
def _digits() -> Dataset:
    whole = datasets.create("digits")(None)
    splits = {part: getattr(whole, part).subset(slice(DIGITS)) for part in ("train", "calibration", "test")}
    return Dataset("small digits", whole.classes, **splits)


def digits() -> Dataset:
    """A few digits, in memory of their own."""
    data = _digits()
    return Dataset(data.name, data.classes, data.train.clone(), data.calibration.clone(), data.test.clone())


def build() -> nn.Module:
    """A network for :func:`digits`, whose weights come from torch's global generator."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def built(seed: int = 0) -> nn.Module:
    """The network of :func:`build` with the weights of ``seed``, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


def pretrained() -> Pretrained:
    """What learners start from that name a source: the network of :func:`build` as another seed has it."""
    return Pretrained("it", built(seed=1).state_dict(), frozenset({"4.weight", "4.bias"}))


def to_train(component: Any, data: Dataset | None = None) -> tuple[Callable[[], nn.Module], Dataset]:
    """The network and the digits, or other ``data``, that ``component`` can train: two classes where it takes no more,
    and the one model that it trains.
    """
    data = digits() if data is None else data
    try:
        getattr(component, "check", lambda classes, shape: None)(len(data.classes), data.train.shape)
    except ConfigError:
        data = data.restricted(data.classes[:2])
    only, classes, shape = getattr(component, "trains", ""), len(data.classes), data.train.shape
    return (lambda: models.create(only)(classes, shape, None)) if only else build, data
