"""Two defenses on the same samples: paired differences at every budget, under each attack and the worst of them."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from bench.errors import ConfigError, did_you_mean
from bench.plan.pin import placeless
from bench.registry import defenses
from bench.report.crossing import Crossing, crossing, falls
from bench.report.marks import marks_of
from bench.report.outcomes import Share, failure, is_control, network, query_budget, restricted, scope, within
from bench.report.ranking import SIGNIFICANT, Encounter, encounter
from bench.report.same_attack import other_attack
from bench.report.settings import by_setting
from bench.report.stats import holm, mcnemar, paired_bootstrap
from bench.report.versions import by_version
from bench.results.records import length
from bench.results.spelling import is_spelt
from bench.results.store import Row
from bench.spec import parse_chain
from bench.tracks import track_of


@dataclass(frozen=True)
class Versus:
    """Two defenses under one attack, or the worst of several, up to one budget: outcomes on the same samples."""

    attack: str
    at: str
    a: Share
    b: Share
    marks: frozenset[str]
    crossing: Crossing | None = None  # of the attack's curves up to all queries; None where there are none to compare

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, of the difference: 10,000 paired bootstrap resamples."""
        return paired_bootstrap(self.a.by_sample, self.b.by_sample)

    @property
    def p_value(self) -> float:
        """Exact McNemar, two-sided."""
        return mcnemar(self.a.by_sample, self.b.by_sample)

    @property
    def discordant(self) -> tuple[int, int]:
        """How many samples stand with the first alone, and how many with the second."""
        a, b = self.a.by_sample, self.b.by_sample
        return int((a > b).sum()), int((a < b).sum())


@dataclass(frozen=True)
class Duel:
    """Everything two defenses have in common in one setting."""

    setting: str
    a: str
    b: str
    n: int
    lines: list[Versus]
    good: Literal["high", "low"]  # which of two accuracies is the better one
    unshared: dict[str, list[str]]  # attacks that only one of them has met, by defense
    failed: list[str] = field(default_factory=list)  # rows with errors, and the last line of each

    @property
    def adjusted(self) -> list[float]:
        """The p-value of each line, adjusted for all lines together (Holm)."""
        return list(map(float, holm(np.array([line.p_value for line in self.lines]))))

    @property
    def better(self) -> list[Literal["a", "b", ""]]:
        """Who is significantly better in each line, by its adjusted p-value; nobody where it may be chance."""
        sign = 1 if self.good == "high" else -1
        gains = [sign * (line.a.value - line.b.value) if p < SIGNIFICANT else 0.0
                 for line, p in zip(self.lines, self.adjusted, strict=True)]  # fmt: skip
        return ["a" if gain > 0 else "b" if gain < 0 else "" for gain in gains]

    @property
    def has_curves(self) -> bool:
        """Whether its attacks have curves of accuracy against queries."""
        return any(line.crossing is not None for line in self.lines)


def duels(rows: Sequence[Row], a: str, b: str, budgets: Sequence[int] | None = None) -> list[Duel]:
    """Defenses ``a`` and ``b`` on the same samples, in every setting where rows have both.

    Args:
        rows: what :meth:`bench.results.store.Store.rows` read.
        a, b: chains as suites write them.
        budgets: query budgets to compare at; by default 100, 1000 and the largest, where rows reach them.

    Raises:
        ConfigError: an unknown defense, the same one twice, or two that have no setting, attack, budget or sample in
            common, have met attacks that are written alike and are not the same, or were stopped early.
    """
    rows = by_version(rows).newest
    a, b = (present(name, rows) for name in (a, b))
    refuse_stopped(row for row in rows if row.cell.defense_title in (a, b))
    if a == b:
        raise ConfigError(f"both defenses are {a}; name two of {listed({row.cell.defense_title for row in rows})}")
    every = _sides(rows, a, b)
    settings = by_setting([*every.a, *every.b])
    common = {title: _sides(members, a, b) for title, members in settings.items()}
    common = {title: both for title, both in common.items() if both.a and both.b}
    if not common:
        on_a, on_b = (listed(row.cell.setting for row in side) for side in every)
        raise ConfigError(
            f"{a} and {b} share no setting: {a} has run on {on_a}, {b} on {on_b} "
            "(data, weights and numerics must be equal, too); run both in one suite"
        )
    return [duel(title, both, budgets, (a, b)) for title, both in common.items()]


def refuse_stopped(rows: Iterable[Row]) -> None:
    """Whether tests for a fixed number of samples may be asked of ``rows``.

    Raises:
        ConfigError: outcomes have decided how many samples one of them has.
    """
    if row := next((row for row in rows if row.stopped), None):
        raise ConfigError(
            f"{row.cell.defense_title} × {row.cell.attack.spec} was stopped early, after {length(row.prefix)} of "
            f"{len(row.cell.ids)} samples, and intervals and tests here are for a fixed number; the same run without "
            "--until completes it"
        )


def present(name: str, rows: Sequence[Row]) -> str:
    """The chain ``name`` as rows write it, which may be in other words, and has files of users by their names alone."""
    present = {row.cell.defense_title for row in rows}
    given = parse_chain(name)
    written, *_ = ways = [" + ".join(map(str, chain)) or "none" for chain in (map(placeless, given), given)]
    for way in (*ways, *(row.cell.defense_title for row in rows if is_spelt(row.cell.defense, name, defenses))):
        if way in present:
            return way
    hint = did_you_mean(written, sorted(present), otherwise="")
    raise ConfigError(f"no rows of defense {name!r}; {hint and hint + ' '}present: {listed(present)}")


class Sides(NamedTuple):
    """Rows of the one defense and of the other."""

    a: list[Row]
    b: list[Row]


def _sides(rows: Sequence[Row], a: str, b: str) -> Sides:
    return Sides(*([row for row in rows if row.cell.defense_title == name] for name in (a, b)))


def duel(setting: str, sides: Sides, budgets: Sequence[int] | None, names: tuple[str, str]) -> Duel:
    """Two defenses, by the ``names`` that a reader knows them by, in the setting that all their rows share.

    Raises:
        ConfigError: they have no attack, budget or sample in common, or one that only its name is common to.
    """
    a, b = names
    met_a, met_b = (best_rows(rows) for rows in sides)
    shared = sorted(met_a.keys() & met_b.keys())
    names_a, names_b = ({_name(*each) for each in met} for met in (met_a, met_b))
    if not shared:
        raise ConfigError(
            f"{a} and {b} share no finished attack on {setting}: {a} has met {listed(names_a)}, "
            f"{b} {listed(names_b)}; run both under one"
        )
    if reason := other_attack(met_a, met_b):
        raise ConfigError(f"{a} and {b} do not compare on {setting}: {reason}; run both alike")
    pairs = [_Pair(met_a[each], met_b[each]) for each in shared]
    ids = set.intersection(*(scope(row) for pair in pairs for row in pair))
    if not ids:
        raise ConfigError(f"{a} and {b} have no samples in common on {setting}; run both with the same n")
    shown = _budgets([pair.queries for pair in pairs], budgets, setting)
    lines: list[Versus] = []
    counted = [pair for pair in pairs if not is_control(pair.a)]
    attacks = {row.cell.attack.spec for row, _ in counted} if network(pairs[0].a) is not None else counted
    if len(attacks) > 1 and track_of(pairs[0].a.cell).pools:
        lines += _versus(f"worst of {len(attacks)}", counted, ids, shown)
    for name, group in _lines(pair for pair in pairs if pair.whole).items():
        lines += _versus(name, group, ids, shown)
    failed = [f"{name} × {_name(*encounter(row))} failed: {failure(row)}"
              for name, rows in zip(names, sides, strict=True) for row in rows if row.errors]  # fmt: skip
    unshared = {a: sorted(names_a - names_b), b: sorted(names_b - names_a)}
    return Duel(setting, a, b, len(ids), lines, track_of(pairs[0].a.cell).good, unshared, failed)


class _Pair(NamedTuple):
    """Rows of both defenses under one attack and one seed."""

    a: Row
    b: Row

    @property
    def queries(self) -> int:
        """How many queries both had."""
        return min(query_budget(self.a), query_budget(self.b))

    @property
    def whole(self) -> bool:
        """Whether both are of all samples, and not of what other attacks had left of them."""
        return not any(row.partial for row in self)

    @property
    def even(self) -> bool:
        """Whether both had as many, so that what the attacks ended with compares, too."""
        return query_budget(self.a) == query_budget(self.b)


def _lines(pairs: Iterable[_Pair]) -> dict[str, list[_Pair]]:
    """Pairs by the line they belong to: networks that seeds have trained are averaged, tries on one are not."""
    result: dict[str, list[_Pair]] = {}
    for pair in pairs:
        spec, seed = encounter(pair.a)
        result.setdefault(spec if network(pair.a) is not None else _name(spec, seed), []).append(pair)
    return {name if len(group) == 1 else f"{name} · {len(group)} networks": group for name, group in result.items()}


def _versus(attack: str, pairs: Sequence[_Pair], ids: Collection[int], budgets: Sequence[int]) -> list[Versus]:
    """One line for each share that both sides have; of several rows, the worst case, with what both of a pair had."""
    rows_a = [_even(pair.a, pair.queries, ids) for pair in pairs]
    rows_b = [_even(pair.b, pair.queries, ids) for pair in pairs]
    track = track_of(pairs[0].a.cell)
    shares_a, shares_b = (track.shares(rows, budgets) for rows in (rows_a, rows_b))
    marks = frozenset().union(*(marks_of(row) for row in (*rows_a, *rows_b)))
    even = all(pair.even for pair in pairs)
    curves = [falls(rows, sorted(ids)) for rows in (rows_a, rows_b)] if any(map(_is_budget, shares_a)) else []
    known = [each for each in curves if each is not None]
    crosses = crossing(*known) if len(known) == 2 else None
    return [
        Versus(attack, name, share, shares_b[name], marks, crosses)
        for name, share in shares_a.items()
        if (even or name != "final") and share.n and shares_b[name].n
    ]


def _is_budget(at: str) -> bool:
    """Whether a column is the accuracy after so many queries."""
    return at.startswith("@")


def _even(row: Row, queries: int, ids: Collection[int]) -> Row:
    """``row`` on the samples, and with the queries, that both sides had."""
    same = restricted(row, ids)
    return same if query_budget(row) == queries else within(same, queries)


def best_rows(rows: Iterable[Row]) -> dict[Encounter, Row]:
    """Rows with records by attack and seed; of several, that with the most queries and samples."""
    ordered = sorted(rows, key=lambda row: (query_budget(row), row.n))
    return {encounter(row): row for row in ordered if row.measured}


def _name(spec: str, seed: int) -> str:
    return spec + (f", seed {seed}" if seed else "")


def _budgets(largest: Sequence[int], asked: Sequence[int] | None, setting: str) -> list[int]:
    """The budgets to compare at, up to the largest that both sides have run with under any attack."""
    reach = max(largest)
    if asked is None:
        return sorted({budget for budget in (100, 1000) if budget < reach} | {budget for budget in largest if budget})
    beyond = [budget for budget in asked if budget > reach]
    if beyond:
        raise ConfigError(f"budget is {beyond[0]}, but rows on {setting} have run with {reach} queries; ask for less")
    return sorted(set(asked))


def listed(names: Iterable[str]) -> str:
    """The names in one line, in their order, each once."""
    return ", ".join(sorted(set(names))) or "none"
