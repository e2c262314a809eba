"""What a training shows epoch by epoch: whether single-step training has learnt to fool its own attack."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bench.ascent import alignment, input_gradients, pgd, uniform
from bench.dataset import Dataset
from bench.measure.channels import channel_inequality, weight_gradient_norms
from bench.norms import lp_norm
from bench.protocols import Job
from bench.rng import SampleRng
from bench.threat import Threat
from bench.training import frozen

WEIGHED = 16  # of them whose weight gradients are measured
LEAST, MOST, PART = 32, 256, 32  # images looked at: a PART-th of those trained on, within these limits
STEPS, REL_STEP = 10, 0.25  # of the attack that is believed
SINGLE = 1.25  # step of the attack that is not, from a random start: Fast-AT's

Curve = Mapping[str, float]  # one epoch: see :func:`diagnose`


class Watch:
    """Diagnoses a network after each epoch of its training, on the last calibration images, within ``eps``.

    What it saw before a kill is kept with the unfinished training. It leaves the training as it is.
    """

    def __init__(self, data: Dataset, eps: float, job: Job) -> None:
        count = min(max(LEAST, min(MOST, len(data.train) // PART)), len(data.calibration))
        rows = torch.arange(len(data.calibration) - count, len(data.calibration))
        self.x = data.calibration.pixels(rows).to(job.device)
        self.y = data.calibration.labels[rows].to(job.device)
        self.rng = SampleRng.create(job.seed, rows.to(job.device), "diagnostics")
        self.eps, self.scratch = eps, job.scratch
        self.epochs: list[dict[str, float]] = job.scratch.load("curves") or []
        self.notes: dict[str, float] = {}

    def __call__(self, model: nn.Module, epoch: int) -> None:
        """Look at ``model`` after ``epoch`` (0, 1, ...)."""
        if len(self.x):
            self.epochs[epoch:] = [diagnose(model, self.x, self.y, self.eps, self.rng.fork(epoch))]
            self.scratch.save("curves", self.epochs)

    def note(self, name: str, value: float) -> None:
        """What the training says of itself once, such as ``explained_variance``; it stands beside every epoch."""
        self.notes[name] = value

    def columns(self) -> dict[str, Tensor]:
        """What was seen, a float64 value for each epoch, by name."""
        lines = [{**line, **self.notes} for line in self.epochs]
        names = dict.fromkeys(name for line in lines for name in line)
        return {
            name: torch.tensor([line.get(name, math.nan) for line in lines], dtype=torch.float64) for name in names
        }


def diagnose(model: nn.Module, x: Tensor, y: Tensor, eps: float, rng: SampleRng) -> dict[str, float]:
    """What ``model`` withstands on images ``x`` (B, C, H, W) in the linf ball, and how its gradients lie there.

    Returns:
        ``clean_accuracy``; ``step_accuracy`` under one step of 1.25 ``eps`` from a random start and ``pgd_accuracy``
        under ten of ``eps`` / 4; ``alignment``, the mean cosine between the gradient of the loss at an image and at a
        random point of its ball; ``gradient_norm``, the mean l2 norm of the former; ``weight_gradient_norm``, the mean
        norm of what one sample asks of all weights at the end of the single step, which grows without bound where
        training collapses; ``channel_inequality`` and ``step_channel_inequality``, how unequal the channels are on
        clean images and at the end of that step; ``self_information``, the share of the perturbations of that step
        that give an image of another class their own. The last four are left out where a network, or images of one
        class, do not tell them.
    """
    threat = Threat("linf", eps, "gradients")
    with frozen(model):
        single = pgd(model, x, y, threat, rng.fork("step"), 1, SINGLE)
        many = pgd(model, x, y, threat, rng.fork("pgd"), STEPS, REL_STEP)
        here = input_gradients(model, x, y)
        there = input_gradients(model, x + uniform(x, eps, rng.fork("alignment")), y)
        with torch.no_grad():
            clean, step, robust = (float((model(z).argmax(1) == y).float().mean()) for z in (x, single, many))
        read = _self_information(model, x, y, single - x)
    more = {
        "weight_gradient_norm": _told(lambda: weight_gradient_norms(model, single[:WEIGHED], y[:WEIGHED]).mean()),
        "channel_inequality": _told(lambda: channel_inequality(model, x)),
        "step_channel_inequality": _told(lambda: channel_inequality(model, single)),
        "self_information": read,
    }
    return {
        "clean_accuracy": clean,
        "step_accuracy": step,
        "pgd_accuracy": robust,
        "alignment": float(alignment(here, there).mean()),
        "gradient_norm": float(lp_norm(here, "l2").mean()),
        **{name: value for name, value in more.items() if not math.isnan(value)},
    }


@torch.no_grad()
def _self_information(model: nn.Module, x: Tensor, y: Tensor, moved: Tensor) -> float:
    """The share of perturbations ``moved`` (B, C, H, W) that give the next image their own class ``y``, not its own.

    That an image is put in its class for its perturbation's sake is how a single-step training fits itself: the
    network reads what it has itself written there. NaN where no two neighbours differ.

    Source: the idea is He et al., 2023, arXiv:2302.11963, whose abstract alone could be read; the measure is ours.
    """
    other = y != y.roll(1)
    read = model((x.roll(1, dims=0) + moved).clamp(0, 1)).argmax(1) == y
    return float(read[other].float().mean())


def _told(look: Callable[[], Tensor | float]) -> float:
    """What ``look`` gives; NaN for a network, perhaps a user's, that cannot be looked at in this way."""
    try:
        return float(look())
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError):
        return math.nan
