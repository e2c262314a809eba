"""What every model keeps to: logits of images in [0, 1], which it normalises inside."""

import torch
from torch import Tensor, nn

from bench.check.subject import Subject
from bench.check.verdict import Broken, Remark, Rules, require
from bench.errors import BenchError
from bench.measure.probe import ROUNDED, difference
from bench.models import check_logits
from bench.models.lent import changes, contents, own, some
from bench.models.weights import state_fingerprint
from bench.oracle.served import ServedModel
from bench.rng import SampleRng, global_generators

Shape = tuple[int, int, int]
SHAPES: tuple[tuple[Shape, int], ...] = (  # images and classes that are tried, the commonest sizes
    ((1, 8, 8), 10), ((3, 32, 32), 10), ((3, 32, 32), 100), ((1, 28, 28), 10), ((3, 64, 64), 200),
    ((3, 224, 224), 1000),
)  # fmt: skip
IMAGES = 8
FLAT = 1e-3  # spread of the logits over images in [0, 1], as a share of their size, below which pixels hardly matter
STEEP = 100  # times more that pixels of 0 to 255 move them


def fitting(subject: Subject) -> tuple[Shape, int]:
    """The first of :data:`SHAPES` that the model takes.

    Raises:
        Broken: it takes none.
    """
    reasons = []
    for shape, classes in SHAPES:
        try:
            check_logits(_built(subject, shape, classes), classes, shape)
        except BenchError as error:
            reasons.append(str(error))
        else:
            return shape, classes
    sizes = ", ".join(f"{'x'.join(map(str, shape))} in {classes} classes" for shape, classes in SHAPES)
    raise Broken(f"it takes none of {sizes}: {reasons[0]}", "run it on data of its own: bench run --dataset ... --n 20")


def _built(subject: Subject, shape: Shape, classes: int) -> nn.Module:
    with global_generators(0):
        network: nn.Module = subject.component(classes, shape, None)
    return network


def _tried(subject: Subject) -> tuple[nn.Module, Tensor]:
    shape, classes = fitting(subject)
    x = torch.rand(IMAGES, *shape, generator=torch.Generator().manual_seed(1))
    return _built(subject, shape, classes), x


def _ask(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return ServedModel(network)(x, SampleRng.create(0, torch.arange(len(x)), "model"))


def answers(subject: Subject) -> str:
    """Finite float32 logits, one for each class, in eval mode."""
    network, x = _tried(subject)
    logits = _ask(network, x)
    training = sum(part.training for part in network.modules())
    require(not training, f"{training} parts are in training mode", "return the network after .eval()")
    require(logits.isfinite().all(), "NaN or infinite logits", "check the weights and what normalises")
    require(logits.dtype == torch.float32, f"logits are {logits.dtype}", "return float32")
    return f"{logits.shape[1]} logits from images {'x'.join(map(str, x.shape[1:]))}, float32, finite"


def repeats(subject: Subject) -> str:
    """One question, one answer, and one network each time it is made."""
    network, x = _tried(subject)
    first, second = _ask(network, x), _ask(network, x)
    require(torch.equal(first, second), f"two answers to one question, {float((first - second).abs().max()):.2g} apart",
            "call .eval(), or F.dropout(x, training=self.training); a random model is an output defense")  # fmt: skip
    again, _ = _tried(subject)
    same = state_fingerprint(again) == state_fingerprint(network)
    require(same, "other weights each time it is made", "seed what it draws, or load the weights from a file")
    return "the same answer each time"


def sees_no_batch(subject: Subject) -> str:
    """A row's logits do not depend on the rest of its batch."""
    network, x = _tried(subject)
    whole, alone = _ask(network, x), torch.cat([_ask(network, row) for row in x.split(1)])
    gap = float(difference(whole, alone).max())
    require(gap <= ROUNDED, f"alone, logits differ by {gap:.2g} of their size",
            "normalise by fixed numbers, not by the mean of the batch; call .eval()")  # fmt: skip
    return "rows answer alone as in a batch"


def reacts(subject: Subject) -> str:
    """Pixels between 0 and 1 make a difference: the network does not wait for 0 to 255."""
    network, x = _tried(subject)
    near, far = (_ask(network, scale * x) for scale in (1.0, 255.0))
    moved, much = ((logits.std(dim=0) / logits.abs().amax().clamp(min=1e-12)).amax() for logits in (near, far))
    fix = "take images in [0, 1] and normalise inside: (x - mean) / std, or x * 255 first"
    require(near.std(dim=0).amax() > 0, "every image gets the same logits", fix)
    flat = moved < FLAT and much > STEEP * moved
    require(not flat, f"pixels in [0, 1] move the logits by {float(moved):.1g} of their size, those in [0, 255] by "
            f"{float(much):.1g}", fix)  # fmt: skip
    return f"images in [0, 1] move the logits by {float(moved):.2g} of their size"


def has_gradients(subject: Subject) -> str:
    """A gradient reaches every image, finite and not zero."""
    network, x = _tried(subject)
    x = x.requires_grad_(True)
    score = network(x)[:, 0].sum()
    fix = "leave out torch.no_grad and .detach() in forward; white-box attacks follow the gradient"
    require(score.requires_grad, "the logits have no gradient", fix)
    (gradient,) = torch.autograd.grad(score, x, allow_unused=True)
    require(gradient is not None, "no gradient reaches the images", fix)
    require(gradient.isfinite().all(), "the gradient is NaN or infinite", "clamp what is divided by or rooted")
    zero = int((gradient == 0).flatten(1).all(dim=1).sum())
    if zero:
        return Remark(f"the gradient of the first logit is zero on {zero} of {len(x)} images")
    return "finite and not zero"


def leaves_no_trace(subject: Subject) -> str:
    """A question changes neither the images nor the network, of which a copy can be made."""
    network, x = _tried(subject)
    network = own(network, lambda: _tried(subject)[0])
    given, before = x.clone(), contents(network)
    with torch.no_grad():
        network(given)
    require(torch.equal(given, x), "forward writes into the images", "work on x.clone(), and no x.sub_(mean)")
    changed = changes(before, contents(network))
    require(not changed, f"a question changes {some(changed)}", "keep nothing in self during forward")
    return "images and network stay as they were; it can be copied"


def trial(subject: Subject) -> Tensor:
    """A result that is the same in every process."""
    return _ask(*_tried(subject))


RULES: Rules[Subject] = {
    "logits": answers, "one question, one answer": repeats, "no view of the batch": sees_no_batch,
    "range of pixels": reacts, "gradients": has_gradients, "inputs untouched": leaves_no_trace,
}  # fmt: skip
