"""What defenses share that move training images along the gradients of one training run's own checkpoints."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import numerics
from bench.dataset import Dataset, Split, grey_levels
from bench.errors import ConfigError
from bench.protection import fitting, merge, protected_rows
from bench.protocols import Job
from bench.rng import SampleRng
from bench.training import Recipe, fit, small_images
from defenses.features import features_of
from defenses.levels import whole_levels
from defenses.surrogate import check_network, surrogate, surrogate_job

CHUNK = 500  # images that go through the networks at a time

ImageLoss = Callable[[Tensor, Tensor], Tensor]  # images (B, C, H, W) in [0, 1] and target classes (B,) to losses (B,)
# Grey levels (B, C, H, W), targets (B,) and streams, to the levels after each step.
Craft = Callable[[Tensor, Tensor, SampleRng], Iterator[Tensor]]


def check_training(network: str | None, epochs: int | None) -> None:
    """Whether a protecting network can be trained like this at all; ``None`` stands for the defaults.

    Raises:
        ConfigError: an unknown network, one that comes with its weights, or no epochs.
    """
    check_network(network)
    if epochs is not None and epochs < 1:
        raise ConfigError(f"epochs is {epochs}; the protecting network is trained for at least one")


def stepwise(data: Dataset, epochs: int | None, published: Mapping[str, Any]) -> Recipe:
    """A recipe with the ``published`` fields, stretched over ``epochs``; ``None`` stands for the published number.

    Images below 16 pixels are trained on as the data set suggests, since no published recipe suits them.
    """
    if small_images(data):
        return Recipe.for_dataset(data, epochs=epochs)
    return Recipe.for_dataset(data, **{**published, "epochs": epochs or published["epochs"]})


def train_checkpoints(
    data: Dataset, network: str | None, recipe: Recipe, job: Job, keep: Callable[[int, nn.Module], bool]
) -> list[nn.Module]:
    """The networks of one training run on clean ``data``, in fast numbers, after the epochs that ``keep`` wants.

    The run has a seed of its own, drawn from ``job.seed``: a learner with the seed of the job would start from the very
    weights of the protecting network, and see the images in its order. A run that goes on from ``job.scratch`` calls
    ``keep`` again with the networks that it had kept.

    Args:
        network: an untrained network by name; ``None`` is ``cnn`` for images below 16 pixels, else ``resnet18``.
        keep: called as ``keep(epoch, network)`` after each epoch, counted from 0, with the frozen network.
    """
    kept: dict[int, nn.Module] = {}

    def judge(model: nn.Module, epoch: int) -> None:
        frozen = numerics.fast(model, data.specimens(numerics.SPECIMENS).to(job.device)).module
        if keep(epoch, frozen):
            kept[epoch] = frozen

    def watch(model: nn.Module, epoch: int) -> None:
        judge(model, epoch)
        if epoch in kept:
            job.scratch.save(f"checkpoint-{epoch}", model.state_dict())

    own = replace(surrogate_job(job), watch=watch)
    earlier = surrogate(data, network, own)
    for epoch in range(recipe.epochs):
        if (weights := job.scratch.load(f"checkpoint-{epoch}")) is not None:
            earlier.load_state_dict(weights)
            judge(earlier.eval(), epoch)
    fit(surrogate(data, network, own), data, recipe, own)
    return [kept[epoch] for epoch in sorted(kept)]


def train_last(data: Dataset, network: str | None, recipe: Recipe, job: Job) -> nn.Module:
    """The network of :func:`train_checkpoints` after the last epoch alone."""
    last = recipe.epochs - 1
    (trained,) = train_checkpoints(data, network, recipe, job, lambda epoch, _: epoch == last)
    return trained


def select(length: int, count: int) -> list[int]:
    """``count`` positions in a list of ``length`` checkpoints, evenly spread and late rather than early.

    Every ``interval``-th, where ``interval = length // count``, from the first start that gives just ``count`` of them
    on the way down from ``interval``; below zero, it counts from the end of the list.

    Raises:
        ConfigError: fewer checkpoints than that.
    """
    if count > length:
        raise ConfigError(f"there are {length} checkpoints, but {count} are asked for; take fewer, or train for longer")
    interval, everything = length // count, list(range(length))
    starts = range(interval, -length - 1, -1)
    return next(chosen for start in starts if len(chosen := everything[start::interval]) == count)


def check_shift(shift: int, data: Dataset) -> None:
    """Whether the class ``shift`` after each, in a circle, is another one.

    Raises:
        ConfigError: it is not.
    """
    if shift % len(data.classes) == 0:
        raise ConfigError(
            f"shift is {shift} and {data.name} has {len(data.classes)} classes, so each is its own target; use another"
        )


def protect(
    data: Dataset, share: float, shift: int, eps: float, job: Job, craft: Craft, steps: int = 1
) -> Split:
    """The training split to release: ``share`` of its images as ``craft`` moves them, on the grid of grey levels.

    The target of an image is the class ``shift`` after its own, in a circle. What ``craft`` comes to after ``steps``
    steps is rounded to the nearest levels and must be inside the ball of ``eps``. ``job.progress`` hears of each step,
    ``job.scratch`` keeps what is moved already.
    """
    rows = protected_rows(data.train, share, job)
    chosen = Split(grey_levels(data.train)[rows], data.train.labels[rows]).to(job.device)
    streams = SampleRng.create(job.seed, rows.to(job.device), "protection")
    moved: list[Tensor] = []
    while (kept := job.scratch.load(f"moved-{len(moved)}")) is not None:
        moved += kept
    saved = len(moved)
    parts = torch.arange(len(rows), device=job.device).split(fitting(CHUNK, data.train.shape))
    for done, part in enumerate(parts[saved:], saved):
        crafted = levels = chosen.images[part].float()
        target = (chosen.labels[part] + shift) % len(data.classes)
        for step, after in enumerate(craft(levels, target, streams[part]), 1):
            crafted = after
            job.progress(done * steps + step, len(parts) * steps)
        assert ((crafted.round() - levels).abs() <= whole_levels(eps)).all(), "outside the ball"
        moved.append(crafted.round().to(torch.uint8).cpu())
        if job.scratch.due():
            job.scratch.save(f"moved-{saved}", moved[saved:])
            saved = len(moved)
    return merge(data.train, rows, torch.cat(moved))


@dataclass(frozen=True)
class LevelBox:
    """What pixels may be, in grey levels: ``low`` and ``high`` (B, C, H, W), whole numbers stored as floats."""

    low: Tensor
    high: Tensor

    @classmethod
    def around(cls, levels: Tensor, eps: float) -> "LevelBox":
        """The linf ball of ``eps`` (on the pixel scale) around ``levels``, cut to 0 .. 255."""
        radius = whole_levels(eps)
        return cls((levels - radius).clamp(min=0), (levels + radius).clamp(max=255))

    def project(self, levels: Tensor) -> Tensor:
        """The nearest point inside."""
        return torch.minimum(torch.maximum(levels, self.low), self.high)


def cross_entropy(network: nn.Module) -> ImageLoss:
    """The cross-entropy of each image with its target."""
    return lambda x, target: F.cross_entropy(network(x), target, reduction="none")


def feature_distance(network: nn.Module, head: nn.Linear, means: Tensor) -> ImageLoss:
    """The mean square between each image's features, the input of ``head``, and ``means`` (K, D) at its target."""

    def loss(x: Tensor, target: Tensor) -> Tensor:
        with features_of(head) as seen:
            network(x)
        return (seen[0].to(means.dtype) - means[target]).square().mean(dim=1)

    return loss


@torch.no_grad()
def class_means(network: nn.Module, head: nn.Linear, split: Split, classes: int) -> Tensor:
    """The mean features (K, D) of the images of each class, without augmentation; ``split`` lies on the device.

    Raises:
        ConfigError: a class without images.
    """
    counts = torch.bincount(split.labels, minlength=classes)
    if not counts.all():
        raise ConfigError(f"class {int(counts.argmin())} has no training images, so no mean feature; drop the class")
    sums = torch.zeros(classes, head.in_features, dtype=torch.float64, device=split.labels.device)
    chunk = fitting(CHUNK, split.shape)
    for start in range(0, len(split), chunk):
        rows = slice(start, start + chunk)
        with features_of(head) as seen:
            network(split.pixels(rows))
        sums.index_add_(0, split.labels[rows], seen[0].double())
    return (sums / counts[:, None]).to(head.weight.dtype)


def gradient(loss: ImageLoss, levels: Tensor, target: Tensor) -> Tensor:
    """The gradient (B, C, H, W) of each image's own loss by its pixels, at ``levels``."""
    x = (levels / 255).requires_grad_(True)
    (slope,) = torch.autograd.grad(loss(x, target).sum(), x)  # a sum keeps the images independent
    return slope


@torch.no_grad()
def recognised(networks: Sequence[nn.Module], levels: Tensor, labels: Tensor) -> Tensor:
    """By how many of ``networks`` each of the images ``levels`` (B, C, H, W) is taken for its class, (B,) int64."""
    x = levels / 255
    return torch.stack([network(x).argmax(1) == labels for network in networks]).sum(dim=0)


def mean_cosine(slopes: Sequence[Tensor]) -> Tensor:
    """The cosine between two of the gradients ``slopes`` (each (B, C, H, W)), the mean over all pairs: (B,)."""
    unit = F.normalize(torch.stack([slope.flatten(1) for slope in slopes]), dim=2)
    count = len(unit)
    return (unit.sum(dim=0).square().sum(dim=1) - unit.square().sum(dim=(0, 2))) / (count * (count - 1))
