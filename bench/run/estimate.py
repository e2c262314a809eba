"""What a run would cost, from a few timed batches."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.measure.pipeline import deploy
from bench.plan.tasks import Task
from bench.results.store import Store
from bench.rng import SampleRng
from bench.tracks import track_of

TIMED = 3  # batches, after one that warms up


@dataclass(frozen=True)
class Estimate:
    """The most that a cell can still cost: samples to run, queries for them, and seconds to ask those.

    Samples that fall early cost less; training comes on top and is not in ``seconds``, which are ``None`` where it is
    all there is, and for a service, whose time is its own.
    """

    task: Task
    samples: int
    queries: int
    seconds: float | None


def estimate(tasks: Sequence[Task], store: Store, device: torch.device, batch_size: int) -> list[Estimate]:
    """Plan ``tasks`` against what ``store`` holds; nothing is trained, attacked or written."""
    timings: dict[tuple[object, ...], float] = {}
    plans = []
    for task in tasks:
        samples = len(store.missing(task.cell))
        queries = track_of(task.cell).queries(task, samples)
        if queries is None or samples == 0:
            plans.append(Estimate(task, samples, 0, None if samples else 0.0))
            continue
        if task.service:  # of which a plan asks nothing
            plans.append(Estimate(task, samples, queries, None))
            continue
        batch = min(batch_size, samples)
        served = (part for part in task.cell.defense if part.stage == "output")  # the others change no network's speed
        parts = tuple((part.spec, part.version) for part in (task.cell.dataset, task.cell.model, *served))
        kind = (*parts, task.attack.access, batch)
        if kind not in timings:
            timings[kind] = _seconds_per_query(task, device, batch)
        plans.append(Estimate(task, samples, queries, queries * timings[kind]))
    return plans


def _seconds_per_query(task: Task, device: torch.device, batch: int) -> float:
    """Time a batch through the served model, and back where the attack takes gradients; weights do not matter."""
    with torch.random.fork_rng([]):
        network = task.build().to(device)
    model = deploy(task, network, task.cell.numerics, device, batch)
    gradients = task.attack.access == "gradients"
    ids = torch.arange(batch)
    x = task.data.test.pixels(ids % len(task.data.test)).to(device).requires_grad_(gradients)
    noise = SampleRng.create(0, ids.to(device), "estimate")
    times = []
    for _ in range(1 + TIMED):
        began = time.perf_counter()
        with torch.set_grad_enabled(gradients):
            logits = model(x, noise)
            if gradients:
                torch.autograd.grad(logits.sum(), x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:]) / batch
