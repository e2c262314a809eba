"""Which training images a data defense protects, how many at a time, and what it may release of them."""

import math

import torch
from torch import Tensor

from bench.dataset import Split, grey_levels
from bench.errors import ConfigError, ThreatViolation
from bench.norms import lp_norm
from bench.protocols import DataDefense, Job
from bench.rng import SampleRng
from bench.threat import Threat

CHUNK = 1 << 22  # values compared at a time, to bound memory
ROUNDING = 1e-6  # what a distance may exceed its radius by, relative to radii above 1
CIFAR = 3, 32, 32


def check_share(share: float) -> None:
    """Whether ``share`` of the training images can be protected; for a component's ``__post_init__``.

    Raises:
        ConfigError: it is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share is {share:g}; it is above 0 and at most 1, which protects every training image")


def protected_rows(split: Split, share: float, job: Job) -> Tensor:
    """The rows of ``split`` to protect, ascending: ``share`` of them, rounded, and at least one.

    ``job.seed`` draws them, uniformly; the rows of a smaller share are among those of a larger one.

    Raises:
        ConfigError: a share outside (0, 1].
    """
    check_share(share)
    order = SampleRng.create(job.seed, torch.arange(len(split)), "protected rows").keys.argsort()
    rows, _ = order[: max(1, round(share * len(split)))].sort()
    return rows.to(split.labels.device)


def fitting(most: int, shape: tuple[int, int, int]) -> int:
    """How many images of ``shape`` (C, H, W) to take at a time: as many values as ``most`` of CIFAR's have, at most.

    So memory is bounded for photographs, too, and small images go in the chunks that they always went in.
    """
    return max(1, min(most, most * math.prod(CIFAR) // math.prod(shape)))


def merge(split: Split, rows: Tensor, protected: Tensor) -> Split:
    """``split`` in grey levels, with the images at ``rows`` (n,) replaced by ``protected`` (n, C, H, W) uint8."""
    images = grey_levels(split).clone()
    images[rows] = protected.to(images.device)
    return Split(images, split.labels)


def declared_threat(defense: DataDefense) -> Threat:
    """What a data defense allows itself to change in an image."""
    return Threat(defense.norm, float(defense.eps), "training-data")


def check_release(released: object, original: Split, threat: Threat) -> Split:
    """What a data defense has released, on the CPU, after a look at whether it may.

    Images are uint8, as many and as large as in ``original``, each in the ball of ``threat`` around its grey levels
    there; labels are those of ``original`` in the same order.

    Raises:
        ThreatViolation: they are not.
    """
    if not isinstance(released, Split):
        raise ThreatViolation(f"released a {type(released).__name__}; a data defense returns a bench.dataset.Split")
    images, labels, before = released.images.cpu(), released.labels.cpu(), grey_levels(original)
    if images.dtype != torch.uint8 or images.shape != before.shape:
        raise ThreatViolation(
            f"released {images.dtype} images {tuple(images.shape)}; a data defense returns uint8 {tuple(before.shape)}"
        )
    if labels.dtype != original.labels.dtype or not torch.equal(labels, original.labels):
        raise ThreatViolation("changed labels or their order; a data defense returns those it was given")
    step = max(1, CHUNK // math.prod(before.shape[1:]))
    pairs = zip(images.split(step), before.split(step), strict=True)
    distance = torch.cat([lp_norm((new.double() - old.double()) / 255, threat.norm) for new, old in pairs])
    outside = distance > threat.eps + ROUNDING * max(1.0, threat.eps)
    if outside.any():
        raise ThreatViolation(
            f"released {int(outside.sum()):,} of {len(images):,} images outside its {threat.norm} ball of "
            f"{threat.eps:.4g}, up to {float(distance.max()):.4g} away; release what is declared"
        )
    return Split(images, labels)
