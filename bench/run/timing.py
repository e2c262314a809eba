"""How long queries and trainings take, timed on as few images as show it."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from bench.dataset import Dataset
from bench.measure.fitting import to_fit
from bench.measure.pipeline import deploy
from bench.oracle.surrogate import Surrogate
from bench.plan.tasks import Task
from bench.protocols import FittedAttack, FittedDefense, Job
from bench.rng import SampleRng
from bench.system.process_state import undisturbed
from bench.system.threads import training_threads

FEW = 4       # images that are timed first, and how many times as many next
ENOUGH = 0.3  # seconds below which a timing is too short
LONG = 2.0    # seconds above which no more images are tried


class _Enough(BaseException):
    """Ends a training that has been timed; no component catches it by mistake."""


def seconds_per_query(
    task: Task, device: torch.device, batch: int, fitted: Mapping[str, Tensor] | None = None
) -> float:
    """Of an image in batches of ``batch``, through the served model and, where the attack takes gradients, back.

    The network's weights do not matter for speed; ``fitted`` is what an output defense has learned that is trained.
    """
    with torch.random.fork_rng([]):
        network = task.build().to(device)
    model = deploy(task, network, task.cell.numerics, device, batch, fitted=fitted)
    gradients = task.attack.access == "gradients"

    def ask(count: int) -> float:
        ids = torch.arange(count)
        x = task.data.test.pixels(ids % len(task.data.test)).to(device).requires_grad_(gradients)
        noise = SampleRng.create(0, ids.to(device), "estimate")
        began = time.perf_counter()
        with torch.set_grad_enabled(gradients):
            logits = model(x, noise)
            if gradients:
                torch.autograd.grad(logits.sum(), x)
        return _now(device) - began

    ask(1)  # warms up
    return _per_image(ask, batch)


def seconds_of_training(task: Task, device: torch.device) -> float | None:
    """Of the training of ``task``, which is a learner or makes its network: all epochs, extrapolated from one.

    It begins on very few images and is stopped after its second epoch, which is timed. Phases are taken to cost what
    the first one costs; what is looked at after each epoch comes on top.

    Returns:
        ``None`` for one that cannot train on few images, or does not tell how far it is.
    """
    start = task.pretrained()

    def begin(data: Dataset, job: Job) -> object:
        return task.trainer(task.build, data.lent(), replace(job, pretrained=start))

    return _seconds_of(begin, task, device, len(task.data.train))


def seconds_of_fit(task: Task, device: torch.device) -> float | None:
    """Of fitting the attack of ``task`` on other images: all epochs, as :func:`seconds_of_training` times them."""
    attack = cast(FittedAttack, task.attack)
    model = Surrogate([owner.build() for owner in task.sources or (task,)]).to(device).eval()
    most = min(getattr(attack, "most_images", len(task.data.train)), len(task.data.train))

    def begin(data: Dataset, job: Job) -> object:
        return to_fit(attack).fit(model, data.lent(), task.cell.threat.free, job)

    return _seconds_of(begin, task, device, most)


def seconds_of_defense(task: Task, device: torch.device) -> float | None:
    """Of what the output defense of ``task`` learns: all steps, extrapolated from those that it tells of first."""
    defense, data = cast(FittedDefense, task.chain.output), task.data.lent()
    model = Surrogate([task.build()]).to(device).eval()
    try:
        with undisturbed(), training_threads():
            seconds, steps = _epoch(lambda job: to_fit(defense).fit(model, data, job), task.cell.seed, device)
    except Exception:  # of the component's own
        return None
    return seconds * steps


def _seconds_of(begin: Callable[[Dataset, Job], object], task: Task, device: torch.device, most: int) -> float | None:
    """Of work on ``most`` training images in epochs."""
    share = len(task.data.calibration) / max(len(task.data.train), 1)

    epochs = 0

    def timed(count: int) -> float:
        nonlocal epochs
        seen = replace(
            task.data, train=task.data.train.subset(slice(count)),
            calibration=task.data.calibration.subset(slice(max(round(share * count), 1))),
        )  # fmt: skip
        seconds, epochs = _epoch(lambda job: begin(seen, job), task.cell.seed, device)
        return seconds

    try:
        with undisturbed(), training_threads():
            each = _per_image(timed, most)
    except Exception:  # whatever a component makes of so few images
        return None
    return epochs * each * most


def _epoch(begin: Callable[[Job], object], seed: int, device: torch.device) -> tuple[float, int]:
    """The seconds of an epoch of what ``begin`` begins, of the second where there are two; and of how many.

    Epochs are told in equal portions: one that ends the training early tells of all that were left.
    """
    told: list[tuple[int, int, float]] = []

    def progress(done: int, total: int) -> None:
        told.append((done, total, _now(device)))
        if done >= total or len(told) == 2:
            raise _Enough

    begun = time.perf_counter()
    with suppress(_Enough):
        begin(Job(seed, device, progress))
    (_, _, began), (_, total, ended) = [(0, 0, begun), *told][-2:]
    return (ended - began) / max(told[0][0], 1), total


def _per_image(run: Callable[[int], float], most: int) -> float:
    """The seconds of each image when ``run(count)`` takes more and more of them, at most ``most``.

    Until a run is long enough and more images at once no longer make each one cheaper, by a third at least.
    """
    count = min(FEW, most)
    seconds, falls = run(count), True
    while count < most and seconds < LONG and (falls or seconds < ENOUGH):
        before, count = seconds / count, min(FEW * count, most)
        seconds = run(count)
        falls = seconds / count < before * 2 / 3
    return seconds / count


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
