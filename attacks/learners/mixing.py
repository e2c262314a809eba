"""Mixup and CutMix: two images in one, and the label in the same shares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from attacks.learners.cutout import boxes
from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.norms import per_sample
from bench.protocols import Job
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access
from bench.training import Trainer


@attacks("mixup")
@dataclass(frozen=True, kw_only=True)
class Mixup(Trainer):
    """Train on means of two images, weighted by a share that is uniform on [0, 1) (Beta(1, 1)).

    The partners are a random permutation of the batch.

    Args:
        share_of: ``sample`` draws a share for each image, as APBench; ``batch`` one for all, as the paper's code.

    Source:
        Zhang et al., ICLR 2018, arXiv:1710.09412, section 2.
    """

    share_of: Literal["sample", "batch"] = "sample"

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Zhang et al., ICLR 2018, arXiv:1710.09412"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        return self.train(build, data, job, mix=self.mix)

    def mix(self, x: Tensor, shares: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and shares of the classes (B, K), each blended with those of its partner."""
        partner, share = partners(rng), rng.fork("share").uniform()
        if self.share_of == "batch":
            share = share[:1].expand_as(share)
        return torch.lerp(x, x[partner], per_sample(share)), torch.lerp(shares, shares[partner], share[:, None])


@attacks("cutmix")
@dataclass(frozen=True, kw_only=True)
class CutMix(Trainer):
    """Train on images with a box of another image in them; the label is mixed by the area that was really pasted.

    The box has the image's aspect and an area whose share of the image is uniform on [0, 1) (Beta(1, 1)) before the
    border cuts it. The partners are a random permutation of the batch.

    Args:
        probability: with which an image is pasted into; the others stay as they are.

    Source:
        Yun et al., ICCV 2019, arXiv:1905.04899, equations 1 and 2.
    """

    probability: float = 1.0

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Yun et al., ICCV 2019, arXiv:1905.04899"

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise ConfigError(f"probability is {self.probability}; it is above 0 and at most 1")

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        return self.train(build, data, job, mix=self.mix)

    def mix(self, x: Tensor, shares: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) with the pasted boxes, and the shares of the classes (B, K) in them."""
        partner = partners(rng)
        pasted = rng.fork("paste").uniform() < self.probability
        side = rng.fork("share").uniform().sqrt() * pasted  # of the box, as a share of the image's
        height, width = ((side * size).long() for size in x.shape[2:])
        box = boxes(x, height, width, rng)
        share = box.float().mean((1, 2, 3))
        return x.where(~box, x[partner]), torch.lerp(shares, shares[partner], share[:, None])


def partners(rng: SampleRng) -> Tensor:
    """A random permutation (B,) of the batch: its streams in the order of their next words."""
    return rng.fork("partner").words(1).squeeze(1).argsort()
