"""Ordinary training: what protected data must withstand first of all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from bench.dataset import Dataset
from bench.protocols import Job
from bench.registry import attacks
from bench.threat import Access
from bench.training import Trainer


@attacks("standard")
@dataclass(frozen=True, kw_only=True)
class Standard(Trainer):
    """Train on the released images as they are, with the data set's usual augmentation."""

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "empirical risk minimisation"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        return self.train(build, data, job, pure=True)
