"""Two defenses on the same samples: paired differences at every budget, under each attack and the worst of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from bench.errors import ConfigError
from bench.identity import placeless
from bench.marks import MARKS
from bench.outcomes import Share, is_control, query_budget, restricted
from bench.spec import parse_chain
from bench.standings import tables
from bench.stats import mcnemar, paired_bootstrap
from bench.store import Row
from bench.text import in_markdown, markdown_table, text_frame, tidy

Style = Literal["md", "csv", "json"]


@dataclass(frozen=True)
class Versus:
    """Two defenses under one attack, or the worst of several, up to one budget: outcomes on the same samples."""

    attack: str
    at: str
    a: Share
    b: Share
    marks: frozenset[str]

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, of the difference: 10,000 paired bootstrap resamples."""
        return paired_bootstrap(self.a.right, self.b.right)

    @property
    def p_value(self) -> float:
        """Exact McNemar, two-sided."""
        return mcnemar(self.a.right, self.b.right)


@dataclass(frozen=True)
class Duel:
    """Everything two defenses have in common in one setting."""

    setting: str
    a: str
    b: str
    n: int
    lines: list[Versus]
    unshared: dict[str, list[str]]  # attacks that only one of them has met, by defense


def duels(rows: Sequence[Row], a: str, b: str, budgets: Sequence[int] | None = None) -> list[Duel]:
    """Defenses ``a`` and ``b`` on the same samples, in every setting where rows have both.

    Args:
        rows: what :meth:`bench.store.Store.rows` read.
        a, b: chains as suites write them.
        budgets: query budgets to compare at; by default 100, 1000 and the largest, where rows reach them.

    Raises:
        ConfigError: an unknown defense, the same one twice, or two that have no setting, attack, budget or sample in
            common.
    """
    a, b = (_present(name, rows) for name in (a, b))
    if a == b:
        raise ConfigError(f"both defenses are {a}; name two of {_listed({row.cell.defense_name for row in rows})}")
    of_a, of_b = (_by_setting(row for row in rows if row.cell.defense_name == name) for name in (a, b))
    common = sorted(of_a.keys() & of_b.keys())
    if not common:
        on_a, on_b = (_listed(setting for setting, *_ in of) for of in (of_a, of_b))
        raise ConfigError(
            f"{a} and {b} share no setting: {a} has run on {on_a}, {b} on {on_b} "
            "(data, weights and numerics must be equal, too); run both in one suite"
        )
    return [_duel(of_a[key], of_b[key], budgets) for key in common]


def render_duels(duels: Sequence[Duel], style: Style) -> str:
    """The comparisons as Markdown, a table for each setting; or as CSV or JSON, a record for each line."""
    if style != "md":
        return tidy([_versus_record(duel, line) for duel in duels for line in duel.lines], style)
    parts = []
    for duel in duels:
        cells = []
        previous = None
        for line in duel.lines:
            signs = "".join(MARKS[name][0] for name in MARKS if name in line.marks)
            low, high = (100 * end for end in line.interval)
            digits = 0 if duel.n < 1000 else 1
            cells.append(
                {
                    "attack": "" if line.attack == previous else f"{line.attack} {signs}".strip(),
                    "at": line.at,
                    "A": str(line.a),
                    "B": str(line.b),
                    "A − B": f"{100 * (line.a.value - line.b.value):+.1f} [{low:+.{digits}f}, {high:+.{digits}f}]",
                    "p": "<0.0001" if line.p_value < 1e-4 else f"{line.p_value:.4f}",
                }
            )
            previous = line.attack
        notes = [f"{MARKS[name][0]} {MARKS[name][1]}" for name in MARKS if any(name in x.marks for x in duel.lines)]
        notes += [
            in_markdown(f"only {name} has met {_listed(specs)}") for name, specs in duel.unshared.items() if specs
        ]
        notes.append(
            "A, B: 95 % Wilson; A − B in points: 95 % paired bootstrap; p: exact McNemar, each line by itself."
        )
        head = f"### A = {in_markdown(duel.a)}, B = {in_markdown(duel.b)}"
        setting = f"{in_markdown(duel.setting)} · {duel.n} samples in common"
        parts.append("\n\n".join((head, setting, markdown_table(text_frame(cells)), "  \n".join(notes))))
    return "\n\n".join(parts)


def _present(name: str, rows: Iterable[Row]) -> str:
    """The chain ``name`` as rows write it."""
    present = {row.cell.defense_name for row in rows}
    written = " + ".join(str(placeless(spec)) for spec in parse_chain(name)) or "none"
    if written in present:
        return written
    near = get_close_matches(written, sorted(present), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"no rows of defense {name!r}; {hint}present: {_listed(present)}")


def _by_setting(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by what must be equal for two of them to compare."""
    result: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cell = row.cell
        result.setdefault((cell.setting, cell.data_hash, cell.weights_hash, cell.numerics), []).append(row)
    return result


def _duel(of_a: Sequence[Row], of_b: Sequence[Row], budgets: Sequence[int] | None) -> Duel:
    a, b, setting = of_a[0].cell.defense_name, of_b[0].cell.defense_name, of_a[0].cell.setting
    rows_a, rows_b = _by_attack(of_a), _by_attack(of_b)
    attacks = sorted(rows_a.keys() & rows_b.keys())
    if not attacks:
        raise ConfigError(
            f"{a} and {b} share no finished attack on {setting}: {a} has met {_listed(rows_a)}, {b} {_listed(rows_b)}; "
            "run both under one"
        )
    pairs = [(rows_a[attack], rows_b[attack]) for attack in attacks]
    ids = set.intersection(*(set(row.records["sample_id"]) for pair in pairs for row in pair))
    if not ids:
        raise ConfigError(f"{a} and {b} have no samples in common on {setting}; run both with the same n")
    pairs = [(restricted(row_a, ids), restricted(row_b, ids)) for row_a, row_b in pairs]
    shown = _budgets([min(query_budget(row_a), query_budget(row_b)) for row_a, row_b in pairs], budgets, setting)
    lines: list[Versus] = []
    counted = [pair for pair in pairs if not is_control(pair[0])]
    if len(counted) > 1 and not of_a[0].cell.learns:
        lines += _versus(f"worst of {len(counted)}", [row for row, _ in counted], [row for _, row in counted], shown)
    for attack, (row_a, row_b) in zip(attacks, pairs, strict=True):
        lines += _versus(attack, [row_a], [row_b], shown)
    unshared = {a: sorted(rows_a.keys() - rows_b.keys()), b: sorted(rows_b.keys() - rows_a.keys())}
    return Duel(setting, a, b, len(ids), lines, unshared)


def _versus(attack: str, rows_a: list[Row], rows_b: list[Row], budgets: Sequence[int]) -> list[Versus]:
    """One line for each share that both sides have; of several rows, the worst case."""
    a, b = (tables(rows, budgets)[0].lines[0] for rows in (rows_a, rows_b))
    wanted = {f"@{budget}" for budget in budgets} | {"clean", "final", "test"}
    return [
        Versus(attack, name, share, b.shares[name], a.marks | b.marks)
        for name, share in a.shares.items()
        if name in wanted and name in b.shares and share.n and b.shares[name].n
    ]


def _by_attack(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows with records by their attack; of several budgets the largest."""
    result: dict[str, Row] = {}
    for row in sorted(rows, key=query_budget):
        if len(row.records):
            result[row.cell.attack.spec + (f", seed {row.cell.seed}" if row.cell.seed else "")] = row
    return result


def _budgets(largest: Sequence[int], asked: Sequence[int] | None, setting: str) -> list[int]:
    """The budgets to compare at, up to the largest that both sides have run with under any attack."""
    reach = max(largest)
    if asked is None:
        return sorted({budget for budget in (100, 1000) if budget < reach} | {budget for budget in largest if budget})
    beyond = [budget for budget in asked if budget > reach]
    if beyond:
        raise ConfigError(f"budget is {beyond[0]}, but rows on {setting} have run with {reach} queries; ask for less")
    return sorted(set(asked))


def _versus_record(duel: Duel, line: Versus) -> dict[str, Any]:
    low, high = line.interval
    record: dict[str, Any] = {"setting": duel.setting, "n": duel.n, "attack": line.attack, "at": line.at}
    for side, name, share in (("a", duel.a, line.a), ("b", duel.b, line.b)):
        record |= {side: name, f"{side} accuracy": share.value}
        record |= dict(zip((f"{side} low", f"{side} high"), share.interval, strict=True))
    record |= {"difference": line.a.value - line.b.value, "difference low": low, "difference high": high}
    return record | {"p": line.p_value, "marks": " ".join(sorted(line.marks))}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names))) or "none"
