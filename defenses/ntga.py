"""NTGA, neural tangent generalisation attack: training images from which an infinitely wide network learns wrong."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.dataset import Dataset, Split, grey_levels
from bench.protection import check_share, merge, protected_rows
from bench.protocols import Job, Stage
from bench.ranges import Count, Positive
from bench.registry import defenses
from bench.threat import Norm
from defenses.checkpoints import LevelBox
from defenses.levels import whole_levels

WEIGHTS, BIASES = 1.76, 0.18  # variances of the initial weights, times the width before them, and of the biases
RIDGE = 1e-4                  # on the diagonal of the kernel
BEYOND = 1.1                  # times the radius that all steps together could go
NEARLY = 1 - 1e-12            # the largest cosine; an arc cosine has no slope at one


@defenses("ntga")
@dataclass(frozen=True, kw_only=True)
class NeuralTangentGeneralizationAttack:
    """Move the training images so that an infinitely wide network trained on them is wrong about others.

    What such a network of ``depth`` hidden layers of ReLUs says of an image after a time of training on squared errors
    is known in closed form, by its neural tangent kernel. Its cross-entropy on held-out clean images, the first of the
    calibration images or, where there are none, of the training images, is climbed by ``steps`` steps along the signs
    of the gradient. Images are taken in blocks, drawn at random, each as if it were all there is to train on.

    The released code has convolutional kernels, too, which this has not.

    Args:
        eps: radius on the pixel scale, a whole number of grey levels.
        block: images in a block, and the most that are held out.
        time: of the training, in steps at a rate of one on the mean over images and classes.
        share: of the training images, how many are protected.

    Source:
        Yuan and Wu, ICML 2021; the released ``generate_attack.py``, its fully connected surrogate.

    Raises:
        ConfigError: a radius off the grid, or a share that cannot be used.
    """

    eps: float = 8 / 255
    steps: Count = 10
    depth: Count = 5
    block: Count = 512
    time: Positive = 64.0
    share: float = 1.0

    stage: ClassVar[Stage] = "data"
    norm: ClassVar[Norm] = "linf"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Yuan and Wu, ICML 2021"

    def __post_init__(self) -> None:
        whole_levels(self.eps)
        check_share(self.share)

    def __call__(self, data: Dataset, job: Job) -> Split:
        """The training split to release, uint8; ``job.seed`` draws the blocks."""
        rows, classes = protected_rows(data.train, self.share, job), len(data.classes)
        order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(job.seed)).to(rows.device)]
        held = (data.calibration if len(data.calibration) else data.train).subset(slice(self.block)).to(job.device)
        blocks = order.tensor_split(math.ceil(len(order) / self.block))
        done: list[Tensor] = []
        for number, block in enumerate(blocks):
            moved: Tensor | None = job.scratch.load(f"block-{number}")
            if moved is None:
                clean = Split(grey_levels(data.train)[block], data.train.labels[block]).to(job.device)
                moved = self.craft(clean, held, classes).cpu()
                job.scratch.save(f"block-{number}", moved)
            done.append(moved)
            job.progress(number + 1, len(blocks))
        return merge(data.train, order, torch.cat(done))

    def craft(self, clean: Split, held: Split, classes: int) -> Tensor:
        """A block of training images, moved, uint8; ``held`` are others, on which it is to be wrong."""
        levels = clean.images.double()
        box, moved = LevelBox.around(levels, self.eps), levels
        for _ in range(self.steps):
            x = (moved / 255).requires_grad_(True)
            loss = self.loss(x, clean.labels, held.pixels().double(), held.labels, classes)
            (slope,) = torch.autograd.grad(loss, x)
            moved = box.project(moved + BEYOND * 255 * self.eps / self.steps * slope.sign())
        return moved.round().byte()

    def loss(self, x: Tensor, y: Tensor, held: Tensor, labels: Tensor, classes: int) -> Tensor:
        """The cross-entropy on images ``held`` of what is learned from images ``x`` of classes ``y``."""
        targets = F.one_hot(y, classes).to(x)
        return F.cross_entropy(learned(x, targets, held, self.depth, self.time), labels)


def learned(x: Tensor, targets: Tensor, others: Tensor, depth: int, time: float) -> Tensor:
    """What the network says (M, K) of the images ``others`` after gradient flow on the squared error at ``x``.

    The mean over its initial weights; the error is half the squared distance to ``targets`` (N, K), averaged over all
    of their numbers.

    Source: Jacot et al., 2018, arXiv:1806.07572; Lee et al., 2019, arXiv:1902.06720, equation 11 from zero.
    """
    within = tangent_kernel(x, x, depth)
    within = within + RIDGE * torch.eye(len(x)).to(within)
    gone = targets - torch.linalg.matrix_exp(-time / targets.numel() * within) @ targets
    said: Tensor = tangent_kernel(others, x, depth) @ torch.linalg.solve(within, gone)
    return said


def tangent_kernel(one: Tensor, other: Tensor, depth: int) -> Tensor:
    """The neural tangent kernel (N, M) of ``depth`` hidden layers of ReLUs, infinitely wide, at two sets of images.

    Source: Jacot et al., 2018, arXiv:1806.07572; of ReLUs by Cho and Saul, 2009, arc-cosine kernels.
    """
    one, other = one.flatten(1), other.flatten(1)
    size = one.shape[1]
    first, second = (WEIGHTS * each.square().sum(dim=1) / size + BIASES for each in (one, other))
    covariance = WEIGHTS * one @ other.T / size + BIASES
    tangent = covariance
    for _ in range(depth):
        scale = (first[:, None] * second).sqrt()
        cosine = (covariance / scale).clamp(-NEARLY, NEARLY)
        angle = torch.arccos(cosine)
        both_on = (math.pi - angle) / (2 * math.pi)
        covariance = WEIGHTS * scale * ((1 - cosine.square()).sqrt() / (2 * math.pi) + both_on * cosine) + BIASES
        tangent = covariance + WEIGHTS * both_on * tangent
        first, second = (WEIGHTS * each / 2 + BIASES for each in (first, second))
    return tangent
