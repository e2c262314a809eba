"""Standings as tables that people and programs read: Markdown, LaTeX, CSV and JSON."""

import math
from collections.abc import Sequence
from typing import Any

from bench.report.escape import Format, Lines, columns, in_markdown, latex_table, markdown_table, tidy
from bench.report.figures import BY_NAME, Place, legend, placed
from bench.report.line import Line, hardest
from bench.report.marks import APART, signs
from bench.report.marks import legend as marks_legend
from bench.report.outcomes import failure
from bench.report.standings import Table
from bench.results.records import length
from bench.results.store import Row
from bench.tracks import TRACKS, track_of

GLANCE = "At a glance: what each attack leaves with all of its queries, in percent"
LASTING = (
    "Random defenses, re-evaluated: an image counts as beaten within so many queries only where the majority of 16 "
    "new evaluations of its first hit is wrong, too. First hits show what one lucky answer gets; this shows what an "
    "example that works again gets. A search ends at its first hit, so the share is an upper bound."
)
FLAGS = "Red flags (computed; each is a reason to look, none a verdict):"
FAILED = "Failed (the last line of each error):"
SCORES = "What the defense does to its answers, then clean → after the attack that left the least."
QUERIES = "What the queries achieved; attacked are the images that were right when clean."


def render(tables: Sequence[Table], style: Format, details: bool = True) -> str:
    """The tables as text: Markdown, LaTeX (booktabs), or tidy CSV and JSON with one record for each line.

    ``details`` adds what the defenses do to their scores and what the queries achieved. CSV and JSON always hold that;
    a censored median is empty there where fewer than half of the samples fell.
    """
    if style in ("csv", "json"):
        return tidy(records(tables), style)
    return "\n".join((_latex if style == "latex" else _markdown)(table, details) for table in tables)


def _markdown(table: Table, details: bool) -> str:
    shown = [f"{title}\n\n{markdown_table(lines)}" for title, lines in frames(table, details)]
    parts = [f"### {in_markdown(table.title)}", *shown]
    notes = [in_markdown(note) for note in (*table.notes, table.origin)]
    parts.insert(2, "  \n".join(filter(None, (_legend(table), *notes))))
    if failed := failures(table):
        parts.insert(3, "\n".join([f"{FAILED}\n", *(f"- {in_markdown(each)}" for each in failed)]))
    if table.flags:
        told = [[in_markdown(part) for part in (flag.defense, flag.flag, flag.evidence)] for flag in table.flags]
        fired = [f"- {defense}: **{flag}**. {evidence}." for defense, flag, evidence in told]
        parts.insert(3, "\n".join([f"{FLAGS}\n", *fired]))
    return "\n\n".join(parts).replace("\n\n\n", "\n") + "\n"


def _latex(table: Table, details: bool) -> str:
    parts = []
    for title, lines in frames(table, details):
        notes = (_legend(table, latex=True), *(f"{note}." for note in table.notes), table.origin) if not title else ()
        parts.append(latex_table(lines, " ".join((f"{table.title}.", title, *notes))))
    return "\n".join(parts)


def summary(row: Row) -> str:
    """A finished cell in one phrase."""
    if row.errors:
        return f"failed: {failure(row)}"
    if row.stopped:
        taken = f"{length(row.prefix)} of {len(row.cell.ids)} samples taken"
        return f"{track_of(row.cell).summary(row)}, {taken}"
    if row.partial:
        return f"on {length(row.partial)} of {len(row.cell.ids)} samples, which other attacks had left"
    return track_of(row.cell).summary(row)


def frames(table: Table, details: bool = True, intervals: bool = True) -> list[tuple[str, Lines]]:
    """The table as people read it: accuracies; what the defenses do to their scores; what the queries achieved."""
    parts: list[tuple[str, Lines]] = [("", _accuracies(table, intervals))]
    if details:
        glance = f"{GLANCE}{'; intervals stand above' if intervals else ''}."
        parts += [(glance, _glance(table)), (LASTING, _lasting(table, intervals))]
        parts += [_explained(SCORES, "defense", _scores(table)), _explained(QUERIES, "attack", _queries(table))]
    return [(title, lines) for title, lines in parts if lines or not title]


def failures(table: Table) -> list[str]:
    """The cells that have failed, each with the last line of its error."""
    failed = (f"{line.defense} × {line.attack}: {line.error}" for line in table.lines if line.error)
    return list(dict.fromkeys(failed))


def signs_told(table: Table) -> list[str]:
    """What the signs in its lines mean."""
    return marks_legend(frozenset().union(*(line.marks for line in table.lines)))


def _accuracies(table: Table, intervals: bool) -> Lines:
    ranked = any(line.rank for line in table.lines)
    lines = []
    for line in table.lines:
        rank = {"rank": "" if line.rank is None else str(line.rank)} if ranked else {}
        shares = {name: share.text(intervals) for name, share in line.shares.items()}
        extra = {name: _extra(name, value) for name, value in line.extra.items()}
        attack = f"{line.attack} {signs(line.marks)}".strip()
        lines.append({**rank, "defense": line.defense, "attack": attack, **shares, **extra, "n": line.samples})
    return _once(lines)


def _extra(name: str, value: float) -> str:
    """A figure in its own form; what is no figure of a row is a share, in percent."""
    return BY_NAME[name].text(value) if name in BY_NAME else f"{100 * value:.1f}"


def _explained(title: str, place: Place, lines: Lines) -> tuple[str, Lines]:
    """A table of figures without the columns that no line fills, and what the others hold."""
    filled = {name for line in lines for name, text in line.items() if text}
    kept = [{name: text for name, text in line.items() if name in filled} for line in lines]
    return f"{title} {legend(figure for figure in placed(place) if figure.label in filled)}.", kept


def _glance(table: Table) -> Lines:
    """Defenses against attacks, the more numerous as lines; nothing where one attack is all there is, or none of them
    leaves anything, as what certifies."""
    if not all(track.heads for track in TRACKS if track.name == table.track):
        return []
    found: dict[str, dict[str, str]] = {}
    for line in table.lines:
        shown = found.setdefault(line.defense, {})
        if line.left:
            column, share = line.left
            name = line.attack.partition(" of ")[0] + (f" {column}" if column.startswith("@") else "")
            shown[name] = f"{100 * share.value:.1f} {signs(line.marks & APART)}".strip()
    if all(len(shown) <= 1 for shown in found.values()):
        return []
    attacks = columns(found.values())
    if len(attacks) > len(found):
        return [{"attack": each, **{name: shown.get(each, "") for name, shown in found.items()}} for each in attacks]
    return [{"defense": name, **shown} for name, shown in found.items()]


def _lasting(table: Table, intervals: bool) -> Lines:
    """The accuracies of random defenses with hits re-evaluated."""
    lines = [
        {"defense": line.defense, "attack": line.attack}
        | {budget: share.text(intervals) for budget, share in line.lasting.items()}
        | {"n": line.samples}
        for line in table.lines
        if line.lasting
    ]
    return _once(lines)


def _scores(table: Table) -> Lines:
    """One line for each defense, the scores under attack those under the attack that left it the least."""
    lines = []
    for defense in dict.fromkeys(line.defense for line in table.lines):
        own = (line for line in table.whole or table.lines if line.defense == defense and "ece" in line.figures)
        if line := hardest(own):
            lines.append({"defense": defense, **_columns(line, "defense"), "under": line.attack})
    return lines


def _queries(table: Table) -> Lines:
    lines = [line for line in table.lines if "auc" in line.figures]
    return _once([{"defense": line.defense, "attack": line.attack, **_columns(line, "attack")} for line in lines])


def _columns(line: Line, place: Place) -> dict[str, str]:
    """The figures of a line that stand in one table, by the heads of their columns."""
    shown = {}
    for figure in placed(place):
        parts = [BY_NAME[name] for name in (figure.name, figure.after) if name in line.figures]
        shown[figure.label] = " → ".join(part.text(line.figures[part.name], line.row) for part in parts)
    return shown


def _once(lines: list[dict[str, str]]) -> Lines:
    """The lines, each defense named in its first one alone."""
    before = ["", *(line["defense"] for line in lines)]
    return [line | {"defense": "" if line["defense"] == last else line["defense"]}
            for line, last in zip(lines, before, strict=False)]  # fmt: skip


def _legend(table: Table, latex: bool = False) -> str:
    told = signs_told(table)
    return " ".join(f"{line}." for line in told) if latex else "  \n".join(told)


def records(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Every line of the tables as programs read it; shares in [0, 1], what is not finite as None."""
    return [_record(table, line) for table in tables for line in table.lines]


def _record(table: Table, line: Line) -> dict[str, Any]:
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
    record |= {f"{name} re-evaluated": share.value for name, share in line.lasting.items() if share.n}
    finite = {name: value if math.isfinite(value) else None for name, value in line.figures.items()}
    of = {"n of": line.of} if line.of else {}
    return {**record, **of, **line.extra, **finite, **({"error": line.error} if line.error else {})}
