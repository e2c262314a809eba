"""LQ-VAE: classify what a decoder makes of a binary code of the image, so that small changes of it flip few bits.

Kyatham et al., 2019. The filter is trained without the classifier and put before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.oracle.surrogate import Surrogate
from bench.protocols import Job, Stage
from bench.ranges import Count, Few, Positive
from bench.registry import defenses
from bench.rng import SampleRng
from bench.training import TrainingState, seeded
from defenses.logits import straight_through
from defenses.streams import streams

BATCH, LR, DECAY, DECAYED_OVER = 64, 3e-4, 0.98, 10_000
WEIGHT = 10.0     # of reconstruction and of the gradient penalty
STEEPNESS = 500.0  # of the soft code
TOLD = 20         # steps between two words on progress

Gradient = Literal["soft", "identity", "none"]


@defenses("lq-vae")
@dataclass(frozen=True, kw_only=True)
class LQVAE:
    """Encode into ``latent`` bits, of which one is +1 where its mean lies within ``threshold`` of 0, and decode.

    An encoder gives a mean and a variance for each bit; a decoder of its own learns to draw the image from the hard
    bits, another one, of training alone, from soft ones. Trained for ``steps`` batches of 64 images.

    - ``random=True`` is the released evaluation, which draws the latent anew at each query; ``random=False`` is what
      the paper intends, the code of the mean.
    - ``gradient`` is what attacks get that see gradients: ``soft``, of the decoder of the hard bits at the soft code,
      as the authors' own BPDA has it; ``identity``, past the whole filter; ``none``, the true one, which is zero.

    Answers are steps, so attacks that follow small changes of scores see none. The layers are those for 28x28 digits
    (64 channels at the first of four convolutions, two of which halve the sides, and 1,024 features). Images of other
    sizes have the same layers, with a quarter of their own sides in the middle, and black borders up to a multiple of
    4; that, and other values of ``width``, channels of the first layer, are our choice.

    Source:
        Kyatham et al., 2019, arXiv:1903.09940. In torch, RMSProp adds its epsilon outside the root.
    """

    latent: Few = 64
    threshold: Positive = 0.1
    steps: Count = 10_000
    random: bool = False
    gradient: Gradient = "soft"
    width: Few = 64

    stage: ClassVar[Stage] = "output"
    outside: ClassVar[bool] = True
    serving: ClassVar[tuple[str, ...]] = ("random", "gradient")
    knows: ClassVar[tuple[str, ...]] = ("rays",)
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Kyatham et al., 2019, arXiv:1903.09940"

    def fit(self, model: Surrogate, data: Dataset, job: Job) -> Mapping[str, Tensor]:
        """The weights of the encoder and the decoder of hard bits, and what they make of calibration images.

        The classifier has no say.

        Raises:
            ConfigError: the data set has no training images.
        """
        if not len(data.train):
            raise ConfigError(f"lq-vae is trained on images, and {data.name!r} has no training split")
        images = data.train.to(job.device)
        with seeded(job):
            nets = nn.ModuleDict({"encoder": Encoder(images.shape, self.width, self.latent)})
            nets["decoder"], nets["soft"] = (Decoder(images.shape, self.width, self.latent) for _ in range(2))
        nets.to(job.device)
        optimizers = {name: torch.optim.RMSprop(net.parameters(), lr=LR, alpha=0.9) for name, net in nets.items()}
        others = {name: optimizers[name] for name in ("decoder", "soft")}
        state = TrainingState(job, nets, optimizers["encoder"], others)
        streams = SampleRng.create(job.seed, torch.arange(BATCH, device=job.device), "lq-vae")
        with seeded(job):
            first = (state.resume("lq-vae") or {"steps": 0})["steps"]
            for step in range(first, self.steps):
                for optimizer in optimizers.values():
                    optimizer.param_groups[0]["lr"] = LR * DECAY ** (step / DECAYED_OVER)
                rng = streams.fork(step)
                x = images.pixels(rng.fork("rows").integers(len(images), 1)[:, 0])
                self._step(nets, optimizers, 2 * x - 1, rng.fork("latent"))
                done = step + 1
                if done % TOLD == 0 or done == self.steps:
                    job.progress(done, self.steps)
                    if job.scratch.due():
                        state.save("lq-vae", steps=done)
        seen = data.calibration if len(data.calibration) else data.train
        return {**_kept(nets), **self._figures(nets, seen.to(job.device).pixels(slice(1000)))}

    def _step(
        self, nets: nn.ModuleDict, optimizers: Mapping[str, torch.optim.Optimizer], x: Tensor, rng: SampleRng
    ) -> None:
        """One step of the encoder, then one of each decoder, on ``x`` (B, C, H, W) in [-1, 1]."""
        x = x.requires_grad_(True)
        mean, logvar = nets["encoder"](x)
        (slope,) = torch.autograd.grad(mean.sum(), x, create_graph=True)
        steep = (self.threshold - slope.flatten(1).norm(dim=1)).square().mean()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()  # of each bit of each image
        z = self.noisy(mean, logvar, rng)
        drawn = F.mse_loss(nets["soft"](soft_code(z, self.threshold)), x)
        self._descend(optimizers["encoder"], divergence + WEIGHT * (drawn + steep))
        with torch.no_grad():
            mean, logvar = nets["encoder"](x)
            z = self.noisy(mean, logvar, rng)
        codes = {"soft": soft_code(z, self.threshold), "decoder": hard_code(z, self.threshold)}
        for name, code in codes.items():
            self._descend(optimizers[name], WEIGHT * F.mse_loss(nets[name](code), x.detach()))

    def noisy(self, mean: Tensor, logvar: Tensor, rng: SampleRng) -> Tensor:
        """The latent (B, latent) drawn about its ``mean``, with half the threshold of its deviation."""
        return mean + self.threshold * 0.5 * (logvar / 2).exp() * rng.normal(*mean.shape[1:]).to(mean)

    @staticmethod
    def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward(inputs=optimizer.param_groups[0]["params"])
        optimizer.step()

    @torch.no_grad()
    def _figures(self, nets: nn.ModuleDict, x: Tensor) -> dict[str, Tensor]:
        """Of images ``x`` in [0, 1]: the share of bits that are +1, and the error of what is drawn, on that scale."""
        code = hard_code(nets["encoder"](2 * x - 1)[0], self.threshold)
        drawn = (nets["decoder"](code) + 1) / 2
        return {"bits": (code > 0).float().mean(), "rmse": (drawn - x).square().mean().sqrt()}

    def __call__(self, model: nn.Module, calibration: Split, seed: int, fitted: Mapping[str, Tensor]) -> nn.Module:
        """The served model, whose filter has the weights that are ``fitted``."""
        shape = calibration.shape
        nets = nn.ModuleDict({"encoder": Encoder(shape, self.width, self.latent),
                              "decoder": Decoder(shape, self.width, self.latent)})  # fmt: skip
        nets.load_state_dict({name: fitted[name] for name in nets.state_dict()})
        return Filtered(model, nets.to(calibration.images.device).requires_grad_(False), self).eval()


def soft_code(z: Tensor, threshold: float) -> Tensor:
    """The code of ``z`` in (-1, 1), near +1 well within ``threshold`` of 0 and near -1 well outside."""
    return F.softsign(STEEPNESS * (threshold**2 - z.square()))


def hard_code(z: Tensor, threshold: float) -> Tensor:
    """The bits of ``z``: +1 within ``threshold`` of 0, -1 outside. Their gradient is zero."""
    return torch.sign(threshold**2 - z.square())


class Encoder(nn.Module):
    """Means and logarithms of variances (B, latent) each, of images (B, C, H, W) in [-1, 1]."""

    def __init__(self, shape: tuple[int, int, int], width: int, latent: int) -> None:
        super().__init__()
        channels, height, width_ = shape
        self.padding = -width_ % 4, -height % 4
        inside = 2 * width * (-(-height // 4)) * (-(-width_ // 4))
        layers = [(channels, width, 1), (width, width, 2), (width, 2 * width, 2), (2 * width, 2 * width, 1)]
        self.layers = nn.Sequential(
            *(part for inner, outer, stride in layers
              for part in (nn.Conv2d(inner, outer, 3, stride, padding=1), nn.LeakyReLU(0.2))),
            nn.Flatten(), nn.Linear(inside, 16 * width), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.mean, self.logvar = nn.Linear(16 * width, latent), nn.Linear(16 * width, latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        across, down = self.padding
        features = self.layers(F.pad(x, (0, across, 0, down), value=-1.0))
        return self.mean(features), self.logvar(features)


class Decoder(nn.Module):
    """Images (B, C, H, W) in [-1, 1] of codes (B, latent)."""

    def __init__(self, shape: tuple[int, int, int], width: int, latent: int) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        small = 2 * width, -(-self.height // 4), -(-self.width // 4)
        self.dense = nn.Sequential(
            nn.Linear(latent, 16 * width), nn.LeakyReLU(0.2),
            nn.Linear(16 * width, small[0] * small[1] * small[2]), nn.LeakyReLU(0.2), nn.Unflatten(1, small),
        )  # fmt: skip
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(2 * width, 2 * width, 3, padding=1), nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(2 * width, 2 * width, 4, 2, padding=1), nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(2 * width, width, 4, 2, padding=1), nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(width, channels, 3, padding=1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, code: Tensor) -> Tensor:
        """See the class."""
        drawn: Tensor = self.layers(self.dense(code))
        return drawn[..., : self.height, : self.width]


class Filtered(nn.Module):
    """``model`` behind the filter ``nets``: it classifies what is drawn from the bits of an image."""

    def __init__(self, model: nn.Module, nets: nn.ModuleDict, settings: LQVAE) -> None:
        super().__init__()
        self.model, self.nets, self.settings = model, nets, settings

    def drawn(self, x: Tensor, rng: SampleRng | None) -> Tensor:
        """The images (B, C, H, W) in [0, 1] that stand for ``x``, with the gradient that attacks are to see."""
        settings = self.settings
        mean, logvar = self.nets["encoder"](2 * x - 1)
        z = settings.noisy(mean, logvar, streams(rng, x, "lq-vae")) if settings.random else mean
        code = hard_code(z, settings.threshold)
        if settings.gradient == "soft":
            code = straight_through(soft_code(z, settings.threshold), code)
        images: Tensor = (self.nets["decoder"](code) + 1) / 2
        return straight_through(x, images) if settings.gradient == "identity" else images

    def forward(self, x: Tensor, rng: SampleRng | None = None) -> Tensor:
        """Logits (B, K) of ``x`` (B, C, H, W); where the latent is drawn, by the streams of ``rng``, one for each row.

        Raises:
            ValueError: it is random, and there is no ``rng``, or one of another length.
        """
        logits: Tensor = self.model(self.drawn(x, rng))
        return logits


def _kept(nets: nn.ModuleDict) -> dict[str, Tensor]:
    """The weights of what serves."""
    return {name: value for name, value in nets.state_dict().items() if not name.startswith("soft.")}
