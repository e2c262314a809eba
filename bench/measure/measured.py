"""What came of measuring a shard: a record of each sample, and what was measured once."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor

from bench.dataset import Split
from bench.plan.tasks import Task


class Measured(NamedTuple):
    """One record for each sample, and what was measured once: figures, what probing the served model has shown, the
    numbers that the attack searched in, what was seen after each epoch of the network's training, whether the output
    defense acted in a process of its own (``None`` where there is none), and the final examples, where somebody wants
    them."""

    records: pd.DataFrame
    figures: Mapping[str, float] = {}
    findings: Sequence[Mapping[str, Any]] = ()
    numerics: Mapping[str, Any] = {}
    training: Sequence[Mapping[str, float]] = ()
    isolated: bool | None = None
    examples: Tensor | None = None  # (B, C, H, W)


def records_of(test: Split, rows: Tensor, table: dict[str, Tensor], task: Task) -> pd.DataFrame:
    """One line for each sample: what identifies it, then the columns of ``table`` (B,).

    ``first_hit`` is the query that beat the sample: 0 if it was misclassified when clean, NEVER (-1) if none did.
    ``*_confidence`` is the mean probability of the predicted class, ``*_nll`` minus the logarithm of that of the true
    class, ``*_brier`` the squared distance from the truth; ``twin_pred`` is the undefended prediction on the clean
    image, ``logit_change`` (l2) and ``probability_change`` (total variation) are what the defense does to its scores.
    ``best_distance`` is that of the nearest misclassified query of a minimum-norm attack, in the norm of the threat: 0
    if the clean image was misclassified, NaN if no query was, and for other attacks. ``fell_to`` names the attack that
    beat the sample where several took turns; it is "" where none did, and for single attacks. ``unconfirmed`` counts
    the hits in bf16 that float32 has denied, after which the search went on. ``surrogate_forwards`` and
    ``surrogate_backwards`` are the mean passes of an attacked sample through the networks that its example was made on.
    ``applied_pred`` is the class of what an attack that was fitted makes of the image, also of one that was
    misclassified when clean.
    """
    cell = task.cell
    identity = {
        "sample_id": rows.numpy(),
        "input_hash": [blake2b(test.images[row].numpy().tobytes(), digest_size=8).hexdigest() for row in rows],
        "y": test.labels[rows].numpy(),
    }
    measured: dict[str, Any] = {name: column.cpu().numpy() for name, column in table.items()}
    return pd.DataFrame({**identity, **measured, "seed": cell.seed, "attack_version": str(cell.attack.version)})
