"""Which training images a data defense protects, and how they go back among the others."""

import torch
from torch import Tensor

from bench.dataset import Split, grey_levels
from bench.errors import ConfigError
from bench.protocols import Job
from bench.rng import SampleRng


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


def merge(split: Split, rows: Tensor, protected: Tensor) -> Split:
    """``split`` in grey levels, with the images at ``rows`` (n,) replaced by ``protected`` (n, C, H, W) uint8."""
    images = grey_levels(split).clone()
    images[rows] = protected.to(images.device)
    return Split(images, split.labels)
