"""REM, robust error-minimising noise: what EM does, against learners who train adversarially."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.dataset import Dataset, Split, grey_levels
from bench.errors import ConfigError
from bench.norms import project
from bench.protection import check_share, fitting, merge, protected_rows
from bench.protocols import Job, Stage
from bench.ranges import Count, Positive
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Norm, Threat
from bench.training import Recipe, augment, fit, frozen
from defenses.levels import moved, whole_levels
from defenses.pgd_at import PGDAdversarialTraining
from defenses.surrogate import check_network, surrogate, surrogate_job

CHUNK = 128  # images that get their final noise at a time


@defenses("rem")
@dataclass(frozen=True, kw_only=True)
class RobustErrorMinimising:
    """Add the noise in the linf ball that keeps the loss small whatever an adversary and augmentation do after it.

    A network of the defender's own is trained for ``epochs``. Each batch gets noise for the network as it is: ``steps``
    steps down the sign of the gradient, of size ``rel_step * eps``, from a random start. The gradient is the sum over
    ``draws`` random augmentations of the data set's own kind; after each, PGD raises the loss again inside
    ``adv_eps``, and the gradient passes by what it added. The network then learns from the batch with noise,
    augmentation and PGD. In the end all images get their noise for the finished network, rounded to whole grey levels.

    ``adv_eps`` has to be the radius of the adversarial training to be withstood, and is less than ``eps``, or little is
    left of the noise. With ``adv_eps`` 0 there is no adversary. ``share`` is the part of the training images to
    protect; the network sees no others. ``network`` is an untrained one by name: ``cnn`` for images below 16 pixels and
    else ``resnet18``, unless given.

    An image costs ``steps * draws * (adv_steps + 1) + adv_steps + 1`` forward and backward passes an epoch: 561 with
    the published settings, in 13 epochs (5,000 batches of CIFAR-10). The learning rate follows one cycle, where the
    authors divide it by ten after 2,000 and 4,000 batches.

    Source:
        Fu et al., ICLR 2022, arXiv:2203.14533, equation 4 and algorithm 1, and the released ``generate_robust_em.py``.

    Raises:
        ConfigError: an eps below one grey level or above 1, an adv_eps outside [0, 1], a share outside (0, 1], a
            network that is trained already, or a number of epochs, steps or draws below 1.
    """

    eps: float = 8 / 255
    adv_eps: float = 4 / 255
    epochs: int = 13
    steps: int = 10
    rel_step: float = 0.2
    draws: int = 5
    adv_steps: int = 10
    adv_rel_step: float = 0.2
    network: str | None = None
    batch_size: Count | None = None
    lr: Positive | None = None
    share: float = 1.0

    stage: ClassVar[Stage] = "data"
    norm: ClassVar[Norm] = "linf"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Fu et al., ICLR 2022, arXiv:2203.14533"

    def __post_init__(self) -> None:
        whole_levels(self.eps)
        check_share(self.share)
        check_network(self.network)
        if not 0 <= self.adv_eps <= 1:
            raise ConfigError(f"adv_eps is {self.adv_eps:g}; in linf it is from 0 to 1, such as 4/255")
        for name in ("epochs", "steps", "draws", "adv_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; take at least one")
        for name in ("rel_step", "adv_rel_step"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is a positive share of the radius")

    def __call__(self, data: Dataset, job: Job) -> Split:
        """The training split to release, uint8; everything random is drawn from ``job.seed``."""
        rows = protected_rows(data.train, self.share, job)
        images = Split(grey_levels(data.train)[rows], data.train.labels[rows])
        recipe = Recipe.for_dataset(data, epochs=self.epochs, batch_size=self.batch_size, lr=self.lr)
        own = surrogate_job(job)
        model = surrogate(data, self.network, own)

        def spoil(model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Tensor:
            noisy = self.minimise(model, x, y, rng, recipe)
            return self.attack(model, augment(noisy, recipe.flip, recipe.shift, rng), y, rng)

        fit(model, data.released(images), replace(recipe, flip=False, shift=0), own, perturb=spoil)
        images, rng = images.to(job.device), SampleRng.create(own.seed, rows.to(job.device), "final noise")
        protected = [
            moved(images.images[part], 255 * (self.minimise(model, x, images.labels[part], rng[part], recipe) - x))
            for part in torch.arange(len(images), device=job.device).split(fitting(CHUNK, images.shape))
            for x in [images.pixels(part)]
        ]
        return merge(data.train, rows, torch.cat(protected))

    def minimise(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng, recipe: Recipe) -> Tensor:
        """``x`` (B, C, H, W) with the noise that keeps the loss of ``model`` small after augmentation and attack."""
        threat = Threat("linf", whole_levels(self.eps) / 255, "gradients")
        start = (2 * rng.fork("start").uniform(*x.shape[1:]) - 1) * threat.eps
        noisy = project(x + start, x, threat)
        with frozen(model):
            for step in range(self.steps):
                noisy.requires_grad_(True)
                gradient = torch.zeros_like(x)
                for draw in range(self.draws):
                    stream = rng.fork(step).fork(draw)
                    clean = augment(noisy, recipe.flip, recipe.shift, stream)
                    attacked = clean + (self.attack(model, clean.detach(), y, stream) - clean).detach()
                    loss = F.cross_entropy(model(attacked), y, reduction="sum")  # a sum keeps the samples independent
                    gradient += torch.autograd.grad(loss, noisy)[0]
                noisy = project(noisy.detach() - self.rel_step * threat.eps * gradient.sign(), x, threat)
        return noisy

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Tensor:
        """The inner adversary's images (B, C, H, W) in the ball of ``adv_eps`` around ``x``."""
        pgd = PGDAdversarialTraining(eps=self.adv_eps, steps=self.adv_steps, rel_step=self.adv_rel_step)
        return pgd.perturb(model, x, y, rng.fork("attack"))
