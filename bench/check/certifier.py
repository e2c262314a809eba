"""What every certifier keeps to, on a linear network, where the true radius of every image is known."""

import math

import torch
from torch import Tensor, nn

from bench.check.problem import SAMPLES, SHAPE, images
from bench.check.subject import Subject
from bench.check.verdict import Rules, require
from bench.norms import DUAL
from bench.protocols import Certificates
from bench.rng import SampleRng

BATCH = 256
SLACK = 1 + 1e-6  # of rounding
FALSE = 1e-3      # a probability below which no certificates fail together by chance


def linear() -> tuple[nn.Module, Tensor]:
    """A network of two classes, and the weights (C, H, W) whose sign of ``weights * (x - 0.5) + 0.02`` decides."""
    weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)) / math.sqrt(math.prod(SHAPE))
    layer = nn.Linear(weights.numel(), 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack((-weights.flatten(), weights.flatten())))
        layer.bias.copy_(torch.tensor([1.0, -1.0]) * (weights.sum() / 2 - 0.02))
    return nn.Sequential(nn.Flatten(), layer).eval(), weights


def certified(subject: Subject, rows: Tensor | None = None, seed: int = 0, batch: int = BATCH) -> Certificates:
    """What it certifies of some images by the linear network."""
    rows = torch.arange(SAMPLES) if rows is None else rows
    x, network = images()[0][rows], linear()[0]
    with torch.no_grad():
        found: Certificates = subject.component(network, x.clone(), SampleRng.create(seed, rows, "certificate"), batch)
    return found


def is_true(subject: Subject) -> str:
    """No radius is larger than the distance to the boundary, but for the chance that it declares."""
    x, (network, weights), found = images()[0], linear(), certified(subject)
    require(found.radius.shape == found.predicted.shape == (SAMPLES,), "not one radius for each image",
            "return Certificates of tensors (B,)")  # fmt: skip
    score = (weights * (x - 0.5)).flatten(1).sum(dim=1) + 0.02
    distance = score.abs() / torch.linalg.vector_norm(weights, ord=DUAL[subject.component.norm])
    right = found.predicted == network(x).argmax(dim=1)
    proven = ~found.abstained
    false = int((proven & ((found.radius > distance * SLACK) | (~right & (found.radius > 0)))).sum())
    chance = sum(math.comb(SAMPLES, k) * found.alpha**k * (1 - found.alpha) ** (SAMPLES - k)
                 for k in range(false, SAMPLES + 1))  # fmt: skip
    require(not false or chance > FALSE, f"{false} of {int(proven.sum())} certificates are false on a linear network",
            "look for draws that are counted twice, or a bound on the wrong side")  # fmt: skip
    require(proven.any(), f"it abstains on all {SAMPLES} images of a linear network", "look at how votes are counted")
    require((found.radius[found.abstained] == 0).all(), "it has radii where it abstained", "return 0 there")
    return f"{int(proven.sum())} of {SAMPLES} certified on a linear network, none too far"


def repeats(subject: Subject) -> str:
    """One seed, one result, whatever the global generators hold."""
    torch.manual_seed(11)
    first = certified(subject)
    torch.manual_seed(12)
    again = certified(subject)
    same = torch.equal(first.radius, again.radius) and torch.equal(first.votes, again.votes)
    require(same, "one seed gives two results", "draw from rng alone: rng[rows].fork(draws).normal(...)")
    return "one seed gives one result, from the streams that it is given"


def sees_no_batch(subject: Subject) -> str:
    """What is proven of an image depends neither on the images beside it nor on the size of batches."""
    whole, few = certified(subject), torch.tensor([0, 4, 11])
    part = certified(subject, few, batch=37)
    same = torch.equal(part.votes, whole.votes[few]) and torch.equal(part.radius, whole.radius[few])
    require(same, "images fare otherwise in another batch", "number the draws of each image, and draw from rng[rows]")
    return "each image fares as in any other batch"


def trial(subject: Subject) -> Tensor:
    """A result that is the same in every process."""
    return certified(subject).radius


RULES: Rules[Subject] = {
    "true on a linear network": is_true, "one seed, one result": repeats, "no view of the batch": sees_no_batch,
}  # fmt: skip
