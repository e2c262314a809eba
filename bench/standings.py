"""Stored rows as standings: who stands after how many queries, under each attack and the worst of them, and ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.flags import Flag, flags
from bench.marks import UNRANKED, marks_of
from bench.outcomes import (
    Share,
    clean,
    column,
    figures,
    final,
    is_control,
    lasting,
    query_budget,
    restricted,
    robust,
    tested,
)
from bench.stats import holm, mcnemar
from bench.store import Row

RELEASED = {  # column of a learner's line: figure; shares are printed in percent
    "peak": "peak_test_accuracy", "train": "train_accuracy", "changed pixels": "changed_pixels_mean", "PSNR": "psnr",
}  # fmt: skip


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
    figures: dict[str, float] = field(default_factory=dict)  # of one row; see bench.outcomes.figures
    lasting: dict[str, Share] = field(default_factory=dict)  # of random defenses; see bench.outcomes.lasting


@dataclass(frozen=True)
class Table:
    """Lines that compare with each other: one data set, model and threat."""

    title: str
    lines: list[Line]
    origin: str = ""  # hardware, version and commit that the rows come from
    flags: list[Flag] = field(default_factory=list)


def tables(rows: Iterable[Row], budgets: Sequence[int] = ()) -> list[Table]:
    """One table for each model under each threat, one for the learners on each data set.

    Args:
        rows: what :meth:`bench.store.Store.rows` read.
        budgets: query budgets to show; those that the rows have run with are always there.
    """
    rows = list(rows)
    result = []
    for (_, title, *_), group in groupby(sorted(rows, key=_comparable), key=_comparable):
        members = list(group)
        lines = _released_lines(members) if members[0].cell.learns else _served_lines(members, budgets)
        result.append(Table(title, lines, _origin(members), flags(members, rows)))
    return result


def _served_lines(rows: list[Row], budgets: Sequence[int]) -> list[Line]:
    largest = max(query_budget(row) for row in rows)
    shown = sorted({budget for budget in budgets if budget < largest} | {query_budget(row) for row in rows})
    by_defense: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.cell.defense_name, row.cell.attack.spec, row.cell.seed)):
        by_defense.setdefault(row.cell.defense_name, []).append(row)

    worst = {
        name: _worst_case([row for row in members if not is_control(row)] or members, shown)
        for name, members in by_defense.items()
    }
    for name in _spared(by_defense):
        worst[name] = replace(worst[name], marks=worst[name].marks | {"spared"})
    decisive = {name: line.shares[f"@{largest}"] for name, line in worst.items()}
    ranks = _ranks({name: decisive[name].right for name, line in worst.items() if not line.marks & UNRANKED})
    lines = []
    for name in sorted(worst, key=lambda name: (ranks.get(name, len(worst) + 1), -decisive[name].value)):
        line = worst[name]
        lines.append(replace(line, rank=ranks.get(name)))
        if line.attack.startswith("worst") or len(by_defense[name]) > 1:
            lines += [_served_line(row, shown) for row in by_defense[name]]
    return lines


def _served_line(row: Row, budgets: Sequence[int]) -> Line:
    shares = {"clean": clean(row)}
    shares |= {f"@{budget}": robust(row, budget) for budget in budgets}
    shares["final"] = final(row)
    seed = f", seed {row.cell.seed}" if row.cell.seed else ""
    name = row.cell.attack.spec + seed
    marks = marks_of(row)
    again = {f"@{budget}": lasting(row, budget) for budget in budgets} if "random" in marks else {}
    return Line(row.cell.defense_name, name, shares, len(row.records), marks, figures=figures(row), lasting=again)


def _worst_case(rows: list[Row], budgets: Sequence[int]) -> Line:
    """The line of a defense: each sample under whichever of the attacks beats it soonest."""
    if len(rows) == 1:
        return _served_line(rows[0], budgets)
    common = set.intersection(*(set(column(row, "sample_id")) for row in rows))
    same = [restricted(row, common) for row in rows]
    shares = {"clean": Share(np.logical_and.reduce([clean(row).right for row in same]))}
    for budget in budgets:
        shares[f"@{budget}"] = _standing(same, budget, robust)
    shares["final"] = Share(np.logical_and.reduce([final(row).right for row in same]))
    marks = frozenset().union(*(marks_of(row) for row in rows)) - {"rescaled", "batch-dependent", "control"}
    again = {f"@{budget}": _standing(same, budget, lasting) for budget in budgets} if "random" in marks else {}
    return Line(rows[0].cell.defense_name, f"worst of {len(rows)}", shares, len(common), marks, lasting=again)


def _standing(rows: list[Row], budget: int, share: Callable[[Row, int], Share]) -> Share:
    """The samples that stand after ``budget`` queries of each attack, by :func:`robust` or :func:`lasting`."""
    # An attack that ran with a smaller budget has beaten its samples within this one, too.
    return Share(np.logical_and.reduce([share(row, min(budget, query_budget(row))).right for row in rows]))


def _released_lines(rows: list[Row]) -> list[Line]:
    """Each protection under each learner; the learner that gets furthest decides, and low is good for the defender."""
    ordered = sorted(rows, key=lambda row: (row.cell.defense_name, row.cell.attack.spec, row.cell.seed))
    by_defense = {name: list(group) for name, group in groupby(ordered, key=lambda row: row.cell.defense_name)}
    clean = {name: value for name, (value, _) in _over_seeds(by_defense.get("none", [])).items()}
    best = {name: _best_learner(members) for name, members in by_defense.items()}
    marks = {name: frozenset().union(*map(marks_of, members)) for name, members in by_defense.items()}
    spared = _spared(by_defense)
    marks |= {name: marks[name] | {"spared"} for name in spared}
    ranks = _ranks({name: ~tested(best[name]).right for name in best if not marks[name] & UNRANKED})
    lines = []
    for name in sorted(best, key=lambda name: (ranks.get(name, len(best) + 1), tested(best[name]).value)):
        members, spread = by_defense[name], _over_seeds(by_defense[name])
        if len(spread) > 1:
            learner = best[name].cell.attack.spec
            extra = {"clean": clean[learner]} if learner in clean else {}
            lines.append(
                Line(name, f"best of {len(spread)}: {learner}", {"test": tested(best[name])}, len(best[name].records),
                     marks[name], ranks.get(name), extra)
            )  # fmt: skip
        for row in members:
            learner, seed = row.cell.attack.spec, f", seed {row.cell.seed}" if row.cell.seed else ""
            extra = {"clean": clean[learner]} if learner in clean else {}
            if sum(other.cell.attack.spec == learner for other in members) > 1:
                extra |= dict(zip(("mean", "SD"), spread[learner], strict=True))
            extra |= {title: row.figures[figure] for title, figure in RELEASED.items() if figure in row.figures}
            decides = len(spread) == 1
            own = marks_of(row) | ({"spared"} if decides and name in spared else set())
            rank = ranks.get(name) if decides else None
            lines.append(Line(name, learner + seed, {"test": tested(row)}, len(row.records), own, rank, extra))
    return lines


def _spared(by_defense: dict[str, list[Row]]) -> set[str]:
    """The defenses that some attack on the undefended model has not met: their worst case would flatter them."""
    met = {name: {row.cell.attack.spec for row in rows} for name, rows in by_defense.items()}
    return {name for name in met if met.get("none", set()) - met[name]}


def _over_seeds(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """By learner: mean and standard deviation over seeds of its test accuracy."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if len(row.records):
            values.setdefault(row.cell.attack.spec, []).append(tested(row).value)
    return {name: (mean(found), stdev(found) if len(found) > 1 else 0.0) for name, found in values.items()}


def _best_learner(rows: Sequence[Row]) -> Row:
    """The row of the learner with the highest test accuracy, on average over seeds."""
    means = _over_seeds(rows)
    return max(rows, key=lambda row: means.get(row.cell.attack.spec, (-1.0, 0.0))[0])


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

    def told(fact: Mapping[str, Any], name: str) -> str:
        return str(fact.get(name, "unknown"))

    def made_by(fact: Mapping[str, Any]) -> str:
        torch = told(fact.get("libraries", {}), "torch")
        return f"Parry {told(fact, 'parry')} at {told(fact, 'commit')[:8]}, torch {torch}"

    hardware = sorted({f"{told(fact, 'hardware')}, {told(fact, 'device')}" for fact in facts})
    code = sorted({made_by(fact) for fact in facts})
    days = sorted({told(fact, "finished")[:10] for fact in facts})
    return f"Measured on {'; '.join(hardware)}; {'; '.join(code)}; {' and '.join(days)}." if facts else ""


def _comparable(row: Row) -> tuple[bool, str, str, str]:
    """Rows compare when all this is equal; two files of weights under one name must not share a table."""
    cell = row.cell
    return cell.learns, cell.setting, cell.data_hash, cell.weights_hash
