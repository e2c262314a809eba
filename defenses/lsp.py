"""LSP: a perturbation of coloured patches whose classes a linear model separates."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.dataset import Dataset, Split, grey_levels
from bench.errors import ConfigError
from bench.protection import check_share, fitting, merge, protected_rows
from bench.protocols import Job, Stage
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Norm
from defenses.levels import moved, rounded_in_l2

PUBLISHED_EPS = 6 / 255 * math.sqrt(3 * 32 * 32)  # 1.304: six grey levels in every value of a CIFAR image
SEPARATION = 10  # from the middle to each face of the hypercube, against clusters that are mixtures of unit normals
CORNER_BITS = 16  # so many of a corner's coordinates make it unlike those of the other classes
COORDINATES = 8192
CHUNK = 256  # images at a time, to stay in the cache


@defenses("lsp")
@dataclass(frozen=True, kw_only=True)
class LinearlySeparable:
    """Add to each image a point of its class's Gaussian cluster, one coordinate for each patch and channel.

    The clusters sit at different corners of a hypercube. A point's coordinates fill squares of ``patch`` pixels a side;
    the last ones are cut off where the image ends. The whole is scaled to an l2 norm of ``eps``, rounded to whole grey
    levels inside the ball, and cut off at black and white. ``share`` is the part of the training images to protect.

    ``patch`` is a quarter of the image's shorter side unless given: 8 pixels for CIFAR, as published; for other sizes
    that is ours. The default ``eps`` is the published one for CIFAR, 1.304, or six levels in every value. Single
    values move further, with no bound of their own below ``eps / patch``: that is what one patch could hold alone.

    Source:
        Yu et al., KDD 2022, arXiv:2111.00898, section 4, and the released ``cifar_train.py``: a Gaussian cluster for
        each class as scikit-learn's ``make_classification`` draws them, with ``class_sep=10``.

    Raises:
        ConfigError: a patch below one pixel, an eps that is not positive and finite, or a share outside (0, 1].
    """

    eps: float = PUBLISHED_EPS
    patch: int | None = None
    share: float = 1.0

    stage: ClassVar[Stage] = "data"
    norm: ClassVar[Norm] = "l2"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Yu et al., KDD 2022, arXiv:2111.00898"

    def __post_init__(self) -> None:
        if self.patch is not None and self.patch < 1:
            raise ConfigError(f"patch is {self.patch}; a patch has at least one pixel a side")
        if not 0 < self.eps < math.inf:
            raise ConfigError(f"eps is {self.eps:g}; an l2 radius on the pixel scale is positive and finite")
        check_share(self.share)

    def __call__(self, data: Dataset, job: Job) -> Split:
        """The training split to release, uint8; clusters and points are drawn from ``job.seed``.

        Raises:
            ConfigError: so few patches that classes would share a corner.
        """
        channels, height, width = data.train.shape
        patch = self.patch or max(1, min(height, width) // 4)
        grid = channels, math.ceil(height / patch), math.ceil(width / patch)
        clusters = Clusters(len(data.classes), math.prod(grid), job.seed)

        rows, images = protected_rows(data.train, self.share, job), grey_levels(data.train)
        labels, protected = data.train.labels[rows], images[rows]
        streams, chunk = SampleRng.create(job.seed, rows, "lsp point"), fitting(CHUNK, data.train.shape)
        for label in range(len(data.classes)):
            for members in (labels == label).nonzero().squeeze(1).split(chunk):
                points = clusters.points(label, streams[members]).view(-1, *grid)
                delta = points.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)[..., :height, :width]
                delta *= 255 * self.eps / delta.flatten(1).norm(dim=1)[:, None, None, None]
                protected[members] = moved(protected[members], rounded_in_l2(delta, self.eps))
        return merge(data.train, rows, protected)


class Clusters:
    """A Gaussian for each of ``classes`` in ``size`` dimensions, about corners of a hypercube that all differ."""

    def __init__(self, classes: int, size: int, seed: int) -> None:
        if size > COORDINATES:
            raise ConfigError(
                f"{size:,} patches; a cluster has at most {COORDINATES:,} coordinates, whose mixing takes the square "
                "of that in memory: take a larger patch"
            )
        bits = min(size, CORNER_BITS)
        if classes > 2**bits:
            raise ConfigError(
                f"{size} patch{'es' * (size > 1)} make {2**bits} corners for {classes} classes; take a smaller patch"
            )
        self.size = size
        self.streams = SampleRng.create(seed, torch.arange(classes), "lsp cluster")
        codes = SampleRng.create(seed, torch.arange(2**bits), "lsp corners").keys.argsort()[:classes, None]
        apart = (codes >> torch.arange(bits) & 1).bool()                                        # (K, bits)
        bright = torch.cat((apart, self.streams.fork("corner").coins(size)[:, bits:]), dim=1)   # (K, size)
        self.corners = SEPARATION * (2 * bright.double() - 1)

    def points(self, label: int, rng: SampleRng) -> Tensor:
        """A point (n, size) float64 of the cluster of ``label`` for each stream of ``rng``."""
        mixing = 2 * self.streams[torch.tensor([label])].fork("mixing").uniform(self.size, self.size)[0].double() - 1
        return self.corners[label] + rng.normal(self.size).double() @ mixing
