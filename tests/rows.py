"""Rows that nobody ran: of a few samples that fell where a test says."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from bench.catalogue import declared
from bench.oracle import NEVER
from bench.plan.cell import Cell, Component
from bench.registry import defenses
from bench.results.shards import Shard
from bench.results.store import Row
from bench.threat import Threat


def defends(spec: str) -> Component:
    """A defense as rows hold it; that of a name that is not registered does not say where it acts."""
    return Component(spec, stage=declared(defenses, spec, "stage", ""))


def row(
    hits: Sequence[int],
    defense: str = "none",
    attack: str = "square",
    *,
    budget: int = 100,
    asked: int | None = None,
    final_wrong: Sequence[int] = (),
    error: str | None = None,
    traits: tuple[str, ...] = (),
    invalid: bool = False,
    **fields: Any,
) -> Row:
    """A row whose samples fell at the queries ``hits``; ``asked`` samples were planned."""
    n = len(hits)
    cell = Cell(
        dataset=Component("digits"),
        model=Component("cnn"),
        defense=() if defense == "none" else (defends(defense),),
        attack=Component(attack, traits=traits, control=attack.startswith("transfer")),
        threat=fields.pop("threat", Threat("linf", 8 / 255, "scores", budget)),
        ids=tuple(range(asked or n)),
        seed=fields.pop("seed", 0),
        **fields,
    )
    final = [1 if hit != NEVER or i in final_wrong else 0 for i, hit in enumerate(hits)]
    records = pd.DataFrame({"sample_id": range(n), "y": 0, "first_hit": hits, "final_pred": final, "invalid": invalid})
    return Row(cell, records if n else pd.DataFrame(), (Shard(cell, 0, asked or n, error=error),))


def reached(hits: Sequence[int], distances: Sequence[float], eps: float = 0.1, defense: str = "none") -> Row:
    """A row of a minimum-norm attack whose nearest misclassified queries lay at ``distances``."""
    before = row(hits, defense, "rays", threat=Threat("linf", eps, "labels", 100))
    return Row(before.cell, before.records.assign(best_distance=distances), before.shards)


def learner(wrong: int, n: int, defense: str = "none", attack: str = "standard", seed: int = 0) -> Row:
    plain = row([NEVER] * n, defense, attack, threat=Threat("l0", 1.0, "training-data"), seed=seed)
    records = pd.DataFrame({"sample_id": range(n), "y": 0, "final_pred": [1] * wrong + [0] * (n - wrong)})
    figures = {"train_accuracy": 0.975, "changed_pixels_mean": 1.0, "peak_test_accuracy": 0.925}
    return Row(plain.cell, records, (Shard(plain.cell, 0, n, figures=figures),))
