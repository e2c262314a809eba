"""Standings as tables that people and programs read: Markdown, LaTeX, CSV and JSON."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd

from bench.report.marks import MARKS
from bench.report.outcomes import failure
from bench.report.standings import Table
from bench.report.text import in_markdown, latex_table, markdown_table, text_frame, tidy
from bench.results.store import Row
from bench.tracks import track_of

Format = Literal["md", "csv", "latex", "json"]

GLANCE = "At a glance: what each attack leaves with all of its queries, in percent; intervals stand above."
LASTING = (
    "Random defenses, judged afresh: an image counts as beaten within so many queries only where the majority of 16 "
    "new evaluations of its first hit is wrong, too. First hits show what one lucky answer gets; this shows what an "
    "example that works again gets. A search ends at its first hit, so the share is an upper bound."
)
SCORES = (
    "What the defense does to its answers: predictions changed (%), mean change of logits (l2) and of probabilities "
    "(total variation), time of a query against the undefended one; then clean → after the attack that left the least."
)
ERRORS = {"ECE": "ece", "adaptive ECE": "adaptive_ece"}
LOSSES = {"Brier": "brier", "NLL": "nll"}
QUERIES = (
    "What the queries achieved among images that were right when clean: area under accuracy against queries (of all "
    "images), queries of the successes, of all (censored at the budget), and the size of the final changes."
)
ACHIEVED = {  # column: figure, how it is printed
    "AUC": ("auc", "{:.3f}"), "log AUC": ("log_auc", "{:.3f}"), "success": ("success_rate", "{:.1%}"),
    "mean": ("mean_queries", "{:.0f}"), "median": ("median_queries", "{:.0f}"),
    "mean of all": ("restricted_mean_queries", "{:.0f}"), "median of all": ("censored_median_queries", "{:.0f}"),
    "linf": ("linf", "{:.4f}"), "RMSE": ("rmse", "{:.4f}"),
    "expected": ("expected_accuracy", "{:.1%}"),
}  # fmt: skip
PARTIAL = {"limited", "incomplete", "failed", "invalid"}  # marks that stand at a glance, too
PERCENT = {"clean", "mean", "SD", "peak", "train"}


def render(tables: Sequence[Table], style: Format, details: bool = True) -> str:
    """The tables as text: Markdown, LaTeX (booktabs), or tidy CSV and JSON with one record for each line.

    ``details`` adds what the defenses do to their scores and what the queries achieved. CSV and JSON always hold that;
    a censored median is empty there where fewer than half of the samples fell.
    """
    if style in ("csv", "json"):
        return tidy([record for table in tables for record in _records(table)], style)
    return "\n".join((_latex if style == "latex" else _markdown)(table, details) for table in tables)


def _markdown(table: Table, details: bool) -> str:
    frames = [f"{title}\n\n{markdown_table(frame)}" for title, frame in _frames(table, details)]
    parts = [f"### {in_markdown(table.title)}", *frames]
    notes = [in_markdown(note) for note in (*table.notes, table.origin)]
    parts.insert(2, "  \n".join(filter(None, (_legend(table), *notes))))
    failed = dict.fromkeys(
        f"- {in_markdown(f'{line.defense} × {line.attack}: {line.error}')}" for line in table.lines if line.error
    )
    if failed:
        parts.insert(3, "\n".join(["Failed (the last line of each error):\n", *failed]))
    if table.flags:
        told = [[in_markdown(part) for part in (flag.defense, flag.flag, flag.evidence)] for flag in table.flags]
        signs = [f"- {defense}: **{flag}**. {evidence}." for defense, flag, evidence in told]
        parts.insert(3, "\n".join(["Red flags (computed; each is a reason to look, none a verdict):\n", *signs]))
    return "\n\n".join(parts).replace("\n\n\n", "\n") + "\n"


def _latex(table: Table, details: bool) -> str:
    parts = []
    for title, frame in _frames(table, details):
        notes = (_legend(table, latex=True), *(f"{note}." for note in table.notes), table.origin) if not title else ()
        parts.append(latex_table(frame, " ".join((f"{table.title}.", title, *notes))))
    return "\n".join(parts)


def summary(row: Row) -> str:
    """A finished cell in one phrase."""
    if row.errors:
        return f"failed: {failure(row)}"
    return track_of(row.cell).summary(row)


def _frames(table: Table, details: bool) -> list[tuple[str, pd.DataFrame]]:
    """The table as people read it: accuracies; what the defenses do to their scores; what the queries achieved."""
    parts = [("", _accuracies(table))]
    if details:
        parts += [(GLANCE, _glance(table)), (LASTING, _lasting(table))]
        parts += [(SCORES, _scores(table)), (QUERIES, _queries(table))]
    return [(title, frame) for title, frame in parts if len(frame) or not title]


def _accuracies(table: Table) -> pd.DataFrame:
    lines = []
    for line in table.lines:
        marks = "".join(MARKS[name][0] for name in MARKS if name in line.marks)
        shares = {name: str(share) for name, share in line.shares.items()}
        extra = {
            name: f"{100 * value:.1f}" if name in PERCENT else f"{value:.2f}" for name, value in line.extra.items()
        }
        lines.append(
            {
                "rank": "" if line.rank is None else str(line.rank),
                "defense": line.defense,
                "attack": f"{line.attack} {marks}".strip(),
                **shares,
                **extra,
                "n": str(line.n),
            }
        )
    frame = _once(lines)
    return frame if any(line.rank for line in table.lines) else frame.drop(columns="rank")


def _glance(table: Table) -> pd.DataFrame:
    """Defenses against attacks, the more numerous as lines; nothing where one attack is all there is."""
    lines: dict[str, dict[str, str]] = {}
    for line in table.lines:
        shown = lines.setdefault(line.defense, {"defense": line.defense})
        measured = [name for name, share in line.shares.items() if share.n and name not in ("clean", "final")]
        if measured:
            name = line.attack.partition(" of ")[0] + measured[-1].replace("@", " @").replace("test", "")
            signs = "".join(MARKS[mark][0] for mark in MARKS if mark in line.marks & PARTIAL)
            shown[name] = f"{100 * line.shares[measured[-1]].value:.1f} {signs}".strip()
    if all(len(shown) <= 2 for shown in lines.values()):
        return pd.DataFrame()
    frame = text_frame(list(lines.values()))
    if len(frame.columns) - 1 > len(frame):
        frame = frame.set_index("defense").T.reset_index(names="attack").rename_axis(columns=None)
    return frame


def _lasting(table: Table) -> pd.DataFrame:
    """The accuracies of random defenses with hits judged afresh."""
    lines = [
        {"defense": line.defense, "attack": line.attack}
        | {budget: str(share) for budget, share in line.lasting.items()}
        | {"n": str(line.n)}
        for line in table.lines
        if line.lasting
    ]
    return _once(lines)


def _scores(table: Table) -> pd.DataFrame:
    """One line for each defense, the scores under attack those under the attack that left it the least."""
    lines = []
    for defense in dict.fromkeys(line.defense for line in table.lines):
        own = [line for line in table.lines if line.defense == defense and "ece" in line.figures]
        if not own:
            continue
        line = min(own, key=lambda line: line.shares["final"].value)
        found = line.figures
        lines.append(
            {
                "defense": defense,
                "changed": f"{100 * found['changed_predictions']:.1f}",
                "Δ logits": f"{found['logit_change']:.2f}",
                "Δ probs": f"{found['probability_change']:.3f}",
                "cost": f"{found['cost']:.2f}" if "cost" in found else "",
                **{name: _before_after(found, key, "{:.1%}") for name, key in ERRORS.items()},
                **{name: _before_after(found, key, "{:.2f}") for name, key in LOSSES.items()},
                "under": line.attack,
            }
        )
    return text_frame(lines)


def _before_after(found: dict[str, float], key: str, form: str) -> str:
    return f"{form} → {form}".format(found[key], found[f"attacked_{key}"])


def _queries(table: Table) -> pd.DataFrame:
    lines = []
    for line in table.lines:
        found = line.figures
        if "auc" not in found:
            continue
        shown = {"defense": line.defense, "attack": line.attack}
        for name, (key, form) in ACHIEVED.items():
            shown[name] = form.format(found[key]).replace("inf", "> all") if key in found else ""
        lines.append(shown)
    return _once(lines)


def _once(lines: list[dict[str, str]]) -> pd.DataFrame:
    """The lines, each defense named in its first one alone."""
    frame = text_frame(lines)
    if len(frame):
        frame["defense"] = frame["defense"].where(frame["defense"] != frame["defense"].shift(), "")
    return frame


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
            if share.networks > 1:
                record |= {f"{name} SD": share.spread, "networks": share.networks}
        record |= {f"{name} afresh": share.value for name, share in line.lasting.items() if share.n}
        finite = {name: value if math.isfinite(value) else None for name, value in line.figures.items()}
        records.append({**record, **line.extra, **finite, **({"error": line.error} if line.error else {})})
    return records
