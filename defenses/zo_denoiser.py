"""ZO-AE-DS: a denoiser before a black box, trained by what the box answers alone. Zhang et al., ICLR 2022.

For whoever is to make a service robust that is not theirs: all that they can change is what it is asked.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.oracle.surrogate import Surrogate
from bench.protocols import Job, Stage
from bench.ranges import Count, Few, NonNegative, Positive, Whole
from bench.registry import defenses
from bench.rng import SampleRng
from bench.training import TrainingState, seeded, small_images
from defenses.streams import streams

BATCH, LR = 32, 1e-3
TOLD = 10  # steps between two words on progress


@defenses("zo-denoiser")
@dataclass(frozen=True, kw_only=True)
class ZerothOrderDenoiser:
    """Denoise a query, draw it anew from a code of ``latent`` numbers, and ask the network about that.

    First a denoiser, an encoder and a decoder learn together, in ``warm_up`` steps, to draw clean images from noisy
    ones; that asks nothing. Then, in ``steps`` steps, denoiser and encoder learn that the network answers about noisy
    images what it answers about clean ones, while the decoder stays. Its derivatives by the code come of its answers:
    one question for each number of the code of each image, moved by ``mu``, and one for the code itself. The row says
    how many ``queries`` that took. ``train=gradients`` is the control, which has the true derivatives of the network.

    It answers the mean probabilities of ``draws`` copies of an image under noise ``sigma``, each of them a question to
    the network. Small networks of fully connected layers, for images below 16 pixels a side; the paper has large
    denoisers that were trained before, a code of 192 numbers, and certifies by 10,000 draws.

    Source:
        Zhang et al., ICLR 2022, arXiv:2203.14195: coordinate-wise finite differences in the code of an auto-encoder.
        Sizes, ``mu``, steps and the optimiser (Adam) are ours.
    """

    sigma: NonNegative = 0.25
    latent: Few = 16
    mu: Positive = 0.01
    warm_up: Whole = 1000
    steps: Count = 300
    draws: Few = 8
    width: Few = 128
    train: Literal["queries", "gradients"] = "queries"

    stage: ClassVar[Stage] = "output"
    random: ClassVar[bool] = True
    outside: ClassVar[bool] = True
    serving: ClassVar[tuple[str, ...]] = ("draws",)
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Zhang et al., ICLR 2022, arXiv:2203.14195"

    def fit(self, model: Surrogate, data: Dataset, job: Job) -> Mapping[str, Tensor]:
        """The weights of denoiser, encoder and decoder, and the ``queries`` that they cost.

        Raises:
            ConfigError: no training images, or images of 16 pixels a side or more.
        """
        if not len(data.train) or not small_images(data):
            raise ConfigError(f"zo-denoiser is trained on images below 16 pixels a side; {data.name!r} has none")
        train = data.train.to(job.device)
        with seeded(job):
            nets = Redrawn(train.shape, self.width, self.latent).to(job.device)
        learning = [*nets.denoiser.parameters(), *nets.encoder.parameters()]
        first, second = torch.optim.Adam(nets.parameters(), lr=LR), torch.optim.Adam(learning, lr=LR)
        state = TrainingState(job, nets, first, {"second": second})
        loss = Asking(model, nets.decoder, self.mu) if self.train == "queries" else Looking(model, nets.decoder)
        streams = SampleRng.create(job.seed, torch.arange(BATCH, device=job.device), "zo-denoiser")
        total = self.warm_up + self.steps
        with seeded(job):
            done = state.resume("zo-denoiser") or {"steps": 0, "queries": 0}
            queries = done["queries"]
            for step in range(done["steps"], total):
                rng = streams.fork(step)
                x = train.pixels(rng.fork("rows").integers(len(train), 1)[:, 0])
                noisy = x + self.sigma * rng.fork("noise").normal(*x.shape[1:])
                if step < self.warm_up:
                    _descend(first, F.mse_loss(nets(noisy), x))
                else:
                    with torch.no_grad():
                        y = model(x).argmax(1)
                    value, asked = loss(nets.code(noisy), y)
                    _descend(second, value)
                    queries += len(x) + asked
                if (step + 1) % TOLD == 0 or step + 1 == total:
                    job.progress(step + 1, total)
                    if job.scratch.due():
                        state.save("zo-denoiser", steps=step + 1, queries=queries)
        return {**nets.state_dict(), "queries": torch.tensor(queries)}

    def __call__(self, model: nn.Module, calibration: Split, seed: int, fitted: Mapping[str, Tensor]) -> nn.Module:
        """The served model, whose denoiser has the weights that are ``fitted``."""
        nets = Redrawn(calibration.shape, self.width, self.latent)
        nets.load_state_dict({name: fitted[name] for name in nets.state_dict()})
        nets = nets.to(calibration.images.device).requires_grad_(False)
        return Smoothed(model, nets, self.sigma, self.draws).eval()


Loss = Callable[[Tensor, Tensor], tuple[Tensor, int]]  # of codes (B, latent) with classes (B,), and images it asked


@dataclass(frozen=True)
class Asking:
    """The cross-entropy of what a black box answers about drawn codes, with a gradient made of answers.

    Each derivative by one number of the code is (loss at ``mu`` more - loss) / ``mu``, which is off by half of ``mu``
    times the second derivative at most.
    """

    model: nn.Module
    decoder: nn.Module
    mu: float

    def __call__(self, code: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """A scalar whose gradient by ``code`` (B, latent) is that of the mean loss, and how many images it asked."""
        slope, asked = self.slope(code.detach(), y)
        return (code * slope).sum() / len(code), asked

    @torch.no_grad()
    def slope(self, code: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """The derivative (B, latent) of each loss by its code, and how many images it took."""
        count, latent = code.shape
        moves = torch.cat((code.new_zeros(1, latent), self.mu * torch.eye(latent).to(code)))
        asked = (code[:, None] + moves).flatten(0, 1)                              # (B * (1 + latent), latent)
        logits = self.model(self.decoder(asked))
        losses = F.cross_entropy(logits, y.repeat_interleave(1 + latent), reduction="none").view(count, 1 + latent)
        return (losses[:, 1:] - losses[:, :1]) / self.mu, len(asked)


@dataclass(frozen=True)
class Looking:
    """The same loss with the gradient of the network itself, which only its owner has."""

    model: nn.Module
    decoder: nn.Module

    def __call__(self, code: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """The mean loss of ``code`` (B, latent), and how many images it asked."""
        return F.cross_entropy(self.model(self.decoder(code)), y), len(code)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


class Redrawn(nn.Module):
    """Images (B, C, H, W), denoised, encoded and drawn again."""

    def __init__(self, shape: tuple[int, int, int], width: int, latent: int) -> None:
        super().__init__()
        channels, height, across = shape
        pixels = channels * height * across
        self.denoiser = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, channels, 3, padding=1)
        )
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, latent))
        self.decoder = nn.Sequential(
            nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, pixels), nn.Sigmoid(), nn.Unflatten(1, shape)
        )

    def code(self, x: Tensor) -> Tensor:
        """The numbers (B, latent) that stand for ``x``, whose noise the denoiser has taken off."""
        code: Tensor = self.encoder(x - self.denoiser(x))
        return code

    def forward(self, x: Tensor) -> Tensor:
        """What is drawn of them, in [0, 1]."""
        drawn: Tensor = self.decoder(self.code(x))
        return drawn


class Smoothed(nn.Module):
    """``model`` asked about noisy copies of an image, each of them drawn anew by ``nets``."""

    def __init__(self, model: nn.Module, nets: Redrawn, sigma: float, draws: int) -> None:
        super().__init__()
        self.model, self.nets, self.sigma, self.draws = model, nets, sigma, draws

    def forward(self, x: Tensor, rng: SampleRng | None = None) -> Tensor:
        """Logarithms of mean probabilities (B, K) of ``x`` (B, C, H, W), by the streams of ``rng``, one for each row.

        Raises:
            ValueError: no ``rng``, or one of another length.
        """
        drawn = streams(rng, x, "zo-denoiser").normal(self.draws, *x.shape[1:]).to(x)
        copies = (x[:, None] + self.sigma * drawn).flatten(0, 1)                   # (B * draws, C, H, W)
        likely: Tensor = self.model(self.nets(copies)).log_softmax(1).view(len(x), self.draws, -1)
        return likely.logsumexp(1) - math.log(self.draws)
