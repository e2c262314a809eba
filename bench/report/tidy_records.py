"""Every sample of every cell as one line of one table, for pandas and spreadsheets."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.report.escape import in_csv
from bench.results.store import Row

if TYPE_CHECKING:
    import pandas as pd


def tidy_records(rows: Sequence[Row]) -> "pd.DataFrame":
    """One line for each sample of ``rows``: first what it was measured under, then its record.

    The setting stands in ``key`` (of the cell), ``dataset``, ``model``, ``defense``, ``attack``, ``norm``, ``eps``,
    ``budget`` (queries, missing where nothing bounds them), ``precision`` and ``quantised``; docs/results.md says what
    the columns of records hold. A column that a row does not have is missing there.
    """
    import pandas as pd  # not before it is needed

    return pd.concat([_with_setting(row) for row in rows], ignore_index=True) if rows else pd.DataFrame()


def as_csv(table: "pd.DataFrame") -> str:
    """``table`` as CSV, of whose texts none is a formula to a spreadsheet."""
    texts = table.select_dtypes(include=["object", "string"]).columns
    return table.assign(**{name: table[name].map(in_csv, na_action="ignore") for name in texts}).to_csv(index=False)


def _with_setting(row: Row) -> "pd.DataFrame":
    import pandas as pd

    cell, threat = row.cell, row.cell.threat
    setting: dict[str, Any] = {
        "key": cell.key, "dataset": cell.dataset.spec, "model": cell.model.spec, "defense": cell.defense_name,
        "attack": cell.attack.spec, "norm": threat.norm, "eps": threat.eps, "budget": threat.query_budget,
        "precision": cell.numerics, "quantised": cell.quantise,
    }  # fmt: skip
    table = row.records.reset_index(drop=True)
    before = pd.DataFrame({name: [value] * len(table) for name, value in setting.items()})
    return pd.concat([before.astype({"budget": "Int64"}), table], axis=1)
