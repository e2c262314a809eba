"""Two defenses side by side as tables that people and programs read: Markdown, LaTeX, CSV and JSON."""

from collections.abc import Callable, Sequence
from typing import Any

from bench.report.compare import Duel, Versus, listed
from bench.report.crossing import Crossing
from bench.report.escape import Format, Lines, in_markdown, latex_table, markdown_table, tidy
from bench.report.marks import legend, signs

BOLD = "bold: the better one, where p Holm is below 5 %"
LEGEND = (
    "A − B in points, with the 95 % interval of the paired bootstrap; alone: samples that stand with A and fall with "
    "B, and the other way round; p Holm: exact McNemar, adjusted for all lines of the table"
)
CROSSES = (
    "cross at: who was behind in accuracy against queries and leads from so many queries on, and how often the lead "
    "changes where that is more than once; empty where it never does, ? where an attack met only what others had left"
)


def render_duels(duels: Sequence[Duel], style: Format) -> str:
    """The comparisons as Markdown or LaTeX (booktabs), a table for each setting; or tidy, a record for each line.

    LaTeX has the better accuracy in bold where the line is significant after Holm's adjustment. Only CSV and JSON
    hold the intervals of single accuracies and the p-values of single lines.
    """
    if style in ("csv", "json"):
        return tidy([
            _record(duel, line, p) for duel in duels
            for line, p in zip(duel.lines, duel.adjusted, strict=True)
        ], style)  # fmt: skip
    return "\n\n".join(map(_latex if style == "latex" else _markdown, duels))


def _markdown(duel: Duel) -> str:
    head = f"### A = {in_markdown(duel.a)}, B = {in_markdown(duel.b)}"
    notes = "  \n".join(notes_of(duel, in_markdown))
    return "\n\n".join((head, in_markdown(setting_of(duel)), markdown_table(lines_of(duel)), notes))


def notes_of(duel: Duel, escaped: Callable[[str], str] = str) -> list[str]:
    """What stands below the table, names of others ``escaped``."""
    return [*legend(_marks(duel)), *map(escaped, _said(duel)), *(f"{each}." for each in _read(duel))]


def _latex(duel: Duel) -> str:
    bold = {(number, side.upper()) for number, side in enumerate(duel.better) if side}
    told = (f"A = {duel.a}, B = {duel.b}", setting_of(duel), *legend(_marks(duel)), *_said(duel), *_read(duel), BOLD)
    return latex_table(lines_of(duel), " ".join(f"{each}." for each in told), bold)


def lines_of(duel: Duel) -> Lines:
    """The table as people read it, each attack named in its first line alone."""
    digits = 0 if duel.n < 1000 else 1
    lines = []
    previous = None
    for line, adjusted in zip(duel.lines, duel.adjusted, strict=True):
        low, high = (100 * end for end in line.interval)
        first = line.attack != previous
        crosses = {"cross at": _crosses(line.crossing) if first else ""} if duel.has_curves else {}
        lines.append(
            {
                "attack": f"{line.attack} {signs(line.marks)}".strip() if first else "",
                "at": line.at,
                "A": line.a.text(interval=False),
                "B": line.b.text(interval=False),
                "A − B": f"{100 * (line.a.value - line.b.value):+.1f} [{low:+.{digits}f}, {high:+.{digits}f}]",
                "alone": "{} : {}".format(*line.discordant),
                "p Holm": _p(adjusted),
            }
            | crosses
        )
        previous = line.attack
    return lines


def _crosses(found: Crossing | None) -> str:
    """Such as ``B 120``, or ``B 120, 3×`` where the lead changes three times."""
    if found is None:
        return "?"
    if not found.times:
        return ""
    return f"{found.ahead.upper()} {found.at}" + f", {found.times}×" * (found.times > 1)


def setting_of(duel: Duel) -> str:
    """Where the two meet, and on how many samples."""
    return f"{duel.setting} · {duel.n} samples in common"


def _marks(duel: Duel) -> frozenset[str]:
    return frozenset().union(*(line.marks for line in duel.lines))


def _said(duel: Duel) -> list[str]:
    """What a reader has to know of the rows, in names of others."""
    return [f"only {name} has met {listed(specs)}" for name, specs in duel.unshared.items() if specs] + duel.failed


def _read(duel: Duel) -> list[str]:
    """How the columns are read."""
    return [LEGEND, CROSSES] if duel.has_curves else [LEGEND]


def _p(value: float) -> str:
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"


def _record(duel: Duel, line: Versus, adjusted: float) -> dict[str, Any]:
    low, high = line.interval
    record: dict[str, Any] = {"setting": duel.setting, "n": duel.n, "attack": line.attack, "at": line.at}
    for side, name, share in (("a", duel.a, line.a), ("b", duel.b, line.b)):
        record |= {side: name, f"{side} accuracy": share.value}
        record |= dict(zip((f"{side} low", f"{side} high"), share.interval, strict=True))
    record |= {"difference": line.a.value - line.b.value, "difference low": low, "difference high": high}
    record |= dict(zip(("a alone", "b alone"), line.discordant, strict=True))
    record |= {"p": line.p_value, "p holm": adjusted}
    if duel.has_curves:
        times, at, ahead = line.crossing or (None, None, None)
        record |= {"crossings": times, "cross at": at, "ahead from there": ahead}
    return record | {"marks": " ".join(sorted(line.marks))}
