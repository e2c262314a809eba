"""Our rows beside published figures, with everything that differs named."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

from bench.metrics import query_statistics
from bench.plan.cell import Cell, Component
from bench.report.escape import Format, Lines, in_markdown, latex_table, markdown_table, tidy
from bench.report.figures import figures
from bench.report.marks import UNRANKED, marks_of
from bench.report.outcomes import Share, certified, clean, column, query_budget, robust, tested
from bench.report.published import MEASURES, Figure, Published
from bench.report.versions import by_version
from bench.results.store import Row
from bench.rules import NEVER
from bench.spec import Spec, parse_chain
from bench.threat import format_eps

READ = "diff: ours minus the value there; in: whether our 95 % Wilson interval holds the value there"

UNATTACKED = ("clean accuracy", "logit difference")
CERTIFIED = ("certified accuracy", "average certified radius")
LEARNT = "test accuracy"
SAME_RADIUS = 0.02  # radii that differ by less, such as 0.031 and 8/255, compare; the difference is named


@dataclass(frozen=True)
class Difference:
    """What is not the same in a published setting and in ours."""

    what: str
    published: str
    ours: str

    def __str__(self) -> str:
        return f"{self.what} {self.published} ≠ {self.ours}"


@dataclass(frozen=True)
class Match:
    """A published figure beside one row of ours; ``value`` and ``interval`` are in the unit of the figure."""

    figure: Figure
    cell: Cell
    n: int
    value: float
    interval: tuple[float, float] | None  # 95 %, where the figure is a share
    differences: tuple[Difference, ...]

    @property
    def difference(self) -> float:
        """Ours minus the published value."""
        return self.value - self.figure.value

    @property
    def inside(self) -> bool | None:
        """Whether the published value lies in our interval."""
        return None if self.interval is None else self.interval[0] <= self.figure.value <= self.interval[1]


@dataclass(frozen=True)
class Matches:
    """The figures that have a counterpart among our rows, and those that wait for one."""

    found: list[Match]
    missing: list[Figure]


def match(published: Published, rows: Iterable[Row]) -> Matches:
    """Every published figure beside every row with its data set, family of defense, family of attack and threat.

    Families are component names without their arguments; the arguments that the figure states are compared, as are
    model, number of samples, budget and copy of the data. What is measured on clean images needs no attack and comes
    once a model and defense, from the largest row.
    """
    newest = [row for row in by_version(rows).newest if row.n]
    rows = sorted(newest, key=lambda row: (-row.n, str(row.cell)))
    # A network that is a defense by itself compares with figures of that network alone.
    hardened = {str(Spec.parse(figure.spec.model or "")) for figure in published.figures if _is_defense(figure)}
    marks = {row.cell.key: marks_of(row) for row in rows}
    matches = Matches([], [])
    for figure in published.figures:
        found: dict[object, Match] = {}
        for row in rows:
            cell = row.cell
            if cell.model.spec in hardened and not _is_defense(figure):
                continue
            candidate = _beside(figure, row, marks[cell.key], published.copies) if _same_setting(figure, cell) else None
            if candidate is not None:
                served = (cell.model.spec, cell.defense_name, cell.data_hash, cell.weights_hash)
                found.setdefault(served if figure.metric in UNATTACKED else cell.key, candidate)
        matches.found.extend(found.values())
        matches.missing.extend([] if found else [figure])
    return matches


def render_matches(matches: Matches, published: Published, style: Format, show_missing: bool = False) -> str:
    """The matches as Markdown or LaTeX, a table for each row of ours; or as CSV or JSON, a record for each match.

    Args:
        show_missing: list the figures without a row of ours, too; Markdown counts them in any case.
    """
    missing = matches.missing if show_missing else []
    if style in ("csv", "json"):
        found = [_record(each.figure, each, published.copies) for each in matches.found]
        return tidy(found + [_record(figure) for figure in missing], style)
    sources: dict[str, int] = {}
    parts = []
    ordered = sorted(matches.found, key=lambda each: (each.cell.setting, str(each.cell), each.cell.key))
    by_row = [list(group) for _, group in groupby(ordered, key=lambda each: each.cell.key)]
    if style == "latex":
        tables = [_latex(group, published.copies) for group in by_row]
        return "\n".join((*tables, *([_missing_latex(missing)] if missing else ())))
    for group in by_row:
        parts.append(_section(group, sources, published.copies))
    if sources:
        parts.append("  \n".join(f"[{number}] {in_markdown(source)}" for source, number in sources.items()))
        parts.append(READ)
    if missing:
        parts.append(_missing_section(missing))
    held = len({id(each.figure) for each in matches.found})
    how = "above" if show_missing else "--all lists them"
    parts.append(
        f"{held} of {held + len(matches.missing)} published figures have rows here; "
        f"{len(matches.missing)} have not run ({how})."
    )
    return "\n\n".join(parts)


def _same_setting(figure: Figure, cell: Cell) -> bool:
    """Whether data set, families of defense and attack, and threat of a figure are those of a cell."""
    spec = figure.spec
    if cell.dataset.name != figure.dataset or figure.metric not in _metrics(cell):
        return False
    if spec.defense is None and (cell.defense or not _same_model(figure, cell)):
        return False
    stated = [part.name for part in parse_chain(spec.defense or "none")]
    if spec.defense is not None and [part.name for part in cell.defense] != stated:
        return False
    if figure.metric in UNATTACKED:
        return True
    if spec.attack is None or Spec.parse(spec.attack).name != cell.attack.name:
        return False
    if not cell.threat.asks:
        return True
    near = figure.eps is None or math.isclose(figure.eps, cell.threat.eps, rel_tol=SAME_RADIUS)
    return figure.norm == cell.threat.norm and near


def _metrics(cell: Cell) -> Collection[str]:
    """What is measured of cells of this kind."""
    if cell.threat.proves:
        return CERTIFIED
    return set(MEASURES) - {LEARNT, *CERTIFIED} if cell.threat.asks else {LEARNT}


def _beside(figure: Figure, row: Row, marks: frozenset[str], copies: Mapping[str, str]) -> Match | None:
    """A figure and a row in one setting; nothing where the row has no such figure."""
    budget = min(figure.queries or query_budget(row), query_budget(row))
    measured = _measured(figure, row, budget)
    if measured is None:
        return None
    value, interval = measured
    differences = _differences(figure, row, budget, marks, copies)
    return Match(figure, row.cell, row.n, value, interval, tuple(differences))


def _measured(figure: Figure, row: Row, budget: int) -> tuple[float, tuple[float, float] | None] | None:
    """What the row says in terms of the figure, with its interval."""
    match figure.metric:
        case "clean accuracy":
            share = clean(row)
        case "test accuracy":
            share = tested(row)
        case "robust accuracy":
            share = robust(row, budget)
        case "success rate":
            share = Share(~robust(row, budget).right[clean(row).right], row.sequential)
        case "failure rate":
            share = Share(robust(row, budget).right[clean(row).right], row.sequential)
        case "certified accuracy":
            share = certified(row, figure.eps or 0.0)
        case "average certified radius":
            radius = figures(row).get("ACR")
            return None if radius is None else (radius, None)
        case "mean queries" | "median queries":
            hits = column(row, "first_hit").astype(float)
            hits[hits == NEVER] = math.inf
            value = query_statistics(hits, budget)[figure.metric.replace(" ", "_")]
            return None if math.isnan(value) else (value, None)
        case "logit difference":
            change = figures(row).get("logit_change")
            return None if change is None else (change, None)
        case _:
            return None
    if share.n == 0:
        return None
    low, high = share.interval
    return 100 * share.value, (100 * low, 100 * high)


def _differences(
    figure: Figure, row: Row, budget: int, marks: frozenset[str], copies: Mapping[str, str]
) -> Iterable[Difference]:
    cell, n = row.cell, row.n
    if not _same_model(figure, cell):
        yield Difference("model", figure.model, cell.model.spec)
    if cell.data_hash:
        yield Difference("data", "the original", _copy(cell, copies))
    if figure.n is not None and figure.n != n:
        yield Difference("n", f"{figure.n}", f"{n}")
    for stated, ours in zip(parse_chain(figure.spec.defense or "none"), cell.defense, strict=True):
        yield from _arguments(stated, ours)
    for mark in sorted(marks & UNRANKED):
        yield Difference("row", "whole", mark)
    if figure.metric in UNATTACKED:
        return
    if figure.spec.attack is not None:
        yield from _arguments(Spec.parse(figure.spec.attack), cell.attack)
    if not cell.threat.asks:
        return
    if figure.eps is None or not math.isclose(figure.eps, cell.threat.eps, rel_tol=1e-6):
        stated_eps = "not stated" if figure.eps is None else f"{figure.eps:g}"
        yield Difference("eps", stated_eps, format_eps(cell.threat.eps, cell.threat.norm))
    if figure.queries is None and cell.threat.access != "gradients":
        yield Difference("queries", "not stated", f"{budget}")
    elif figure.queries is not None and figure.queries != budget:
        yield Difference("queries", f"{figure.queries}", f"{budget}")
    if "rescaled" in marks and budget != cell.threat.query_budget:
        yield Difference("schedule", "for its own budget", f"for {cell.threat.query_budget} queries")
    if figure.quantise is not None and figure.quantise != cell.quantise:
        yield Difference("input", *("8-bit" if rounds else "float" for rounds in (figure.quantise, cell.quantise)))


def _arguments(stated: Spec, ours: Component) -> Iterable[Difference]:
    """The arguments that are stated and not ours; what is not stated is not compared."""
    for key, value in stated.args.items():
        mine = ours.params.get(key)
        if isinstance(value, int | float) and isinstance(mine, int | float):
            same = math.isclose(value, mine, rel_tol=1e-6)
        else:
            same = value == mine
        if not same:
            yield Difference(key, str(value), "left to the component" if mine is None else str(mine))


def _is_defense(figure: Figure) -> bool:
    """Whether the model that a figure names is its defense."""
    return figure.spec.defense is None and figure.spec.model is not None


def _same_model(figure: Figure, cell: Cell) -> bool:
    return figure.spec.model is not None and str(Spec.parse(figure.spec.model)) == cell.model.spec


def _copy(cell: Cell, copies: Mapping[str, str]) -> str:
    return copies.get(cell.data_hash, f"an unknown copy ({cell.data_hash[:8]})")


def _section(matches: Sequence[Match], sources: dict[str, int], copies: Mapping[str, str]) -> str:
    """The table of one row of ours."""
    head = f"### {in_markdown(_title(matches[0]))}"
    notes = "  \n".join(map(in_markdown, _differing(matches)))
    parts = (head, in_markdown(_setting(matches[0], copies)), markdown_table(_lines(matches, sources)), notes)
    return "\n\n".join(filter(None, parts))


def _latex(matches: Sequence[Match], copies: Mapping[str, str]) -> str:
    """The table of one row of ours, which says itself where its figures come from."""
    sources: dict[str, int] = {}
    lines = _lines(matches, sources)
    cited = (f"[{number}] {source}" for source, number in sources.items())
    told = (_title(matches[0]), _setting(matches[0], copies), *_differing(matches), READ, *cited)
    return latex_table(lines, " ".join(f"{each}." for each in told))


def _title(of: Match) -> str:
    seed = f", seed {of.cell.seed}" if of.cell.seed else ""
    return f"{of.cell.defense_title} · {of.cell.attack.spec}{seed}"


def _setting(of: Match, copies: Mapping[str, str]) -> str:
    return f"{of.cell.setting} · {of.n} samples, {_copy(of.cell, copies)}"


def _lines(matches: Sequence[Match], sources: dict[str, int]) -> Lines:
    """Published figures beside one row of ours, each with the number of its source."""
    return [
        {
            "published": f"{_cited(each.figure, sources)} {_short(each.figure)}",
            "there": _number(each.figure.value),
            "ours": _with_interval(each),
            "diff": f"{each.difference:+.{_digits(each.figure)}f}",
            "in": "" if each.inside is None else "yes" if each.inside else "no",
            "differs": " ".join(difference.what for difference in each.differences),
        }
        for each in matches
    ]


def _differing(matches: Sequence[Match]) -> list[str]:
    """What is not the same in the settings, once for all figures beside one row of ours."""
    by_kind: dict[tuple[str, str], dict[str, None]] = {}
    for difference in chain.from_iterable(each.differences for each in matches):
        by_kind.setdefault((difference.what, difference.ours), {})[difference.published] = None
    return [f"{what}: {' or '.join(there)} ≠ {ours}" for (what, ours), there in by_kind.items()]


def _missing_section(missing: Sequence[Figure]) -> str:
    """One item for each published setting, under its source."""
    lists = [
        "\n".join((
            f"{in_markdown(source)}:\n",
            *(f"- {in_markdown(setting)}: {', '.join(values)}" for setting, values in settings.items()),
        ))
        for source, settings in _by_source(missing).items()
    ]
    return "\n\n".join(("### Not run", *lists))


def _missing_latex(missing: Sequence[Figure]) -> str:
    lines = [
        {"source": source, "setting": setting, "published": ", ".join(values)}
        for source, settings in _by_source(missing).items()
        for setting, values in settings.items()
    ]
    return latex_table(lines, "Not run.")


def _by_source(missing: Sequence[Figure]) -> dict[str, dict[str, list[str]]]:
    """What each source says of each setting."""
    by_source: dict[str, dict[str, list[str]]] = {}
    for figure in missing:
        threat = f", {figure.norm}" if figure.norm else ""
        if figure.norm is not None and figure.eps is not None:
            threat += f" {format_eps(figure.eps, figure.norm)}"
        parts = (figure.dataset, figure.model, figure.defense, figure.attack)
        setting = " · ".join(part for part in parts if part != "none") + threat
        of_it = by_source.setdefault(_source(figure), {}).setdefault(setting, [])
        of_it.append(f"{_short(figure)} {_number(figure.value)}")
    return by_source


def _cited(figure: Figure, sources: dict[str, int]) -> str:
    """The number of a published setting in the list at the end."""
    what = ", ".join(part for part in (figure.model, figure.defense, figure.attack) if part != "none")
    return f"[{sources.setdefault(f'{what}: {_source(figure)}', len(sources) + 1)}]"


def _source(figure: Figure) -> str:
    return f"{figure.source}, {figure.place}" + (f" ({figure.note})" if figure.note else "")


def _short(figure: Figure) -> str:
    """The metric as tables head it: clean, @2500, success @2500, mean @2500."""
    name = {"robust accuracy": ""}.get(figure.metric, figure.metric).removesuffix(" accuracy").removesuffix(" rate")
    name = name.removesuffix(" queries")
    if figure.metric == "certified accuracy":
        return f"{name} r={figure.eps:g}"
    at = f"@{figure.queries}" if figure.queries and figure.metric not in UNATTACKED else ""
    return f"{name} {at}".strip() or "robust"


def _number(value: float) -> str:
    return f"{value:.4g}" if value < 1 else f"{value:.10g}"


def _digits(figure: Figure) -> int:
    """Of a value of ours, after the point."""
    return 3 if figure.metric == "average certified radius" else 1


def _with_interval(each: Match) -> str:
    if each.interval is None:
        return f"{each.value:.{_digits(each.figure)}f}"
    low, high = each.interval
    digits = 0 if each.n < 1000 else 1
    return f"{each.value:.1f} [{low:.{digits}f}, {high:.{digits}f}]"


def _record(figure: Figure, each: Match | None = None, copies: Mapping[str, str] | None = None) -> dict[str, Any]:
    record: dict[str, Any] = figure.model_dump(exclude={"spec", "note", "quantise", "value", "n"})
    record |= {"unit": figure.unit, "published": figure.value, "published n": figure.n, "note": figure.note}
    cell = each.cell if each else None
    record |= {
        "our model": cell.model.spec if cell else None,
        "our defense": cell.defense_title if cell else None,
        "our attack": cell.attack.spec if cell else None,
        "seed": cell.seed if cell else None,
        "data": _copy(cell, copies or {}) if cell else None,
        "n": each.n if each else None,
        "ours": each.value if each else None,
        "low": each.interval[0] if each and each.interval else None,
        "high": each.interval[1] if each and each.interval else None,
        "difference": each.difference if each else None,
        "inside": each.inside if each else None,
        "differs": "; ".join(map(str, each.differences)) if each else "not run",
    }
    return record
