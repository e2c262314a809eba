"""A learner trained on a released data set, and what it knows of clean images afterwards."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from bench.dataset import Dataset
from bench.measure.judgement import judge
from bench.measure.measured import Measured, records_of
from bench.measure.perturbation import perturbation
from bench.oracle.served import ServedModel, as_module
from bench.plan.tasks import Task
from bench.protocols import Job
from bench.rng import SampleRng


def learn_released(
    task: Task, released: Dataset, ids: list[int], job: Job, build: Callable[[], nn.Module]
) -> Measured:
    """Train the learner of ``task`` on ``released`` and test it on clean images.

    Returns:
        One record for each test sample of ``ids``, and figures of the whole: train accuracy on the released images,
        test accuracy after the last epoch and after the best one (``peak_epoch``, counted from 1), and how far the
        released images are from the originals. The peak is chosen on the test images, so it favours the learner.
    """
    rows = torch.tensor(ids)
    test = task.data.test
    x, y = test.pixels(rows).to(job.device), test.labels[rows].to(job.device)
    unused = SampleRng.create(job.seed, rows, "learner")  # what a learner returns is deterministic
    piece = f"history-{ids[0]}-{len(ids)}"
    history: list[float] = job.scratch.load(piece) or []

    def watch(network: nn.Module, epoch: int) -> None:
        history[epoch:] = [judge(ServedModel(network), x, y, unused).accuracy]
        job.scratch.save(piece, history)

    network: object = task.attack(build, released.lent(), replace(job, watch=watch))  # type: ignore[call-arg, arg-type]
    model = ServedModel(as_module(network, task.cell.attack.label))
    judged = judge(model, x, y, unused)
    train = released.train
    fitted = judge(model, train.pixels().to(job.device), train.labels.to(job.device), unused)
    broken = ~judged.logits.isfinite().all(dim=1)
    table = {"final_pred": judged.prediction, "final_margin": judged.margin, "invalid": broken}
    figures = {"train_accuracy": fitted.accuracy, "last_test_accuracy": judged.accuracy}
    if history:  # a learner of a user's own may have none
        peak = max(history)
        figures |= {"peak_test_accuracy": peak, "peak_epoch": float(history.index(peak) + 1)}
    return Measured(records_of(test, rows, table, task), {**figures, **perturbation(task.data.train, train)})
