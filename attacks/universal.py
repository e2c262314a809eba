"""What attacks share that add one perturbation to every image, fitted on images that are not attacked."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.sourced import Sourced
from bench.dataset import Dataset, Split, grey_levels
from bench.errors import ConfigError
from bench.norms import TINY, lp_norm, project
from bench.oracle import Oracle
from bench.oracle.surrogate import Surrogate
from bench.protocols import Job
from bench.ranges import Count
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat
from defenses.features import features_of, last_linear

Layer = Literal["logits", "features"]
Reader = Callable[[Tensor], Tensor]  # images (B, C, H, W) to what is read of each, (B, d)

NEAR_ZERO = 1e-3  # of eps: where fits begin. At zero a similarity with the clean image has no gradient but roundings


@dataclass(frozen=True, kw_only=True)
class Universal(Sourced, ABC):
    """One perturbation for all images, which costs one query for each. What is asked about is clamped to the box.

    It is fitted on the undefended network, as a control, or on the networks that ``from`` names; labels are never
    looked at. The passes of the fit belong to no image and are not counted.

    Args:
        from_: see :class:`attacks.sourced.Sourced`; of several networks, features stand side by side.
        images: how many training images it is fitted on, at most.
        held_out: how many others of these tell how well it does after each epoch, a quarter of all at most.
        data: ``noise`` fits on as many images of uniform noise, for an attacker without data.
        clipped: whether the fit sees images with the perturbation clamped to the box, as the served model does.
    """

    images: Count = 3000
    held_out: Count = 500
    data: Literal["train", "noise"] = "train"
    clipped: bool = False

    access: ClassVar[Access] = "labels"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    most_queries: ClassVar[int] = 1

    @property
    def most_images(self) -> int:
        """How many training images it looks at, at most."""
        return self.images + self.held_out

    @abstractmethod
    def search(self, model: Surrogate, fitting: Split, held: "HeldOut", threat: Threat, job: Job) -> Tensor:
        """The perturbation (1, C, H, W), inside the ball."""

    def fit(self, model: Surrogate, data: Dataset, threat: Threat, job: Job) -> Mapping[str, Tensor]:
        """See :class:`bench.protocols.FittedAttack`: the perturbation, and how many held-out images it fools."""
        model.requires_grad_(False)
        fitting, held_out = self._drawn(data, job.seed)
        held = HeldOut(model, held_out, job.device)
        found = self.search(model, fitting, held, threat, job).detach()
        unclipped = held.fooled(found, clipped=False)
        return {"perturbation": found, "fooling": held.fooled(found, clipped=True), "fooling_unclipped": unclipped}

    def apply(self, x: Tensor, threat: Threat, fitted: Mapping[str, Tensor]) -> Tensor:
        """See :class:`bench.protocols.FittedAttack`."""
        return project(x + fitted["perturbation"].to(x), x, threat)

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns every image with the perturbation."""
        x_adv = self.apply(x, threat, oracle.fitted)
        oracle.labels(x_adv)
        return x_adv

    def shown(self, x: Tensor, v: Tensor) -> Tensor:
        """What the network sees of ``x`` (B, C, H, W) and the perturbation (1, C, H, W) in the fit."""
        return (x + v).clamp(0, 1) if self.clipped else x + v

    def _drawn(self, data: Dataset, seed: int) -> tuple[Split, Split]:
        """The images to fit on and those held out; of a data set without training images, calibration images."""
        pool = data.train if len(data.train) else data.calibration
        order = SampleRng.create(seed, torch.arange(len(pool)), "universal").keys.argsort()
        held = min(self.held_out, len(pool) // 4)
        chosen = pool.subset(order[: held + self.images])
        if self.data == "noise":
            levels = SampleRng.create(seed, torch.arange(len(chosen)), "universal noise").integers(256, *chosen.shape)
            chosen = Split(levels.to(torch.uint8), chosen.labels)
        else:
            chosen = Split(grey_levels(chosen), chosen.labels)
        return chosen.subset(slice(held, None)), chosen.subset(slice(held))


class HeldOut:
    """Images that no step of a fit sees, and how many of them a perturbation fools."""

    def __init__(self, model: Surrogate, images: Split, device: torch.device) -> None:
        self._model, self._x = model, images.pixels().to(device)
        with torch.no_grad():
            self._clean = _in_parts(model, self._x).argmax(dim=1)

    def fooled(self, v: Tensor, *, clipped: bool) -> Tensor:
        """The share () that ``v`` (1, C, H, W) gives another class than the clean image has."""
        with torch.no_grad():
            x = self._x + v
            found = _in_parts(self._model, x.clamp(0, 1) if clipped else x).argmax(dim=1)
        return (found != self._clean).float().mean() if len(x) else torch.zeros(())


@dataclass(frozen=True, kw_only=True)
class Descended(Universal):
    """A perturbation that an optimiser finds, batch by batch, pulled back into the ball after each step.

    After each epoch it is rated, and the best epoch's is taken.

    Args:
        epochs, batch_size: how often the images are gone through, and how many make a step.

    Raises:
        ConfigError: in the fit, where the loss is no number: the best would be the start, or whatever NaN rates.
    """

    epochs: Count = 2
    batch_size: Count = 32

    @property
    def reads(self) -> Layer:
        """What is read of an image: logits, or the features that go into the last linear layer."""
        return "logits"

    def aims(self, read: Reader, x: Tensor) -> Tensor:
        """What the loss has to know of clean images (B, C, H, W), one line for each; nothing."""
        return x.new_zeros(len(x), 0)

    @abstractmethod
    def loss(self, read: Reader, x: Tensor, v: Tensor, aims: Tensor) -> Tensor:
        """What is minimised over ``v`` (1, C, H, W) on a batch ``x`` (B, C, H, W), a number."""

    @abstractmethod
    def optimiser(self, v: Tensor, threat: Threat) -> torch.optim.Optimizer:
        """Who takes the steps."""

    def steer(self, gradient: Tensor, threat: Threat) -> Tensor:
        """The gradient (1, C, H, W) as the optimiser is to see it."""
        return gradient

    def rating(self, loss: Tensor, fooled: Tensor) -> Tensor:
        """How good an epoch was, by its mean loss and the share of held-out images that are fooled after it."""
        return fooled

    def search(self, model: Surrogate, fitting: Split, held: HeldOut, threat: Threat, job: Job) -> Tensor:
        """See :meth:`Universal.search`."""
        read = reader(model, self.reads, fitting.pixels(slice(2)).to(job.device))
        batches = [slice(first, first + self.batch_size) for first in range(0, len(fitting), self.batch_size)]
        with torch.no_grad():
            aims = torch.cat([self.aims(read, fitting.pixels(part).to(job.device)) for part in batches])
        streams = SampleRng.create(job.seed, torch.arange(len(fitting)), "universal order")
        start = SampleRng.create(job.seed, torch.zeros(1, dtype=torch.int64), "universal start").uniform(*fitting.shape)
        v = in_ball(NEAR_ZERO * threat.eps * (2 * start - 1), threat).to(job.device).requires_grad_(True)
        optimiser = self.optimiser(v, threat)
        best, highest, begin = v.detach().clone(), torch.tensor(-math.inf), 0
        if (kept := job.scratch.load("universal")) is not None:
            v.data.copy_(kept["v"])
            optimiser.load_state_dict(kept["optimiser"])
            best, highest, begin = kept["best"].to(v), kept["highest"], kept["epochs"]
        for epoch in range(begin, self.epochs):
            lost = v.new_zeros(())
            for rows in streams.fork(epoch).keys.argsort().split(self.batch_size):
                loss = self.loss(read, fitting.pixels(rows).to(job.device), v, aims[rows.to(job.device)])
                (gradient,) = torch.autograd.grad(loss, v)
                v.grad = self.steer(gradient, threat)
                optimiser.step()
                v.data.copy_(in_ball(v.data, threat))
                lost += loss.detach() * len(rows) / len(fitting)
            if not bool(lost.isfinite() & v.isfinite().all()):
                raise ConfigError(
                    f"the loss of epoch {epoch + 1} of the fit is {lost.item():g}, and says nothing of a perturbation; "
                    "take a smaller rel_step, or a network whose scores are numbers"
                )
            rating = self.rating(lost, held.fooled(v.detach(), clipped=self.clipped)).cpu()
            if rating > highest:
                best, highest = v.detach().clone(), rating
            if job.scratch.due():
                told = {"v": v.detach(), "optimiser": optimiser.state_dict(), "best": best, "highest": highest}
                job.scratch.save("universal", {**told, "epochs": epoch + 1})
            job.progress(epoch + 1, self.epochs)
        return best


@attacks("universal-noise")
@dataclass(frozen=True, kw_only=True)
class UniversalNoise(Universal):
    """One random perturbation for all images: the control that a fitted one has to beat.

    Args:
        kind: in linf, ``corner`` draws one of the two ends for every value, ``uniform`` any value between. In l2 both
            draw a direction and go to the sphere.
    """

    kind: Literal["corner", "uniform"] = "corner"

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Moosavi-Dezfooli et al., 2017, arXiv:1610.08401 (its control)"

    def search(self, model: Surrogate, fitting: Split, held: HeldOut, threat: Threat, job: Job) -> Tensor:
        """See :meth:`Universal.search`; nothing is searched."""
        rng = SampleRng.create(job.seed, torch.zeros(1, dtype=torch.int64), "universal-noise")
        if threat.norm == "l2":
            direction = rng.normal(*fitting.shape)
            found = threat.eps * direction / (lp_norm(direction, "l2") + TINY)
        else:
            drawn = rng.coins(*fitting.shape) if self.kind == "corner" else rng.uniform(*fitting.shape)
            found = threat.eps * (2 * drawn.float() - 1)
        job.progress(1, 1)
        return found.to(job.device)


def reader(model: Surrogate, layer: Layer, x: Tensor) -> Reader:
    """What reads ``layer`` of images through ``model``; ``x`` (B, C, H, W) are a few of them.

    Raises:
        ConfigError: features are wanted of a network that does not end in one linear layer.
    """
    if layer == "logits":
        return model
    heads = [last_linear(network, x) for network in model.networks]

    def read(x: Tensor) -> Tensor:
        found: list[Tensor] = []
        for network, head in zip(model.networks, heads, strict=True):
            with features_of(head) as seen:
                network(x)
            found += seen
        return torch.cat(found, dim=1)

    return read


def adam(v: Tensor, threat: Threat, rel_step: float, weight_decay: float) -> torch.optim.Optimizer:
    """Adam on ``v`` (1, C, H, W), whose step moves each value by about ``rel_step`` of what eps leaves to it."""
    each = threat.eps if threat.norm == "linf" else threat.eps / math.sqrt(v.numel())
    return torch.optim.Adam([v], lr=rel_step * each, weight_decay=weight_decay)


def in_ball(v: Tensor, threat: Threat) -> Tensor:
    """``v`` (1, C, H, W), clamped to the ball around zero or, in l2, scaled down to it."""
    if threat.norm == "linf":
        return v.clamp(-threat.eps, threat.eps)
    return v * (threat.eps / (lp_norm(v, "l2") + TINY)).clamp(max=1)


def _in_parts(model: Surrogate, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(256)]) if len(x) else x.new_zeros(0, 1)
