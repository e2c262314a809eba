"""EM, error-minimising noise: training images that look learned already, so that nothing is left to learn from them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.dataset import Dataset, Split, grey_levels
from bench.errors import ConfigError
from bench.numerics import tf32
from bench.protection import check_share, fitting, merge, protected_rows
from bench.protocols import Job, Stage
from bench.ranges import Count, Positive
from bench.registry import defenses
from bench.threat import Norm
from bench.training import Recipe, TrainingState, frozen, seeded
from defenses.levels import moved, whole_levels
from defenses.surrogate import check_network, surrogate, surrogate_job

CHUNK = 512  # images that are judged at a time
CLIP = 5.0   # the largest norm of a training step's gradient, as released

By = Literal["sample", "class"]


@defenses("em")
@dataclass(frozen=True, kw_only=True)
class ErrorMinimising:
    """Add the noise in the linf ball that makes the training loss of a network of the defender's own small.

    Network and noise take turns: ``train_steps`` training steps on noisy batches, then, over all images, ``steps``
    steps down the sign of the loss's gradient, of size ``rel_step * eps``. This ends when at most ``stop_error`` of the
    noisy images are misclassified, as they would be released, or after ``rounds`` turns; that limit is ours.

    ``by`` says who has noise of its own: each ``sample`` (sample-wise), or each ``class`` (class-wise). Noise of a
    class becomes, batch by batch, the mean of what its samples make of it. ``steps`` and ``stop_error`` are the
    published ones unless given: 20 and 0.01 for samples, 1 and 0.1 for classes.

    ``network`` is an untrained one by name: ``cnn`` for images below 16 pixels and else ``resnet18``, unless given. It
    is trained without augmentation, at a constant learning rate and otherwise by the data set's recipe. ``share`` is
    the part of the training images to protect; the network sees no others. Noise is rounded to whole grey levels.
    A turn costs ``train_steps`` batches and ``steps`` epochs of forward and backward passes.

    Source:
        Huang et al., ICLR 2021, arXiv:2101.04898, section 3.2, and the released ``perturbation.py``.

    Raises:
        ConfigError: an eps below one grey level or above 1, a share outside (0, 1], a network that is trained already,
            or a number of turns or steps below 1.
    """

    eps: float = 8 / 255
    by: By = "sample"
    rounds: int = 100
    train_steps: int = 10
    steps: int | None = None
    rel_step: float = 0.1
    stop_error: float | None = None
    network: str | None = None
    batch_size: Count | None = None
    lr: Positive | None = None
    share: float = 1.0

    stage: ClassVar[Stage] = "data"
    norm: ClassVar[Norm] = "linf"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Huang et al., ICLR 2021, arXiv:2101.04898"

    def __post_init__(self) -> None:
        whole_levels(self.eps)
        check_share(self.share)
        check_network(self.network)
        for name, value in {"rounds": self.rounds, "train_steps": self.train_steps, "steps": self.steps}.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; take at least one")
        if not 0 < self.rel_step < math.inf:
            raise ConfigError(f"rel_step is {self.rel_step}; it is a positive share of eps")
        if self.stop_error is not None and not 0 <= self.stop_error <= 1:
            raise ConfigError(f"stop_error is {self.stop_error}; it is a share of the images, from 0 to 1")

    def __call__(self, data: Dataset, job: Job) -> Split:
        """The training split to release, uint8; the network's weights and batches are drawn from ``job.seed``."""
        rows = protected_rows(data.train, self.share, job)
        images = Split(grey_levels(data.train)[rows], data.train.labels[rows]).to(job.device)
        own = surrogate_job(job)
        model = surrogate(data, self.network, own)
        recipe = Recipe.for_dataset(data, batch_size=self.batch_size, lr=self.lr)
        with seeded(own), tf32():
            noise = self.minimise(model, images, len(data.classes), recipe, own)
        return merge(data.train, rows, with_noise(images, noise, torch.arange(len(images), device=noise.device)))

    def minimise(self, model: nn.Module, images: Split, classes: int, recipe: Recipe, job: Job) -> Tensor:
        """The noise (N, C, H, W) on the pixel scale of each of ``images``, for which ``model`` is trained in place."""
        sample_wise = self.by == "sample"
        radius = whole_levels(self.eps) / 255
        stop = (0.01 if sample_wise else 0.1) if self.stop_error is None else self.stop_error
        optimizer = recipe.build_optimizer(model.parameters())
        owner = torch.arange(len(images), device=job.device) if sample_wise else images.labels
        noise = torch.zeros(len(images) if sample_wise else classes, *images.shape, device=job.device)
        batches = shuffled(len(images), recipe.batch_size, job)
        state, before = TrainingState(job, model, optimizer), 0
        if (kept := state.resume("turn")) is not None:
            before, noise = kept["turns"], kept["noise"].to(job.device)
            for _ in range(before * self.train_steps):
                next(batches)
        for done in range(before + 1, self.rounds + 1):
            model.train()
            for _ in range(self.train_steps):
                rows = next(batches)
                x = (images.pixels(rows) + noise[owner[rows]]).clamp(0, 1)
                optimizer.zero_grad()
                F.cross_entropy(model(x), images.labels[rows]).backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
            for rows in torch.arange(len(images), device=job.device).split(recipe.batch_size):
                lower = self.descend(model, images.pixels(rows), images.labels[rows], noise[owner[rows]], radius)
                noise = means_by(owner[rows], lower, noise) if self.by == "class" else noise.index_copy_(0, rows, lower)
            job.progress(done, self.rounds)
            released = Split(with_noise(images, noise, owner), images.labels)
            if error(model, released) <= stop:
                break
            if job.scratch.due():
                state.save("turn", turns=done, noise=noise)
        return noise[owner]

    def descend(self, model: nn.Module, x: Tensor, y: Tensor, noise: Tensor, radius: float) -> Tensor:
        """``noise`` (B, C, H, W) after its steps down the loss of ``model``; the box binds the image, not the noise."""
        with frozen(model):
            for _ in range(self.steps or (20 if self.by == "sample" else 1)):
                x_adv = (x + noise).clamp(0, 1).requires_grad_(True)
                loss = F.cross_entropy(model(x_adv), y, reduction="sum")  # a sum keeps the samples independent
                (gradient,) = torch.autograd.grad(loss, x_adv)
                noise = (noise - self.rel_step * radius * gradient.sign()).clamp(-radius, radius)
        return noise


def shuffled(count: int, batch_size: int, job: Job) -> Iterator[Tensor]:
    """The rows 0 .. count - 1 in random batches of nearly equal size, epoch after epoch without end."""
    shuffle = torch.Generator().manual_seed(job.seed)
    while True:
        order = torch.randperm(count, generator=shuffle).to(job.device)
        yield from order.tensor_split(math.ceil(count / batch_size))


def with_noise(images: Split, noise: Tensor, owner: Tensor) -> Tensor:
    """``images`` in whole grey levels with the ``noise`` (K, C, H, W) of the ``owner`` (N,) of each."""
    parts = torch.arange(len(images), device=owner.device).split(fitting(CHUNK, images.shape))
    return torch.cat([moved(images.images[rows], 255 * noise[owner[rows]]) for rows in parts])


def means_by(owner: Tensor, values: Tensor, default: Tensor) -> Tensor:
    """The mean of those of ``values`` (B, ...) that each ``owner`` (B,) has, and ``default`` (K, ...) without any."""
    counts = torch.zeros(len(default), device=default.device).index_add_(0, owner, torch.ones_like(owner).float())
    counts = counts.view(-1, *[1] * (default.ndim - 1))
    sums = torch.zeros_like(default).index_add_(0, owner, values)
    return torch.where(counts > 0, sums / counts.clamp(min=1), default)


@torch.no_grad()
def error(model: nn.Module, images: Split) -> float:
    """The share of ``images`` that ``model`` misclassifies in eval mode."""
    with frozen(model):
        parts = torch.arange(len(images), device=images.labels.device).split(fitting(CHUNK, images.shape))
        wrong = [(model(images.pixels(rows)).argmax(1) != images.labels[rows]).sum() for rows in parts]
    return float(torch.stack(wrong).sum()) / len(images)
