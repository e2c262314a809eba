"""What every service keeps to: answers as it declares, to each image by itself."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.check.model import IMAGES, SHAPES
from bench.check.subject import Subject
from bench.check.verdict import Broken, Remark, Rules, require
from bench.errors import ServiceError
from bench.measure.probe import ROUNDED, difference
from bench.service import Desk, Service

Ask = Callable[[Tensor], Tensor]


def _tried(subject: Subject) -> tuple[Ask, Tensor, Service]:
    """What asks the service, never answered from memory; images that it takes, and what it declares.

    Raises:
        Broken: it takes none.
    """
    reasons = []
    for shape, classes in SHAPES:
        desk = Desk(subject.component.line(), classes)
        x = torch.rand(IMAGES, *shape, generator=torch.Generator().manual_seed(1))
        try:
            _fresh(desk, x)
        except ServiceError as error:
            reasons.append(str(error))
        else:
            return partial(_fresh, desk), x, desk.service
    sizes = ", ".join(f"{'x'.join(map(str, shape))} in {classes} classes" for shape, classes in SHAPES)
    raise Broken(f"it answers none of {sizes}: {reasons[0]}", "run it on its data: bench run --dataset ... --n 20")


def _fresh(desk: Desk, x: Tensor) -> Tensor:
    with desk.asking(f"after {desk.journal.questions}", fresh=True):
        return desk.logits(x)


def answers(subject: Subject) -> str:
    """Finite numbers of the kind that it declares, one or one row for each image."""
    _, x, service = _tried(subject)
    return f"{service.answers} of images {'x'.join(map(str, x.shape[1:]))}, {service.images}"


def repeats(subject: Subject) -> str:
    """One question, one answer, unless it declares otherwise."""
    ask, x, service = _tried(subject)
    same = torch.equal(ask(x), ask(x))
    if service.random or service.stateful:
        return Remark("the same answer twice, though it declares that it may differ" if same else "as it declares, not")
    require(same, "two answers to one question", "declare random=True, or stateful=True")
    return "the same answer each time"


def sees_no_batch(subject: Subject) -> str:
    """An answer does not depend on the rest of its batch."""
    ask, x, service = _tried(subject)
    if service.random or service.stateful or service.batch_dependent:
        return Remark("nobody can tell: it declares that its answers differ anyway")
    gap = float(difference(ask(x), torch.cat([ask(image) for image in x.split(1)])).max())
    require(gap <= ROUNDED, f"alone, answers differ by {gap:.2g} of their size", "declare batch_dependent=True")
    return "images are answered alone as in a batch"


def reacts(subject: Subject) -> str:
    """The image makes a difference."""
    ask, x, service = _tried(subject)
    if float(ask(x).std(dim=0).max()) > 0:
        return "images get different answers"
    return Remark(f"{IMAGES} images of noise get one answer; images come as {service.images}, (B, H, W, C)")


def trial(subject: Subject) -> Tensor:
    """A result that is the same in every process."""
    ask, x, service = _tried(subject)
    return torch.zeros(1) if service.random or service.stateful else ask(x)


RULES: Rules[Subject] = {
    "answers": answers, "one question, one answer": repeats, "no view of the batch": sees_no_batch,
    "images": reacts,
}  # fmt: skip
