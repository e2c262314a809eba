"""UEraser: train on the worst of several strong augmentations, which wash additive shortcuts out."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from attacks.learners.operations import TRIVIAL, operate
from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.norms import per_sample
from bench.protocols import Job
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access
from bench.training import Perturb, Trainer


@attacks("ueraser")
@dataclass(frozen=True, kw_only=True)
class UEraser(Trainer):
    """Train on that of ``draws`` augmentations of each image which the network gets most wrong.

    An augmentation is plasma brightness, plasma contrast, a shuffle of the channels, and one operation of
    TrivialAugment. The loss of every draw is taken in one forward pass, in training mode, that leaves the running
    statistics alone; the step is taken on the winners. The variant with JPEG in each step is left out: it waits for the
    host at every image.

    Args:
        worst_epochs: epochs that take the worst of the draws; the later ones take a single draw. ``None`` is all
            (UEraser-max), 0 none (UEraser-lite).
        plasma: with which probability brightness and contrast act, each. One half is that of the released code; one is
            stronger.

    Source:
        Qin et al., 2023, arXiv:2303.15127; roughness and intensity as in its released ``ueraser.py``.
    """

    draws: int = 5
    worst_epochs: int | None = None
    plasma: float = 0.5

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Qin et al., 2023, arXiv:2303.15127"

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ConfigError(f"draws is {self.draws}; take at least one augmentation")
        if self.worst_epochs is not None and self.worst_epochs < 0:
            raise ConfigError(f"worst_epochs is {self.worst_epochs}; it is a number of epochs, zero or more")
        if not 0 <= self.plasma <= 1:
            raise ConfigError(f"plasma is {self.plasma}; a probability is from 0 to 1")

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        return self.train(build, data, job, perturb_at=self.perturb_at)

    def perturb_at(self, epoch: int) -> Perturb:
        """:meth:`perturb` with the draws that belong to ``epoch``."""
        worst = self.worst_epochs is None or epoch < self.worst_epochs
        return partial(self.perturb, draws=self.draws if worst else 1)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng, draws: int) -> Tensor:
        """The augmentation (B, C, H, W) of highest cross-entropy among ``draws``; ``model`` is left as it was."""
        streams = SampleRng(torch.cat([rng.fork(draw).keys for draw in range(draws)]), rng.owners.repeat(draws))
        tries = self.augment(x.repeat(draws, 1, 1, 1), streams)  # (draws * B, C, H, W)
        if draws == 1:
            return tries
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # batch-norm writes into these
        with torch.no_grad():
            logits = functional_call(model, buffers, (tries,))
            worst = F.cross_entropy(logits, y.repeat(draws), reduction="none").view(draws, -1).argmax(dim=0)
        return tries[worst * len(x) + torch.arange(len(x), device=x.device)]

    def augment(self, x: Tensor, rng: SampleRng) -> Tensor:
        """One augmentation of each image (B, C, H, W) in [0, 1], whole grey levels."""
        x = plasma_brightness(x, self.plasma, rng.fork("brightness"))
        x = plasma_contrast(x, self.plasma, rng.fork("contrast"))
        order = rng.fork("order").uniform(x.shape[1]).argsort(dim=1)  # (B, C)
        shuffled = x[torch.arange(len(x), device=x.device)[:, None], order]
        x = torch.where(per_sample(rng.fork("shuffle").coins()), shuffled, x)
        trivial = rng.fork("trivial")
        return operate(x, trivial.fork("operation").integers(TRIVIAL), trivial.fork("level").uniform(), trivial)


def plasma_brightness(x: Tensor, probability: float, rng: SampleRng) -> Tensor:
    """``x`` (B, C, H, W), with ``probability`` brighter and darker by a plasma field times 0.5 to 1, clamped."""
    intensity = 0.5 + 0.5 * rng.fork("intensity").uniform()
    return _with(probability, x, x + per_sample(intensity) * (2 * plasma(x, rng) - 1), rng)


def plasma_contrast(x: Tensor, probability: float, rng: SampleRng) -> Tensor:
    """``x`` (B, C, H, W), with ``probability`` its distance from 0.5 times 4 times a plasma field, clamped."""
    return _with(probability, x, (x - 0.5) * 4 * plasma(x, rng) + 0.5, rng)


def plasma(x: Tensor, rng: SampleRng) -> Tensor:
    """Fractal noise like ``x`` (B, C, H, W), in [0, 1], by the diamond-square method.

    A coarse grid of uniform values, at least three points a side, is doubled until it covers the image. New points are
    the mean of their neighbours (of four on the diagonals, then of up to four on the axes), blended with new uniform
    values; the weight of those is multiplied by the roughness, 0.3 to 0.7 for each sample, before each doubling.

    Source:
        Fournier et al., 1982, doi:10.1145/358523.358553, with the blend that kornia 0.6 has.
    """
    channels, height, width = x.shape[1:]
    roughness = per_sample(0.3 + 0.4 * rng.fork("roughness").uniform())
    doublings = max(0, math.ceil(math.log2(max(1, min(height, width) - 1))) - 1)
    rows, columns = (max(3, math.ceil((size - 1) / 2**doublings) + 1) for size in (height, width))
    field = rng.fork("seed").uniform(channels, rows, columns)
    weight = torch.ones_like(roughness)
    for doubling in range(doublings):
        weight = weight * roughness
        field = _doubled(field, weight, rng.fork(doubling))
    return field[:, :, :height, :width]


def _doubled(field: Tensor, weight: Tensor, rng: SampleRng) -> Tensor:
    """(B, C, R, S) as (B, C, 2 R - 1, 2 S - 1), old values at the even places."""
    channels, rows, columns = field.shape[1:]
    noise = rng.uniform(channels, 2 * rows - 1, 2 * columns - 1)
    fine = torch.zeros_like(noise)
    fine[:, :, ::2, ::2] = field
    centres = F.avg_pool2d(field, 2, stride=1)
    fine[:, :, 1::2, 1::2] = torch.lerp(centres, noise[:, :, 1::2, 1::2], weight)
    edges = torch.lerp(_around(fine) / _around(torch.ones_like(fine[:1, :1])), noise, weight)
    fine[:, :, ::2, 1::2] = edges[:, :, ::2, 1::2]
    fine[:, :, 1::2, ::2] = edges[:, :, 1::2, ::2]
    return fine


def _around(x: Tensor) -> Tensor:
    """The sum of the neighbours of each point on the axes: three at the border, else four."""
    padded = F.pad(x, (1, 1, 1, 1))
    return padded[:, :, :-2, 1:-1] + padded[:, :, 2:, 1:-1] + padded[:, :, 1:-1, :-2] + padded[:, :, 1:-1, 2:]


def _with(probability: float, x: Tensor, changed: Tensor, rng: SampleRng) -> Tensor:
    return torch.where(per_sample(rng.fork("acts").uniform() < probability), changed.clamp(0, 1), x)
