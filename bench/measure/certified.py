"""A certifier on some samples of a cell, and an attack on what it has proven."""

from typing import cast

import pandas as pd
import torch
from torch import Tensor

from bench.measure.contradiction import contradicted
from bench.measure.measured import records_of
from bench.oracle.served import ServedModel
from bench.plan.tasks import Task
from bench.protocols import Certifier
from bench.rng import SampleRng


def certify(task: Task, served: ServedModel, ids: list[int], device: torch.device) -> pd.DataFrame:
    """Certify the samples ``ids``, and attack each certificate within its radius.

    All certifiers of a seed draw the same numbers for a sample, so that their results are paired. ``final_pred`` is the
    class that is certified, or would be where it ``abstained``.

    Returns:
        One record for each sample: the fields of :class:`bench.protocols.Certificates`, of which ``most`` is called
        ``radius_most``, and ``contradicted``, beside what :func:`bench.measure.measured.records_of` adds.
    """
    certifier, rows = cast(Certifier, task.attack), torch.tensor(ids)
    x = task.data.test.pixels(rows).to(device)
    rng = SampleRng.create(task.cell.seed, rows.to(device), "certificate")

    def network(images: Tensor) -> Tensor:
        return served(images, rng)  # which goes unused: it is no random model

    found = certifier(network, x, rng.fork("draws"), served.batch_size)
    attacked = contradicted(certifier, network, x, found, rng.fork("attack"), served.batch_size)
    table = {
        "final_pred": found.predicted,
        "radius": found.radius,
        "radius_most": torch.full_like(found.radius, found.most),
        "abstained": found.abstained,
        "votes": found.votes,
        "n0": torch.full_like(found.votes, found.n0),
        "n": torch.full_like(found.votes, found.n),
        "alpha": torch.full_like(found.radius, found.alpha),
        "invalid": found.invalid,
        "contradicted": attacked,
    }
    return records_of(task.data.test, rows, table, task)
