"""The records of a shard: what each column of the table holds, and whether a table that was read can be one."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from bench.oracle import NEVER
from bench.plan.cell import Cell

Kind = Literal["whole", "real", "truth", "text"]
ROUNDING = 1e-5  # of float32, by which a share or a distance may leave its range


class Column(NamedTuple):
    """What a column holds: its kind of values, their range, and whether NaN may stand where a model gave no number."""

    kind: Kind
    low: float = -np.inf
    high: float = np.inf
    nan: bool = False


LEARNED = {name: Column("whole", 0) for name in ("sample_id", "y", "final_pred")}  # that no records can do without
ATTACKED = {**LEARNED, "first_hit": Column("whole", NEVER), "invalid": Column("truth")}  # nor any of an attack
KNOWN: Mapping[str, Column] = {
    **ATTACKED,
    "seed": Column("whole"),
    "forwards": Column("whole", 0),
    "backwards": Column("whole", 0),
    "unconfirmed": Column("whole", 0),
    "restarts_used": Column("whole", 0),  # of rows from before it was dropped: it held what the attack was allowed
    "clean_pred": Column("whole", 0),
    "twin_pred": Column("whole", 0),
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


def check_records(records: pd.DataFrame, cell: Cell, ids: Sequence[int]) -> None:
    """Whether ``records`` can be those of the samples ``ids`` of ``cell``.

    Raises:
        ValueError: a column is missing, of another type or out of its range, or the samples, the seed, the version of
            the attack or the queries are not those of the cell. The message names the first of these.
    """
    if not records.columns.is_unique:
        raise ValueError("has two columns of one name")
    for name in ATTACKED if cell.threat.asks else LEARNED:
        if name not in records:
            raise ValueError(f"has no column {name}")
    for name, column in KNOWN.items():
        if name in records:
            _check_column(records[name], column)
    if records["sample_id"].tolist() != list(ids):
        raise ValueError("holds other samples than its JSON says")
    if "seed" in records and (records["seed"] != cell.seed).any():
        raise ValueError(f"is of another seed than {cell.seed}")
    if "attack_version" in records and (records["attack_version"] != str(cell.attack.version)).any():
        raise ValueError(f"is of another version of the attack than {cell.attack.version}")
    if cell.threat.asks:
        _check_queries(records, cell.threat.query_budget or 0)


def _check_column(values: "pd.Series[int]", column: Column) -> None:
    if not _is(values, column.kind):
        raise ValueError(f"has {values.dtype} in {values.name}, where {column.kind} values belong")
    if column.kind in ("truth", "text"):
        return
    if values.hasnans and not column.nan:
        raise ValueError(f"has no value of {values.name} for some samples")
    known = values.to_numpy(dtype=float, na_value=np.nan)  # once, since pandas takes longer for a comparison than numpy
    low, high = np.fmin.reduce(known, initial=np.inf), np.fmax.reduce(known, initial=-np.inf)
    if low < column.low - ROUNDING or high > column.high + ROUNDING:
        raise ValueError(f"has {values.name} outside {column.low:g} to {column.high:g}")


def _is(values: "pd.Series[int]", kind: Kind) -> bool:
    types = pd.api.types
    match kind:
        case "whole":
            return types.is_integer_dtype(values.dtype)
        case "real":
            return types.is_float_dtype(values.dtype)
        case "truth":
            return types.is_bool_dtype(values.dtype) and not values.isna().any()
        case "text":
            return types.is_string_dtype(values)


def _check_queries(records: pd.DataFrame, budget: int) -> None:
    hit = records["first_hit"]
    for name in ("first_hit", "forwards"):
        if name in records and (records[name] > budget).any():
            raise ValueError(f"has {name} beyond the budget of {budget} queries")
    if "forwards" in records and (hit > records["forwards"]).any():
        raise ValueError("has samples that fell later than their last query")
    if "clean_pred" in records and ((hit == 0) != (records["clean_pred"] != records["y"])).any():
        raise ValueError("has samples that fell before any query although they were right when clean, or the reverse")
