"""MI-FGSM and its kin: examples of a surrogate that also beat other networks."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from attacks.sourced import Sourced
from bench.errors import ConfigError
from bench.norms import TINY, per_sample, project
from bench.oracle import Oracle
from bench.oracle.served import ServedModel
from bench.ranges import Count, NonNegative, Positive, Whole
from bench.registry import added, attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

TRIES, FAR = 20, 4.0  # of a scale, and how far it goes in one of them
SMALL = 64  # pixels; smaller images get a kernel of 3, others of 15


@attacks("mi-fgsm")
@dataclass(frozen=True, kw_only=True)
class MIFGSM(Sourced):
    """Momentum iterative FGSM (Dong et al., CVPR 2018) on a surrogate, in linf, replayed on the served model.

    Sign steps of eps / ``steps`` along a running sum of gradients of the cross-entropy, each divided by its mean size.
    The other methods of the family add to that, and every one of them is a switch here, so that they combine. The last
    iterate is asked about, with one query for its label; work on the surrogate costs no queries, and is counted apart.

    Args:
        from_: see :class:`attacks.sourced.Sourced`.
        momentum: share of the sum that is kept from step to step.
        nesterov: take the gradient where the sum alone would lead (NI).
        scales: copies of the image, each half as bright as the one before, over which gradients are averaged (SI).
        diversity: probability that an image is shrunk and padded at random before each gradient (DI).
        padded: by how much the canvas of DI is larger than the image, both being scaled back to its size.
        kernel: side of the Gaussian that smooths gradients (TI); 0 is 3 for images below 64 pixels and 15 for others.
        neighbours: points around the image whose gradients correct that of the next step (VMI).
        reach: how far they are, in eps.
        rmse: what is made equal beside the ball, so that methods can be compared whose changes are of different size in
            l2. ``first-step`` scales the steps of each image until the first one has an RMSE of ``first`` eps;
            ``i-fgsm`` scales the last iterate until its RMSE is that of I-FGSM, this attack without momentum or any
            switch, whose passes count, too. Both to 1 %, or as near as ball and box allow.

    Source: arXiv:1710.06081, algorithm 1; ``rmse`` follows Chen et al., 2021, arXiv:2102.10343, for steps of signs.
    """

    steps: Count = 10
    momentum: NonNegative = 1.0
    nesterov: bool = False
    scales: Count = 1
    diversity: NonNegative = 0.0
    padded: Positive = 1.1
    kernel: Whole = 1
    neighbours: Whole = 0
    reach: Positive = 1.5
    rmse: Literal["free", "first-step", "i-fgsm"] = added("free")
    first: Positive = added(0.125)

    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Dong et al., 2018, arXiv:1710.06081"
    most_queries: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.diversity > 1 or self.padded < 1:
            raise ConfigError(
                f"diversity is {self.diversity:g}, a probability, and padded {self.padded:g}, a size of 1 or more"
            )
        if self.kernel % 2 == 0 and self.kernel:
            raise ConfigError(f"kernel is {self.kernel}; a side is odd, or 0 for one that suits the image")

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's last iterate."""
        u = self._climb(oracle.surrogate, x, y, threat, rng)
        if self.rmse == "i-fgsm":
            plain = MIFGSM(steps=self.steps, momentum=0.0)._climb(oracle.surrogate, x, y, threat, rng)
            u, _ = with_rmse(x, u - x, rmse(plain - x), threat)
        oracle.labels(u)
        return u

    def _climb(self, model: ServedModel, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """The last iterate of each sample on ``model``."""
        size = x.new_full((len(x), 1, 1, 1), threat.eps / self.steps)
        u, total, variance = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
        for step in range(self.steps):
            here = rng.fork(step)
            at = u + size * self.momentum * total if self.nesterov else u
            raw = self._gradient(model, at, y, here)
            slope = self._smooth(raw + variance)
            total = self.momentum * total + slope / per_sample(slope.abs().flatten(1).mean(dim=1) + TINY)
            if self.neighbours:
                variance = self._around(model, at, y, threat, here) - raw
            if self.rmse == "first-step" and step == 0:
                wanted = x.new_full((len(x),), self.first * threat.eps)
                _, size = with_rmse(x, size * total.sign(), wanted, threat, size)
            u = project(u + size * total.sign(), x, threat)
        return u

    def _around(self, model: ServedModel, u: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """The mean gradient over points in the cube around ``u``."""
        found = torch.zeros_like(u)
        for number in range(self.neighbours):
            near = rng.fork("neighbour").fork(number)
            moved = u + self.reach * threat.eps * (near.uniform(*u.shape[1:]).to(u) * 2 - 1)
            found += self._gradient(model, moved, y, near)
        return found / self.neighbours

    def _gradient(self, model: ServedModel, u: Tensor, y: Tensor, rng: SampleRng) -> Tensor:
        """Of the cross-entropy at ``u`` (B, C, H, W), through what is done to images first."""
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            shown = self._diverse(u, rng.fork("diversity")) if self.diversity else u
            loss = sum(
                F.cross_entropy(model(shown / 2**scale, rng), y, reduction="sum") for scale in range(self.scales)
            )
            (gradient,) = torch.autograd.grad(torch.as_tensor(loss), u)
        return gradient / self.scales

    def _diverse(self, u: Tensor, rng: SampleRng) -> Tensor:
        """With probability ``diversity``, the image on a larger canvas, at a random size and place, scaled back."""
        height, width = u.shape[2:]
        scale = 1 + (self.padded - 1) * rng.fork("size").uniform().to(u)      # of the image, in its own size
        moved = rng.fork("diverse").uniform().to(u) < self.diversity
        grow = self.padded / scale                                             # pixels of the image for each shown
        room = (self.padded - scale) / scale                                   # left on the canvas, in half images
        place = (rng.fork("place").uniform(2).to(u) * 2 - 1) * room[:, None]
        theta = u.new_zeros(len(u), 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = torch.where(moved, grow, 1)
        theta[:, :, 2] = torch.where(moved[:, None], place, 0)
        grid = F.affine_grid(theta, [len(u), 1, height, width], align_corners=False)
        return F.grid_sample(u, grid, mode="nearest", padding_mode="zeros", align_corners=False)

    def _smooth(self, gradient: Tensor) -> Tensor:
        """``gradient`` (B, C, H, W) with each channel smoothed by the kernel."""
        side = self.kernel or (3 if min(gradient.shape[2:]) < SMALL else 15)
        if side == 1:
            return gradient
        bell = torch.exp(-torch.linspace(-3, 3, side, device=gradient.device).square() / 2).to(gradient)
        weight = bell[:, None] * bell / bell.sum() ** 2
        channels = gradient.shape[1]
        return F.conv2d(gradient, weight.expand(channels, 1, side, side), padding=side // 2, groups=channels)


def rmse(delta: Tensor) -> Tensor:
    """The root mean square (B,) of changes (B, C, H, W)."""
    return delta.square().flatten(1).mean(dim=1).sqrt()


def with_rmse(
    x: Tensor, delta: Tensor, wanted: Tensor, threat: Threat, size: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """``x`` moved along ``delta`` (B, C, H, W) until the change has the RMSE ``wanted`` (B,), inside ball and box.

    Returns:
        The images, and ``size`` as many times as ``delta`` was taken (B, 1, 1, 1). Where ball or box do not let a
        change become as large, both go as far as they can.
    """
    times = x.new_ones(len(x), 1, 1, 1)
    for _ in range(TRIES):
        moved = project(x + times * delta, x, threat)
        times = times * per_sample(wanted / (rmse(moved - x) + TINY)).clamp(1 / FAR, FAR)
    return project(x + times * delta, x, threat), times * size


@attacks("di-fgsm")
@dataclass(frozen=True, kw_only=True)
class DIFGSM(MIFGSM):
    """MI-FGSM with diverse inputs (Xie et al., CVPR 2019): images of random size and place. Each sample draws its own.

    Source: arXiv:1803.06978, equation 2; ``padded`` 1.1 is 299 to 330 pixels, for CIFAR-10 use 1.25.
    """

    diversity: NonNegative = 0.5
    paper: ClassVar[str] = "Xie et al., 2019, arXiv:1803.06978"


@attacks("ti-fgsm")
@dataclass(frozen=True, kw_only=True)
class TIFGSM(MIFGSM):
    """MI-FGSM with gradients smoothed by a Gaussian (Dong et al., CVPR 2019), as if images were shifted.

    Source: arXiv:1904.02884, equation 7.
    """

    kernel: Whole = 0
    paper: ClassVar[str] = "Dong et al., 2019, arXiv:1904.02884"


@attacks("ni-fgsm")
@dataclass(frozen=True, kw_only=True)
class NIFGSM(MIFGSM):
    """MI-FGSM with Nesterov's momentum (Lin et al., ICLR 2020).

    Source: arXiv:1908.06281, equations 6 to 8.
    """

    nesterov: bool = True
    paper: ClassVar[str] = "Lin et al., 2020, arXiv:1908.06281"


@attacks("si-fgsm")
@dataclass(frozen=True, kw_only=True)
class SIFGSM(MIFGSM):
    """MI-FGSM on five copies of the image, from full brightness down to a sixteenth (Lin et al., ICLR 2020).

    Source: arXiv:1908.06281, equation 9.
    """

    scales: Count = 5
    paper: ClassVar[str] = "Lin et al., 2020, arXiv:1908.06281"


@attacks("vmi-fgsm")
@dataclass(frozen=True, kw_only=True)
class VMIFGSM(MIFGSM):
    """MI-FGSM with gradients corrected by those around the last point (Wang and He, CVPR 2021).

    Source: arXiv:2103.15571, algorithm 1.
    """

    neighbours: Whole = 20
    paper: ClassVar[str] = "Wang and He, 2021, arXiv:2103.15571"
