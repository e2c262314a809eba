"""Convex adversarial training: of a two-layer network, with the worst case of the loss in closed form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.models.two_layer import TwoLayerNetwork
from bench.protocols import Job, Stage
from bench.ranges import Count, NonNegative, Positive
from bench.registry import defenses
from bench.rng import SampleRng
from bench.training import initialised

MARGIN = 5e-3      # depth of a cone below which it is too narrow to be of use
FALL = 1e-3        # of the learning rate, from the first step to the last
NEGLIGIBLE = 1e-7  # norm of the weights of a neuron that does nothing
LOOK = 100         # steps after which the weights are put back and judged


@defenses("convex-at")
@dataclass(frozen=True, kw_only=True)
class ConvexAdversarialTraining:
    """Minimise the worst hinge loss in the linf ball, exactly, over two-layer networks whose ReLUs keep their patterns.

    Which training images switch a ReLU on is its pattern. With the patterns fixed, and weights for which no change
    within ``eps`` of any image breaks them, the worst loss of an image is a convex function of the weights:

        minimise  mean_k max(0, 1 - y_k x_k . z_k + eps |z_k|_1) + beta sum_i (|v_i|_2 + |w_i|_2),
        z_k = sum_i d_ik (v_i - w_i),   subject to  s_ik x_k . v_i >= eps |v_i|_1, and the same for w_i,

    with s = 2 d - 1. Patterns are those that random directions have on the images, half of them on images moved to
    random corners of their balls, and that of all images on; those that hardly anything keeps to are dropped. What has
    left its cone can be put back, without a change of z, by a step along the direction deepest inside it. The descent
    is Adam's, from zero, on the objective and what that step will cost; at its end it is taken. So the loss that is
    computed is that of the network, at its worst (``worst_loss`` in its curves, beside the ``objective`` and how many
    ``patterns`` there are).

    Args:
        eps: radius; at 0 this is the program of ordinary training.
        patterns: directions drawn. Each pattern makes two neurons, for which the network must have the width.
        beta: weight of the norms, which is weight decay in other words.
        epochs: steps of the descent, each on all images.
        lr: of the descent, falling to a thousandth.

    Source:
        Bai, Gautam and Sojoudi, 2022, arXiv:2201.01965, with the hinge loss; the descent, and how it comes back into
        the cones, are ours.
    """

    eps: NonNegative = 8 / 255
    patterns: Count = 63
    beta: NonNegative = 1e-4
    epochs: Count = 4000
    lr: Positive = 0.3

    stage: ClassVar[Stage] = "training"
    trains: ClassVar[str] = "two-layer"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Bai, Gautam and Sojoudi, 2022, arXiv:2201.01965"

    def check(self, classes: int, shape: tuple[int, int, int]) -> None:
        """Whether it can train on images (C, H, W) of so many classes.

        Raises:
            ConfigError: there are not two classes.
        """
        if classes != 2:
            raise ConfigError(f"it tells two classes apart, and the data have {classes}; take two, as in classes=3+8")

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``.

        Raises:
            ConfigError: more than two classes, no two-layer network, or one that is too narrow.
        """
        self.check(len(data.classes), data.train.shape)
        network = initialised(build, job)
        if not isinstance(network, TwoLayerNetwork):
            raise ConfigError(f"it trains a two-layer network, not a {type(network).__name__}; name model two-layer")
        if network.hidden.out_features < (most := 2 * (self.patterns + 1)):
            raise ConfigError(
                f"{self.patterns} patterns make up to {most} neurons, and the network has "
                f"{network.hidden.out_features}; take two-layer(width={most}), or fewer patterns"
            )
        x, y = data.train.pixels().double().flatten(1), 2.0 * data.train.labels - 1
        program = Program.of(x, y, self.eps, self.beta, draw(x, self.eps, self.patterns, job.seed))
        job.note("patterns", len(program.on))
        v, w = program.solve(self.epochs, self.lr, job)
        job.note("worst_loss", float(program.losses(v - w).mean()))
        job.note("objective", float(program.objective(v, w)))
        write(network, v, w)
        if job.watch is not None:
            job.watch(network.eval().to(job.device), 0)
        return network.eval().to(job.device)


@dataclass(frozen=True)
class Program:
    """The convex program for images ``x`` (N, D) of classes ``y`` (N,), -1 or 1; everything in float64.

    ``on`` (P, N) are the patterns, 0 or 1. The cone of a pattern holds the directions that keep to it within ``eps`` of
    every image; ``inside`` (P, D) is of each cone the direction whose image nearest to a change is farthest from it,
    ``depth`` (P,) away, for an l1 norm of one.
    """

    x: Tensor
    y: Tensor
    eps: float
    beta: float
    on: Tensor
    inside: Tensor
    depth: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, eps: float, beta: float, on: Tensor) -> "Program":
        """The program with those of the patterns ``on`` (P, N) that any direction keeps to."""
        inside = torch.stack([deepest_direction(x, 2 * pattern - 1, eps) for pattern in on])
        depth = ((2 * on - 1) * (inside @ x.T)).amin(dim=1) - eps * inside.abs().sum(dim=1)
        kept = depth > MARGIN
        if not kept.any():
            raise ConfigError(
                f"no pattern of {len(on)} holds within eps={eps:g} of all images; lower eps, or draw more patterns"
            )
        return cls(x, y, eps, beta, on[kept], inside[kept], depth[kept])

    def losses(self, z: Tensor) -> Tensor:
        """The hinge loss (N,) of each image at its worst within ``eps``, for ``z`` = v - w (P, D)."""
        z = self.on.T @ z  # (N, D), what acts on each image
        return (1 - self.y * (self.x * z).sum(dim=1) + self.eps * z.abs().sum(dim=1)).clamp(min=0)

    def norms(self, v: Tensor, w: Tensor) -> Tensor:
        """What the weights cost before ``beta``."""
        total: Tensor = torch.linalg.vector_norm(torch.stack([v, w]), dim=2).sum()
        return total

    def objective(self, v: Tensor, w: Tensor) -> Tensor:
        """What is minimised."""
        return self.losses(v - w).mean() + self.beta * self.norms(v, w)

    def outside(self, v: Tensor) -> Tensor:
        """How far (P, N) each of ``v`` is from keeping to its pattern at each image; 0 where it does."""
        return (self.eps * v.abs().sum(dim=1)[:, None] - (2 * self.on - 1) * (v @ self.x.T)).clamp(min=0)

    def solve(self, steps: int, lr: float, job: Job) -> tuple[Tensor, Tensor]:
        """Weights v and w (P, D) inside the cones that make the objective small."""
        v, w = (torch.zeros_like(self.inside).requires_grad_(True) for _ in range(2))
        optimizer = torch.optim.Adam([v, w], lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: FALL ** (step / steps))
        lengths = torch.linalg.vector_norm(self.inside, dim=1)
        best, lowest = self.put_back(v.detach(), w.detach()), float("inf")
        for step in range(steps):
            optimizer.zero_grad()
            # The norm has no slope at zero, where all begin: a little under its root gives it one.
            norms = (torch.stack([v, w]).square().sum(dim=2) + NEGLIGIBLE**2).sqrt().sum()
            back = 2 * (self.way_back(v, w) * lengths).sum()  # what it adds to the norms of both, at most
            (self.losses(v - w).mean() + self.beta * (norms + back)).backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % LOOK == 0 or step + 1 == steps:
                here = self.put_back(v.detach(), w.detach())
                if (value := float(self.objective(*here))) < lowest:
                    best, lowest = here, value
                job.progress(step + 1, steps)
        return best

    def put_back(self, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """``v`` and ``w`` (P, D) inside their cones, with the same v - w: both go as far along ``inside`` as one must.

        What is added keeps to the pattern with ``depth`` to spare, so so much of it makes up for what was missing.
        """
        more = self.way_back(v, w)[:, None] * self.inside
        return v + more, w + more

    def way_back(self, v: Tensor, w: Tensor) -> Tensor:
        """How far (P,) along ``inside`` both ``v`` and ``w`` are in their cones again."""
        return torch.maximum(self.outside(v).amax(dim=1), self.outside(w).amax(dim=1)) / self.depth


def draw(x: Tensor, eps: float, count: int, seed: int) -> Tensor:
    """Different patterns (P, N), 0 or 1, of at most ``count`` random directions on images ``x`` (N, D), and of all on.

    Every other direction sees each image at a random corner of its ball.
    """
    streams = SampleRng.create(seed, torch.arange(count), "patterns")
    directions = streams.fork("direction").normal(x.shape[1]).double()  # (count, D)
    corners = SampleRng.create(seed, torch.arange(len(x)), "corners")
    patterns = [torch.ones(len(x), dtype=x.dtype)]
    for number, direction in enumerate(directions):
        signs = 2.0 * corners.fork(number).coins(x.shape[1]) - 1 if number % 2 else 0
        patterns.append(((x + eps * signs) @ direction >= 0).to(x))
    different: Tensor = torch.unique(torch.stack(patterns), dim=0)
    return different


def deepest_direction(x: Tensor, signs: Tensor, eps: float) -> Tensor:
    """The direction (D,) of l1 norm one or less with the largest margin ``min_k s_k x_k . v - eps |v|_1``.

    ``signs`` (N,) are -1 or 1. A linear program in the positive and the negative part of v, and the margin.
    """
    from scipy.optimize import linprog  # slow to import

    signed = (signs[:, None] * x).numpy()
    count, size = signed.shape
    slack = np.hstack([eps - signed, eps + signed, np.ones((count, 1))])
    bound = np.hstack([np.ones((1, 2 * size)), np.zeros((1, 1))])
    found = linprog(
        np.r_[np.zeros(2 * size), -1], A_ub=np.vstack([slack, bound]), b_ub=np.r_[np.zeros(count), 1],
        bounds=[(0, None)] * (2 * size) + [(None, None)],
    )  # fmt: skip
    parts = torch.from_numpy(found.x)
    return parts[:size] - parts[size:-1]


@torch.no_grad()
def write(network: TwoLayerNetwork, v: Tensor, w: Tensor) -> None:
    """Make ``network`` answer with sum_i relu(x . v_i) - relu(x . w_i), the second class's logit less the first's.

    Of each, half the square root of its norm is in the last layer, and what is left in the hidden one; neurons that
    are not needed are zero.
    """
    weights = torch.cat([v, w])
    roots = torch.linalg.vector_norm(weights, dim=1).sqrt()
    signs = torch.cat([torch.ones(len(v)), -torch.ones(len(w))]).to(roots)
    used = roots.square() > NEGLIGIBLE
    hidden, last = weights[used] / roots[used, None], signs[used] * roots[used] / 2
    network.hidden.weight.zero_()
    network.linear.weight.zero_()
    network.hidden.weight[: len(hidden)] = hidden.to(network.hidden.weight)
    network.linear.weight[:, : len(last)] = torch.stack([-last, last]).to(network.linear.weight)
