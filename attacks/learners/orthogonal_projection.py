"""Orthogonal projection: take from the images what a linear classifier sees in them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.protocols import Job
from bench.ranges import Count, Positive
from bench.registry import attacks
from bench.threat import Access
from bench.training import Recipe, Trainer, fit, initialised


@attacks("orthogonal-projection")
@dataclass(frozen=True, kw_only=True)
class OrthogonalProjection(Trainer):
    """Fit a linear classifier to the released pixels, project its K directions out of every image, then train.

    Perturbations that are the same in a whole class are linearly separable, and mostly go; perturbations of each image
    do not. Projected images may leave [0, 1] and are used so. Test images stay as they are. The source trains on with
    rotations, shears, scales and colour jitter, too; here the augmentation is the usual one.

    Args:
        linear_epochs, linear_lr: of the linear classifier: plain SGD in batches of 1024, no bias, the rate divided by
            ten at one half and three quarters.

    Source:
        Sandoval-Segura et al., NeurIPS 2023, arXiv:2305.19254.
    """

    linear_epochs: Count = 20
    linear_lr: Positive = 0.1

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Sandoval-Segura et al., NeurIPS 2023, arXiv:2305.19254"

    def __post_init__(self) -> None:
        self._linear_recipe()

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``.

        Raises:
            ConfigError: the images have no more pixels than there are classes.
        """
        basis = self.directions(data, job)
        return self.train(build, data, job, prepare=lambda x: project_out(x, basis))

    def directions(self, data: Dataset, job: Job) -> Tensor:
        """An orthonormal basis (C * H * W, K) of what the linear classifier looks at."""
        size, classes = data.train.images[0].numel(), len(data.classes)
        if size <= classes:
            raise ConfigError(f"images of {size} values vanish without {classes} directions; use larger ones")

        def build() -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(size, classes, bias=False))

        quiet = Job(job.seed, job.device, scratch=job.scratch)
        linear = fit(initialised(build, quiet), data, self._linear_recipe(), quiet)
        (weights,) = linear.parameters()
        basis: Tensor = torch.linalg.qr(F.normalize(weights.detach().double(), dim=1).T).Q
        return basis

    def _linear_recipe(self) -> Recipe:
        return Recipe(
            epochs=self.linear_epochs, batch_size=1024, optimizer="sgd", lr=self.linear_lr, momentum=0, schedule="steps"
        )


def project_out(x: Tensor, basis: Tensor) -> Tensor:
    """The images (B, C, H, W) without their parts along the orthonormal columns of ``basis`` (C * H * W, K)."""
    basis = basis.to(x.dtype)
    flat = x.flatten(1)
    return (flat - (flat @ basis) @ basis.T).view_as(x)
