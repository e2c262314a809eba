"""Stored rows, read as tables: robust accuracy at every budget asked for, worst cases, intervals and ranks."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bench.oracle import NEVER
from bench.stats import holm, mcnemar, wilson
from bench.store import Row

Format = Literal["md", "csv", "latex", "json"]

MARKS = {
    "limited": ("†", "run with --limit on fewer samples than its suite asks for; never ranked"),
    "incomplete": ("…", "not all samples have run yet; never ranked"),
    "failed": ("✗", "failed; run again, or read the traceback in its .failed.json; never ranked"),
    "invalid": ("!", "the model answered NaN or infinity; never ranked"),
    "rescaled": ("↔", "schedule rescaled to the largest budget, so smaller budgets are not what a run at them gives"),
    "batch-dependent": ("∥", "samples not independent of their batch: a foreign attack, or a defense that mixes rows"),
    "stateful": ("‡", "the defense remembers earlier queries, so figures depend on their order and on resuming"),
    "random": ("~", "random defense: @ counts the first lucky query; final, 16 repeats of it, flatters the defense"),
}
UNRANKED = {"limited", "incomplete", "failed", "invalid"}


@dataclass(frozen=True)
class Share:
    """A share of samples with its 95 % Wilson interval; nothing when there are no samples."""

    right: NDArray[np.bool_]

    @property
    def n(self) -> int:
        return len(self.right)

    @property
    def value(self) -> float:
        return float(self.right.mean()) if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(int(self.right.sum()), self.n)

    def __str__(self) -> str:
        if not self.n:
            return ""
        low, high = self.interval
        digits = 0 if self.n < 1000 else 1  # below, the ends are further apart than any decimal of theirs
        return f"{100 * self.value:.1f} [{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


@dataclass(frozen=True)
class Line:
    """One line of a table."""

    defense: str
    attack: str
    shares: dict[str, Share]
    n: int
    marks: frozenset[str] = frozenset()
    rank: int | None = None
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Lines that compare with each other: one data set, model and threat."""

    title: str
    lines: list[Line]
    origin: str = ""  # hardware, version and commit that the rows come from


def tables(rows: Iterable[Row], budgets: Sequence[int] = ()) -> list[Table]:
    """One table for each model under each threat, one for the learners on each data set.

    Args:
        rows: what :meth:`bench.store.Store.rows` read.
        budgets: query budgets to show; the largest that the rows have run with is always there.
    """
    rows = list(rows)
    result = []
    for (_, title, *_), group in groupby(sorted(rows, key=_comparable), key=_comparable):
        members = list(group)
        lines = _released_lines(members) if members[0].cell.learns else _served_lines(members, budgets)
        result.append(Table(title, lines, _origin(members)))
    return result


def render(tables: Sequence[Table], style: Format) -> str:
    """The tables as text: Markdown, LaTeX (booktabs), or tidy CSV and JSON with one record for each line."""
    if style in ("csv", "json"):
        records = [record for table in tables for record in _records(table)]
        if style == "json":
            return json.dumps(records, indent=1)
        return pd.DataFrame(records).to_csv(index=False)
    parts = []
    for table in tables:
        frame = _frame(table)
        if style == "latex":
            caption = _latex_text(" ".join((f"{table.title}.", _legend(table, latex=True), table.origin)))
            frame = frame.map(lambda text: _latex_text(str(text)))
            frame.columns = [_latex_text(name) for name in frame.columns]
            parts.append(frame.to_latex(index=False, escape=False, caption=caption, position="ht"))
        else:
            notes = "  \n".join(filter(None, (_legend(table), table.origin)))
            body = frame.to_markdown(index=False, disable_numparse=True)
            parts.append(f"### {table.title}\n\n{body}\n\n{notes}\n")
    return "\n".join(parts)


def summary(row: Row) -> str:
    """A finished cell in one phrase."""
    if row.errors:
        return "failed: " + row.errors[-1].strip().splitlines()[-1]
    if row.cell.learns:
        return f"test accuracy {_test_share(row)} %"
    budget = row.cell.threat.query_budget or 0
    return f"clean {_clean(row)} %, robust @{budget} {_robust(row, budget)} %"


def _served_lines(rows: list[Row], budgets: Sequence[int]) -> list[Line]:
    largest = max(row.cell.threat.query_budget or 0 for row in rows)
    shown = sorted({budget for budget in budgets if budget < largest} | {largest})
    by_defense: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.cell.defense_name, row.cell.attack.spec, row.cell.seed)):
        by_defense.setdefault(row.cell.defense_name, []).append(row)

    worst = {name: _worst_case(members, shown) for name, members in by_defense.items()}
    decisive = {name: line.shares[f"@{largest}"] for name, line in worst.items()}
    ranks = _ranks({name: decisive[name].right for name, line in worst.items() if not line.marks & UNRANKED})
    lines = []
    for name in sorted(worst, key=lambda name: (ranks.get(name, len(worst) + 1), -decisive[name].value)):
        line = worst[name]
        lines.append(Line(line.defense, line.attack, line.shares, line.n, line.marks, ranks.get(name)))
        lines += [_served_line(row, shown) for row in by_defense[name]] if len(by_defense[name]) > 1 else []
    return lines


def _served_line(row: Row, budgets: Sequence[int]) -> Line:
    shares = {"clean": _clean(row)}
    shares |= {f"@{budget}": _robust(row, budget) for budget in budgets}
    shares["final"] = Share(_final_right(row))
    seed = f", seed {row.cell.seed}" if row.cell.seed else ""
    return Line(row.cell.defense_name, row.cell.attack.spec + seed, shares, len(row.records), _marks(row))


def _worst_case(rows: list[Row], budgets: Sequence[int]) -> Line:
    """The line of a defense: each sample under whichever of the attacks beats it soonest."""
    if len(rows) == 1:
        return _served_line(rows[0], budgets)
    common = set.intersection(*(set(_column(row, "sample_id")) for row in rows))
    same = [_restricted(row, common) for row in rows]
    shares = {"clean": Share(np.logical_and.reduce([_clean(row).right for row in same]))}
    for budget in budgets:
        # An attack that ran with a smaller budget has beaten its samples within this one, too.
        within = [_robust(row, min(budget, row.cell.threat.query_budget or 0)).right for row in same]
        shares[f"@{budget}"] = Share(np.logical_and.reduce(within))
    shares["final"] = Share(np.logical_and.reduce([_final_right(row) for row in same]))
    marks = frozenset().union(*(_marks(row) for row in rows)) - {"rescaled", "batch-dependent"}
    return Line(rows[0].cell.defense_name, f"worst of {len(rows)}", shares, len(common), marks)


def _restricted(row: Row, ids: set[int]) -> Row:
    """``row`` with the records of the samples ``ids`` alone."""
    return Row(row.cell, row.records[np.isin(_column(row, "sample_id"), list(ids))], row.shards)


def _released_lines(rows: list[Row]) -> list[Line]:
    """Each protection under each learner; the lowest test accuracy protects best, and the best learner decides."""
    lines = []
    for row in sorted(rows, key=lambda row: (row.cell.defense_name, row.cell.attack.spec, row.cell.seed)):
        figures = {"train": "train_accuracy", "changed pixels": "changed_pixels_mean"}
        extra = {name: row.figures[figure] for name, figure in figures.items() if figure in row.figures}
        seed = f", seed {row.cell.seed}" if row.cell.seed else ""
        name, share = row.cell.attack.spec + seed, {"test": _test_share(row)}
        lines.append(Line(row.cell.defense_name, name, share, len(row.records), _marks(row), extra=extra))
    return lines


def _ranks(right: dict[str, NDArray[np.bool_]]) -> dict[str, int]:
    """1 + the number of defenses that are significantly better: exact McNemar, Holm over all pairs, 5 %.

    Differences inside the noise share a rank. Defenses compare on equal samples only.
    """
    names = [name for name in right if len(right[name]) == max(len(other) for other in right.values())]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    if not pairs:
        return dict.fromkeys(names, 1)
    p_values = holm(np.array([mcnemar(right[a], right[b]) for a, b in pairs]))
    ranks = dict.fromkeys(names, 1)
    for (a, b), p in zip(pairs, p_values, strict=True):
        if p < 0.05:
            ranks[a if right[a].mean() < right[b].mean() else b] += 1
    return ranks


def _origin(rows: list[Row]) -> str:
    """Where the rows were measured, and by which code."""
    facts = [shard.provenance for row in rows for shard in row.shards if shard.provenance]
    hardware = sorted({f"{fact['hardware']}, {fact['device']}" for fact in facts})
    code = sorted(
        {f"Parry {fact['parry']} at {fact['commit'][:8]}, torch {fact['libraries']['torch']}" for fact in facts}
    )
    days = sorted({fact["finished"][:10] for fact in facts})
    return f"Measured on {'; '.join(hardware)}; {'; '.join(code)}; {' and '.join(days)}." if facts else ""


def _comparable(row: Row) -> tuple[bool, str, str, str]:
    """Rows compare when all this is equal; two files of weights under one name must not share a table."""
    cell = row.cell
    return cell.learns, cell.setting, cell.data_hash, cell.weights_hash


def _column(row: Row, name: str) -> NDArray[Any]:
    return row.records[name].to_numpy() if name in row.records else np.zeros(0)


def _clean(row: Row) -> Share:
    return Share(_column(row, "first_hit") != 0)


def _robust(row: Row, budget: int) -> Share:
    """Right when clean, and not beaten by any of the first ``budget`` queries."""
    if budget > (row.cell.threat.query_budget or 0):
        return Share(np.zeros(0, dtype=bool))
    hit = _column(row, "first_hit")
    return Share((hit == NEVER) | (hit > budget))


def _final_right(row: Row) -> NDArray[np.bool_]:
    """Right when clean, and right on the final example, judged afresh in plain float32."""
    right: NDArray[np.bool_] = (_column(row, "first_hit") != 0) & (_column(row, "final_pred") == _column(row, "y"))
    return right


def _test_share(row: Row) -> Share:
    return Share(_column(row, "final_pred") == _column(row, "y"))


def _marks(row: Row) -> frozenset[str]:
    found = {
        "limited": row.cell.limited,
        "incomplete": not row.complete,
        "failed": bool(row.errors),
        "invalid": bool(_column(row, "invalid").any()),
    }
    traits = [trait for component in (row.cell.attack, *row.cell.defense) for trait in component.traits]
    return frozenset([name for name, present in found.items() if present] + traits)


def _frame(table: Table) -> pd.DataFrame:
    """The table as people read it."""
    lines = []
    previous = None
    for line in table.lines:
        marks = "".join(MARKS[name][0] for name in MARKS if name in line.marks)
        shares = {name: str(share) for name, share in line.shares.items()}
        lines.append(
            {
                "rank": "" if line.rank is None else str(line.rank),
                "defense": line.defense if line.defense != previous else "",
                "attack": f"{line.attack} {marks}".strip(),
                **shares,
                **{
                    name: f"{100 * value:.1f}" if name == "train" else f"{value:.2f}"
                    for name, value in line.extra.items()
                },
                "n": str(line.n),
            }
        )
        previous = line.defense
    frame = pd.DataFrame(lines).fillna("")
    return frame if any(line.rank for line in table.lines) else frame.drop(columns="rank")


def _legend(table: Table, latex: bool = False) -> str:
    present = [name for name in MARKS if any(name in line.marks for line in table.lines)]
    if latex:
        return " ".join(f"{MARKS[name][0]} {MARKS[name][1]}." for name in present)
    return "  \n".join(f"{MARKS[name][0]} {MARKS[name][1]}" for name in present)


def _records(table: Table) -> list[dict[str, Any]]:
    records = []
    for line in table.lines:
        record: dict[str, Any] = {
            "table": table.title, "rank": line.rank, "defense": line.defense, "attack": line.attack, "n": line.n,
            "marks": " ".join(sorted(line.marks)),
        }  # fmt: skip
        for name, share in line.shares.items():
            low, high = share.interval if share.n else (None, None)
            value = share.value if share.n else None
            record |= {name: value, f"{name} low": low, f"{name} high": high}
        records.append({**record, **line.extra})
    return records


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "†": r"$\dagger$", "‡": r"$\ddagger$",
    "✗": r"$\times$", "…": r"$\ldots$",
    "↔": r"$\leftrightarrow$", "∥": r"$\parallel$", "·": r"$\cdot$", "<": "$<$", ">": "$>$", "|": "$|$",
}  # fmt: skip


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in text)
