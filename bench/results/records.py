"""The records of a shard: what each column of the table holds, and whether a table that was read can be one."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bench.plan.cell import Cell

if TYPE_CHECKING:
    import pandas as pd
from bench.rules import NEVER

Kind = Literal["whole", "real", "truth", "text"]
Columns = Mapping[str, NDArray[Any]]  # of a table of records: an entry of each for each sample
KINDS = {"whole": "iu", "real": "f", "truth": "b", "text": "OU"}  # as numpy has them
ROUNDING = 1e-5  # of float32, by which a share or a distance may leave its range


class Column(NamedTuple):
    """What a column holds: its kind of values, their range, and whether NaN may stand where a model gave no number."""

    kind: Kind
    low: float = -np.inf
    high: float = np.inf
    nan: bool = False


LEARNED = {name: Column("whole", 0) for name in ("sample_id", "y", "final_pred")}  # that no records can do without
ATTACKED = {**LEARNED, "first_hit": Column("whole", NEVER), "invalid": Column("truth")}  # nor any of an attack
CERTIFIED = {
    **LEARNED, "radius": Column("real", 0), "abstained": Column("truth"), "contradicted": Column("truth"),
    "invalid": Column("truth"),
}  # nor any of a certifier
KNOWN: Mapping[str, Column] = {
    **ATTACKED,
    **CERTIFIED,
    "radius_most": Column("real", 0),
    **{name: Column("whole", 0) for name in ("votes", "n0", "n")},
    "alpha": Column("real", 0, 1),
    "seed": Column("whole"),
    "forwards": Column("whole", 0),
    "backwards": Column("whole", 0),
    "unconfirmed": Column("whole", 0),
    "restarts_used": Column("whole", 0),  # of rows from before it was dropped: it held what the attack was allowed
    "clean_pred": Column("whole", 0),
    "twin_pred": Column("whole", 0),
    "applied_pred": Column("whole", 0),
    **{f"{when}_share": Column("real", 0, 1) for when in ("clean", "final")},
    **{f"{when}_confidence": Column("real", 0, 1, nan=True) for when in ("clean", "final")},
    **{f"{when}_brier": Column("real", 0, 2, nan=True) for when in ("clean", "final")},
    **{f"{when}_nll": Column("real", 0, nan=True) for when in ("clean", "final")},
    **{f"{when}_margin": Column("real", nan=True) for when in ("clean", "final", "best")},
    "logit_change": Column("real", 0, nan=True),
    "probability_change": Column("real", 0, 1, nan=True),
    **{name: Column("real", 0) for name in ("norm_linf", "norm_l2", "rmse", "ball_violation", "box_violation")},
    "best_distance": Column("real", 0, nan=True),
    **{name: Column("real", 0) for name in ("surrogate_forwards", "surrogate_backwards")},
    "input_hash": Column("text"),
    "attack_version": Column("text"),
    "fell_to": Column("text"),
}


def check_records(records: Columns, cell: Cell, ids: Sequence[int]) -> None:
    """Whether ``records`` can be those of the samples ``ids`` of ``cell``.

    Raises:
        ValueError: a column is missing, of another type or out of its range, or the samples, the seed, the version of
            the attack or the queries are not those of the cell. The message names the first of these.
    """
    certifies = cell.threat.proves
    for name in ATTACKED if cell.threat.asks else CERTIFIED if certifies else LEARNED:
        if name not in records:
            raise ValueError(f"has no column {name}")
    for name, values in records.items():
        if name in KNOWN:
            _check_column(name, values, KNOWN[name])
    if not np.array_equal(records["sample_id"], ids):
        raise ValueError("holds other samples than its JSON says")
    if "seed" in records and (records["seed"] != cell.seed).any():
        raise ValueError(f"is of another seed than {cell.seed}")
    if "attack_version" in records and set(records["attack_version"].tolist()) - {str(cell.attack.version)}:
        raise ValueError(f"is of another version of the attack than {cell.attack.version}")
    if cell.threat.asks:
        _check_queries(records, cell.threat.query_budget or 0)
    if certifies:
        _check_certificates(records)


def joined(parts: Sequence[Columns]) -> dict[str, NDArray[Any]]:
    """The records of ``parts`` as one table in the order of their samples, each sample once, as the first has it.

    Where one of them does not have a column of the others, it holds NaN.
    """
    names = list(dict.fromkeys(name for part in parts for name in part))
    whole = {name: np.concatenate([part.get(name, np.full(length(part), np.nan)) for part in parts]) for name in names}
    if not length(whole):
        return {}
    _, first = np.unique(whole["sample_id"], return_index=True)
    return {name: values[first] for name, values in whole.items()}


def length(records: Columns) -> int:
    """For how many samples."""
    return len(next(iter(records.values()), ()))


def rows_of(records: Columns, which: NDArray[Any]) -> Columns:
    """The records of some samples: a mask (n,), or places in their order; nothing where there are none."""
    kept = {name: values[which] for name, values in records.items()}
    return kept if length(kept) else {}


def frame(records: Columns) -> "pd.DataFrame":
    """The same as pandas has it."""
    import pandas as pd  # which is slow to come, and which tables need not

    told = {name: values.tolist() if values.dtype.kind in "OU" else values for name, values in records.items()}
    return pd.DataFrame(told)


def _check_column(name: str, values: NDArray[Any], column: Column) -> None:
    if values.dtype.kind not in KINDS[column.kind]:
        raise ValueError(f"has {values.dtype} in {name}, where {column.kind} values belong")
    if values.dtype == object and not set(map(type, values.tolist())) <= {str, type(None)}:
        raise ValueError(f"has {values.dtype} in {name}, where text values belong")
    if column.kind in ("truth", "text"):
        return
    low, high = np.minimum.reduce(values), np.maximum.reduce(values)
    if np.isnan(low):  # as some value is
        if not column.nan:
            raise ValueError(f"has no value of {name} for some samples")
        low, high = np.fmin.reduce(values), np.fmax.reduce(values)  # of what is a number
    if low < column.low - ROUNDING or high > column.high + ROUNDING:
        raise ValueError(f"has {name} outside {column.low:g} to {column.high:g}")


def _check_queries(records: Columns, budget: int) -> None:
    hit = records["first_hit"]
    for name in ("first_hit", "forwards"):
        if name in records and (records[name] > budget).any():
            raise ValueError(f"has {name} beyond the budget of {budget} queries")
    if "forwards" in records and (hit > records["forwards"]).any():
        raise ValueError("has samples that fell later than their last query")
    if "clean_pred" in records and ((hit == 0) != (records["clean_pred"] != records["y"])).any():
        raise ValueError("has samples that fell before any query although they were right when clean, or the reverse")


def _check_certificates(records: Columns) -> None:
    radius = records["radius"]
    if (radius[records["abstained"]] > 0).any():
        raise ValueError("has a radius where the certifier abstained")
    if "radius_most" in records and (radius > records["radius_most"] + ROUNDING).any():
        raise ValueError("has radii beyond what its draws can prove")
    if {"votes", "n"} <= set(records) and (records["votes"] > records["n"]).any():
        raise ValueError("has more votes than draws")
