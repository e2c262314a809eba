"""AVATAR: drown the released images in noise, and let a diffusion model draw them anew before training.

Dolatabadi, Erfani and Leckie, 2023.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.dataset import Dataset, Split, grey_levels
from bench.errors import ConfigError
from bench.protocols import Job
from bench.ranges import Count, Few
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access
from bench.training import SMALL, Trainer, TrainingState, seeded

TIMES = 1000                    # of the diffusion
FIRST, LAST = 1e-4, 0.02        # variance that each time adds, linearly from the first to the last
BATCH, LR = 64, 2e-3
FREQUENCIES = 32                # of a time, as the network is told it
TOLD = 50                       # steps between two words on progress
CHUNK = 1000                    # images that are drawn anew at a time


@attacks("avatar")
@dataclass(frozen=True, kw_only=True)
class Avatar(Trainer):
    """Train on what a diffusion model makes of the released images, noised up to its time ``depth`` and denoised again.

    The noise drowns small perturbations; the model, which knows what images look like, takes both away. It is trained
    here, for ``steps`` batches, and is small: residual layers of ``width`` on all pixels at once, for images below 16
    pixels a side. The published one is a large network that was trained on clean CIFAR-10.

    Args:
        images: what the model is trained on. ``clean`` are other images of the same kind, as a learner may have them
            from elsewhere: those that the data set keeps for calibration. ``released`` are the protected images
            themselves, whose perturbations it learns as well.
        depth: of 1,000 times; at 100, a tenth of the variance is noise.

    Source:
        Dolatabadi, Erfani and Leckie, 2023, arXiv:2303.08500; denoising diffusion as in Ho et al., 2020,
        arXiv:2006.11239, algorithms 1 and 2, with the variance of the posterior.

    Raises:
        ConfigError: a depth beyond the last time; when it meets the data, large images, or no ``clean`` ones.
    """

    images: Literal["clean", "released"] = "clean"
    depth: Count = 100
    steps: Count = 5000
    width: Few = 128

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Dolatabadi, Erfani and Leckie, 2023, arXiv:2303.08500"

    def __post_init__(self) -> None:
        if self.depth > TIMES:
            raise ConfigError(f"depth is {self.depth}; the diffusion has {TIMES} times")

    def check(self, classes: int, shape: tuple[int, int, int]) -> None:
        """Whether the data have images that its model is made for.

        Raises:
            ConfigError: 16 pixels a side, or more.
        """
        if max(shape[1:]) >= SMALL:
            raise ConfigError(f"avatar draws images below {SMALL} pixels a side anew; these have {max(shape[1:])}")

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train`` drawn anew, in eval mode and on ``job.device``.

        Raises:
            ConfigError: there are no clean images, or they are large.
        """
        self.check(len(data.classes), data.train.shape)
        known = data.calibration if self.images == "clean" else data.train
        if not len(known):
            raise ConfigError(f"{data.name!r} has no calibration images; write avatar(images=released)")
        quiet = Job(job.seed, job.device, scratch=job.scratch)
        denoiser = self.diffusion(known, quiet)
        return self.train(build, data.released(self.redrawn(denoiser, data.train, quiet)), job)

    def diffusion(self, known: Split, job: Job) -> "Denoiser":
        """The model, trained to tell the noise in ``known`` images."""
        images = known.to(job.device)
        with seeded(job):
            net = Denoiser(known.shape, self.width).to(job.device)
        optimizer = torch.optim.Adam(net.parameters(), lr=LR)
        state = TrainingState(job, net, optimizer, {})
        streams, kept = SampleRng.create(job.seed, torch.arange(BATCH, device=job.device), "avatar"), left(job.device)
        with seeded(job):
            first = (state.resume("avatar") or {"steps": 0})["steps"]
            for step in range(first, self.steps):
                optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * step / self.steps)) / 2
                rng = streams.fork(step)
                x = 2 * images.pixels(rng.fork("rows").integers(len(images), 1)[:, 0]) - 1
                time = rng.fork("time").integers(TIMES, 1)[:, 0]
                noise = rng.fork("noise").normal(*x.shape[1:])
                loss = F.mse_loss(net(noised(x, kept[time], noise), time), noise)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if (step + 1) % TOLD == 0 and job.scratch.due():
                    state.save("avatar", steps=step + 1)
        return net.eval()

    @torch.no_grad()
    def redrawn(self, net: "Denoiser", split: Split, job: Job) -> Split:
        """The images of ``split``, noised and denoised, uint8."""
        streams = SampleRng.create(job.seed, torch.arange(len(split), device=job.device), "avatar images")
        images = grey_levels(split).to(job.device)
        drawn = [
            self._drawn(net, images[rows].float() / 127.5 - 1, streams[rows])
            for rows in torch.arange(len(split), device=job.device).split(CHUNK)
        ]
        levels = (127.5 * (torch.cat(drawn).clamp(-1, 1) + 1)).round().byte().cpu()
        return Split(levels, split.labels)

    def _drawn(self, net: "Denoiser", x: Tensor, rng: SampleRng) -> Tensor:
        """Of ``x`` (B, C, H, W) in [-1, 1]: down to ``depth``, and up again by one step for each time."""
        kept = left(x.device)
        x = noised(x, kept[self.depth - 1].expand(len(x)), rng.fork("down").normal(*x.shape[1:]))
        for time in range(self.depth - 1, -1, -1):
            before = kept[time - 1] if time else torch.ones_like(kept[0])
            share = kept[time] / before                                  # of the signal that this time lets through
            noise = net(x, torch.full((len(x),), time, device=x.device))
            clean = ((x - (1 - kept[time]).sqrt() * noise) / kept[time].sqrt()).clamp(-1, 1)
            mean = (before.sqrt() * (1 - share) * clean + share.sqrt() * (1 - before) * x) / (1 - kept[time])
            variance = (1 - before) / (1 - kept[time]) * (1 - share)
            x = mean + variance.sqrt() * rng.fork(time).normal(*x.shape[1:])
        return x


def left(device: torch.device) -> Tensor:
    """(TIMES,) the share of the variance that is still signal after each time."""
    return (1 - torch.linspace(FIRST, LAST, TIMES, dtype=torch.float64)).cumprod(0).float().to(device)


def noised(x: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """``x`` (B, C, H, W) with a share ``signal`` (B,) of its variance left, and ``noise`` for the rest."""
    signal = signal[:, None, None, None]
    return signal.sqrt() * x + (1 - signal).sqrt() * noise


class Denoiser(nn.Module):
    """The noise in images (B, C, H, W) at times (B,): residual layers on all pixels at once, each told the time."""

    def __init__(self, shape: tuple[int, int, int], width: int, blocks: int = 3) -> None:
        super().__init__()
        size = math.prod(shape)
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, blocks * width))
        self.first, self.last = nn.Linear(size, width), nn.Linear(width, size)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """See the class."""
        angles = time[:, None] * torch.exp(torch.linspace(0, -math.log(TIMES), FREQUENCIES, device=x.device))
        told = self.time(torch.cat((angles.sin(), angles.cos()), dim=1)).chunk(len(self.blocks), dim=1)
        inner = self.first(x.flatten(1))
        for block, when in zip(self.blocks, told, strict=True):
            inner = inner + block(inner + when)
        noise: Tensor = self.last(F.silu(inner))
        return noise.view_as(x)
