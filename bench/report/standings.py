"""Stored rows as standings: who stands after how many queries, under each attack and the worst of them, and ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bench.report.flags import Flag, flags
from bench.report.marks import UNRANKED, marks_of
from bench.report.outcomes import (
    Share,
    clean,
    column,
    failure,
    figures,
    final,
    lasting,
    network,
    query_budget,
    restricted,
    robust,
    tested,
)
from bench.report.ranking import Held, Terms, counted, ranks
from bench.report.settings import by_setting, place
from bench.report.versions import by_version, versioned
from bench.results.store import Row

RELEASED = {  # column of a learner's line: figure; shares are printed in percent
    "peak": "peak_test_accuracy", "train": "train_accuracy", "changed pixels": "changed_pixels_mean", "PSNR": "psnr",
}  # fmt: skip
RANKS = (
    "Ranks: an image stands where no query beat it and the final example is right when judged afresh in float32; "
    "exact McNemar on common images, Holm over all pairs, 5 %"
)


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
    figures: dict[str, float] = field(default_factory=dict)  # of one row; see bench.report.outcomes.figures
    lasting: dict[str, Share] = field(default_factory=dict)  # of random defenses; see bench.report.outcomes.lasting
    error: str = ""  # the last line of what a failed row has raised


@dataclass(frozen=True)
class Table:
    """Lines that compare with each other: one data set, model and threat."""

    title: str
    lines: list[Line]
    origin: str = ""  # hardware, version and commit that the rows come from
    flags: list[Flag] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the reader of this table must know


def tables(rows: Iterable[Row], budgets: Sequence[int] = (), all_versions: bool = False) -> list[Table]:
    """One table for each model under each threat, one for the learners on each data set.

    Args:
        rows: what :meth:`bench.results.store.Store.rows` read.
        budgets: query budgets to show; those that the rows have run with are always there.
        all_versions: show the rows of older versions of a component, too; they are never ranked.
    """
    newest, older = by_version(rows)
    shown = by_setting([*newest, *older] if all_versions else newest)
    outdated = {id(row) for row in older}
    left_out = {} if all_versions else _by_place(older)
    result = []
    for title, members in shown.items():
        current = [row for row in members if id(row) not in outdated]
        lines = _lines(current, budgets) if current else []
        lines += [_older_line(row, budgets) for row in _ordered(members) if id(row) in outdated]
        note = _left_out(left_out.get(place(members[0]), []))
        notes = [*_rank_notes(lines, current), *([note] if note else [])]
        result.append(Table(title, lines, _origin(members), flags(current, newest), notes))
    return result


def _lines(rows: list[Row], budgets: Sequence[int]) -> list[Line]:
    return _released_lines(rows) if rows[0].cell.learns else _served_lines(rows, budgets)


def _served_lines(rows: list[Row], budgets: Sequence[int]) -> list[Line]:
    """Each defense under the worst of its attacks, then under each of them; the best defense first."""
    shown = _shown(rows, budgets)
    by_defense = _by_defense(rows)
    terms = Terms.of(by_defense)
    worst = {name: worst_case(counted(members), shown) for name, members in by_defense.items()}
    worst = {name: replace(line, marks=line.marks | terms.bars(by_defense[name])) for name, line in worst.items()}
    held = {name: terms.held(counted(by_defense[name])) for name, line in worst.items() if not line.marks & UNRANKED}
    ranked = ranks({name: each.standing for name, each in held.items()})

    def order(name: str) -> tuple[float, ...]:
        value = held[name].standing.mean() if name in ranked else worst[name].shares[f"@{shown[-1]}"].value
        return ranked.get(name, len(worst) + 1), -float(value)

    lines = []
    for name in sorted(worst, key=order):
        line = _ranked(worst[name], ranked.get(name), held.get(name))
        lines.append(line)
        if len(by_defense[name]) > 1:
            lines += [_served_line(row, shown) for row in by_defense[name]]
    return lines


def _ranked(line: Line, rank: int | None, held: Held | None) -> Line:
    return replace(line, rank=rank, marks=line.marks | ({"cut"} if rank and held and held.cut else set()))


def _served_line(row: Row, budgets: Sequence[int]) -> Line:
    shares = {"clean": clean(row)}
    shares |= {f"@{budget}": robust(row, budget) for budget in budgets}
    shares["final"] = final(row)
    marks = marks_of(row)
    again = {f"@{budget}": lasting(row, budget) for budget in budgets} if "random" in marks else {}
    return Line(
        row.cell.defense_label, _attack(row), shares, len(row.records), marks,
        figures=figures(row), lasting=again, error=failure(row),
    )  # fmt: skip


def _older_line(row: Row, budgets: Sequence[int]) -> Line:
    """The line of a row of an older version, which says of each component which version it was."""
    chain = " + ".join(map(versioned, row.cell.defense)) or "none"
    line = _learner_line(row) if row.cell.learns else _served_line(row, _shown([row], budgets))
    return replace(line, defense=chain, attack=versioned(row.cell.attack) + _seed(row), marks=line.marks | {"older"})


def worst_case(rows: list[Row], budgets: Sequence[int]) -> Line:
    """The line of a defense: each sample under whichever of the attacks beats it soonest.

    That is asked of each network by itself, and what several of them give is averaged: no one is served three networks.
    A row without records counts with its marks alone.
    """
    if len(rows) == 1:
        return _served_line(rows[0], budgets)
    met = [row for row in rows if len(row.records)] or rows[:1]
    common = set.intersection(*(set(column(row, "sample_id")) for row in met))
    by_network: dict[int | None, list[Row]] = {}
    for row in met:
        by_network.setdefault(network(row), []).append(restricted(row, common))
    networks = list(by_network.values())
    shares = {"clean": _worst(networks, lambda row: clean(row).right)}
    for budget in budgets:
        shares[f"@{budget}"] = _left(networks, budget, robust)
    shares["final"] = _worst(networks, lambda row: final(row).right)
    marks = frozenset().union(*(marks_of(row) for row in rows)) - {"rescaled", "batch-dependent", "control"}
    again = {f"@{budget}": _left(networks, budget, lasting) for budget in budgets} if "random" in marks else {}
    attacks = dict.fromkeys(_attack(row, seed=len(networks) == 1) for row in met)
    name = f"worst of {len(attacks)}" if len(attacks) > 1 else next(iter(attacks))
    if len(networks) > 1:
        name += f" · {len(networks)} networks"
    return Line(met[0].cell.defense_label, name, shares, len(common), marks, lasting=again)


def _left(networks: list[list[Row]], budget: int, share: Callable[[Row, int], Share]) -> Share:
    """The samples that stand after ``budget`` queries of each attack, by :func:`robust` or :func:`lasting`."""
    # An attack that ran with a smaller budget has beaten its samples within this one, too.
    return _worst(networks, lambda row: share(row, min(budget, query_budget(row))).right)


def _worst(networks: list[list[Row]], right: Callable[[Row], Any]) -> Share:
    """The samples that are right under every attack on a network, for each of the networks."""
    each = [np.logical_and.reduce([right(row) for row in rows]) for rows in networks]
    return Share(each[0] if len(each) == 1 else np.stack(each))


def _released_lines(rows: list[Row]) -> list[Line]:
    """Each protection under each learner; the learner that gets furthest decides, and low is good for the defender."""
    by_defense = _by_defense(rows)
    terms = Terms.of(by_defense)
    learners = {name: _by_learner(members) for name, members in by_defense.items()}
    reached = {name: {each: learned(members) for each, members in of.items()} for name, of in learners.items()}
    best = {name: max(of_it, key=lambda learner: _known(of_it[learner].value)) for name, of_it in reached.items()}
    marks = {
        name: frozenset().union(terms.bars(members), *map(marks_of, members)) for name, members in by_defense.items()
    }
    held = {name: terms.learned(learners[name][best[name]]) for name in best if not marks[name] & UNRANKED}
    ranked = ranks({name: each.standing for name, each in held.items()})
    unprotected = {learner: share.value for learner, share in reached.get("none", {}).items()}
    lines = []
    for name in sorted(best, key=lambda name: (ranked.get(name, len(best) + 1), reached[name][best[name]].value)):
        learner = best[name]
        share, members = reached[name][learner], by_defense[name]
        head = len(members) > 1
        if head:
            attack = f"best of {len(learners[name])}: {learner}" if len(learners[name]) > 1 else learner
            attack += f" · {share.networks} networks" if share.networks > 1 else ""
            line = Line(members[0].cell.defense_label, attack, {"test": share}, share.n, marks[name])
            line = replace(line, extra=_beside(unprotected, learner) | (_over_networks(share)))
            lines.append(_ranked(line, ranked.get(name), held.get(name)))
        for row in members:
            line = _learner_line(row)
            line = replace(line, extra=_beside(unprotected, row.cell.attack.spec) | line.extra)
            lines.append(line if head else _ranked(replace(line, marks=marks[name]), ranked.get(name), held.get(name)))
    return lines


def _learner_line(row: Row) -> Line:
    extra = {title: row.figures[figure] for title, figure in RELEASED.items() if figure in row.figures}
    shares, n = {"test": tested(row)}, len(row.records)
    return Line(row.cell.defense_label, _attack(row), shares, n, marks_of(row), extra=extra, error=failure(row))


def _beside(unprotected: Mapping[str, float], learner: str) -> dict[str, float]:
    """What the learner reaches without protection, where that was measured."""
    return {"clean": unprotected[learner]} if _known(unprotected.get(learner, -1.0)) >= 0 else {}


def _over_networks(share: Share) -> dict[str, float]:
    return {"mean": share.value, "SD": share.spread} if share.networks > 1 else {}


def learned(rows: Sequence[Row]) -> Share:
    """The test accuracy of a learner, of each network that it has trained, on the samples that all have met."""
    met = [row for row in rows if len(row.records)]
    if not met:
        return Share(np.zeros(0, dtype=bool))
    common = set.intersection(*(set(column(row, "sample_id")) for row in met))
    return _worst([[restricted(row, common)] for row in met], lambda row: tested(row).right)


def _known(value: float) -> float:
    """``value`` for an order, below all others where nothing was measured."""
    return -1.0 if np.isnan(value) else value


def _by_defense(rows: Sequence[Row]) -> dict[str, list[Row]]:
    result: dict[str, list[Row]] = {}
    for row in _ordered(rows):
        result.setdefault(row.cell.defense_name, []).append(row)
    return result


def _by_learner(rows: Sequence[Row]) -> dict[str, list[Row]]:
    result: dict[str, list[Row]] = {}
    for row in rows:
        result.setdefault(row.cell.attack.spec, []).append(row)
    return result


def _ordered(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.cell.defense_name, row.cell.attack.spec, row.cell.seed))


def _attack(row: Row, seed: bool = True) -> str:
    return row.cell.attack.label + (_seed(row) if seed else "")


def _seed(row: Row) -> str:
    return f", seed {row.cell.seed}" if row.cell.seed else ""


def _shown(rows: Sequence[Row], budgets: Sequence[int]) -> list[int]:
    """The budgets asked for that rows reach, and those that they ran with."""
    largest = max(query_budget(row) for row in rows)
    return sorted({budget for budget in budgets if budget < largest} | {query_budget(row) for row in rows})


def _by_place(rows: Sequence[Row]) -> dict[tuple[str, bool, str], list[Row]]:
    result: dict[tuple[str, bool, str], list[Row]] = {}
    for row in rows:
        result.setdefault(place(row), []).append(row)
    return result


def _left_out(older: Sequence[Row]) -> str:
    if not older:
        return ""
    return f"Left out: rows of older versions of a component ({len(older)}); --all-versions shows them"


def _rank_notes(lines: Sequence[Line], rows: Sequence[Row]) -> list[str]:
    """How the ranks of served models were found, where there are any to tell apart."""
    if rows and not rows[0].cell.learns and sum(line.rank is not None for line in lines) > 1:
        return [RANKS]
    return []


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
