"""The query track: attacks that ask a served model, and how many of its answers each sample cost."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.plan.cell import Cell
from bench.report.figures import figures
from bench.report.line import Line, attack_label, by_defense, has_ranks, with_rank
from bench.report.marks import POOLED, UNRANKED, marks_of
from bench.report.outcomes import (
    Share,
    clean,
    failure,
    final,
    first_answers,
    lasting,
    network,
    query_budget,
    restricted,
    robust,
    scope,
    taken,
    under_all,
)
from bench.report.ranking import TIERS, Held, Terms, counted, ranks_of
from bench.results.records import length
from bench.results.store import Row
from bench.system.spread import spread
from bench.threat import Access
from bench.tracks.track import Progress, Tools, Words

if TYPE_CHECKING:
    from bench.measure.measured import Measured
    from bench.plan.tasks import Task

RANKS = f"{TIERS}; an image stands where no query beat it and the final example is right when re-evaluated in float32"
WORDS = Words("worst case", "strongest attack", "attack", "What each attack leaves", "right before any attack")


class Measure(Protocol):
    """What stands of the samples of a row: ``again`` where hits are re-evaluated, ``pooled`` beside other attacks."""

    def __call__(self, row: Row, again: bool, pooled: bool) -> Share: ...


@dataclass(frozen=True)
class Query:
    """A :class:`bench.tracks.track.Track`; the better defense leaves more samples after so many queries."""

    name: str = "query"
    accesses: frozenset[Access] = frozenset({"scores", "labels"})
    beside: frozenset[Access] = frozenset()
    pools: bool = True
    heads: bool = True
    words: Words = WORDS
    measures: str = "robust accuracy"
    good: Literal["high", "low"] = "high"
    informed: bool = True  # whether a defense is ranked only where the attacks that know it have met it
    reading: str = (
        "The share of images that no query has beaten, each under whichever attack beats it soonest. High is good for "
        "the defense."
    )

    def shard_size(self, task: "Task", size: int) -> int:
        return len(task.cell.ids) if getattr(task.attack, "whole_set", False) else size

    def measure(
        self, task: "Task", positions: Sequence[int], tools: Tools, progress: Progress
    ) -> "AbstractContextManager[Measured]":
        from bench.tracks.asking import measure  # only here: who reads results needs no torch

        return measure(task, positions, tools, progress)

    def queries(self, task: "Task", samples: int) -> int | None:
        budget = task.cell.threat.query_budget or 0
        return samples * min(budget, getattr(task.attack, "most_queries", budget))

    def title(self, cell: Cell) -> str:
        return cell.setting + (" · plain precision" if cell.numerics == "plain" else "")

    def facts(self, cell: Cell) -> dict[str, str]:
        return {"eps": repr(cell.threat.eps)}

    def summary(self, row: Row) -> str:
        row, budget = taken(row), query_budget(row)
        return f"clean {clean(row)} %, robust @{budget} {robust(row, budget)} %"

    def columns(self, budgets: Sequence[int]) -> dict[str, Measure]:
        """What a table shows of a row between its clean and its final accuracy, by the heads of the columns."""
        return {f"@{budget}": partial(_within, budget) for budget in budgets}

    def line(self, row: Row, budgets: Sequence[int]) -> Line:
        return _line(taken(row), self.columns(shown([row], budgets)))

    def lines(self, rows: Sequence[Row], budgets: Sequence[int]) -> list[Line]:
        """Each defense under the worst of its attacks, then under each of them; the best defense first."""
        columns = self.columns(shown(rows, budgets))
        met = by_defense(list(map(taken, rows)))
        worst, held = self._standing(met, columns)
        ranked = ranks_of(held)

        def order(name: str) -> tuple[float, ...]:
            value = worst[name].shares[list(columns)[-1]].value
            if name in ranked:
                value = held[name].standing[held[name].taken].mean()
            return ranked.get(name, len(worst) + 1), -float(value)

        def single(name: str) -> list[Line]:  # without their rows, which need not travel
            return [replace(_line(row, columns), row=None) for row in met[name]] if len(met[name]) > 1 else []

        lines = []
        names = sorted(worst, key=order)
        for name, below in zip(names, spread(single, names), strict=True):
            lines.append(with_rank(worst[name], ranked.get(name), held.get(name)))
            lines += [replace(line, row=row) for line, row in zip(below, met[name], strict=False)]
        return lines

    def contest(self, rows: Sequence[Row]) -> dict[str, Held]:
        return self._standing(by_defense(list(map(taken, rows))), self.columns(shown(rows, ())))[1]

    def _standing(
        self, met: Mapping[str, Sequence[Row]], columns: Mapping[str, Measure]
    ) -> tuple[dict[str, Line], dict[str, Held]]:
        """The worst case of each defense, and on the terms of all, how each stands that can be ranked."""
        terms = Terms.of(met)
        worst = {name: worst_case(counted(members), columns) for name, members in met.items()}
        for name, line in worst.items():
            untried = terms.untried(met[name]) if self.informed else ()
            marks = line.marks | terms.bars(met[name]) | ({"untried"} if untried else set())
            worst[name] = replace(line, marks=marks, untried=untried)
        held = {name: terms.held(counted(met[name])) for name, line in worst.items() if not line.marks & UNRANKED}
        for name in [name for name, each in held.items() if each.undecided]:
            worst[name] = replace(worst[name], marks=worst[name].marks | {"incomplete"})
            del held[name]
        return worst, held

    def shares(self, rows: Sequence[Row], budgets: Sequence[int]) -> dict[str, Share]:
        return worst_case(rows, self.columns(budgets)).shares

    def notes(self, lines: Sequence[Line]) -> list[str]:
        """How the ranks were found, where there are any to tell apart; which attacks a defense has yet to meet."""
        untried = [f"∌ {line.defense} has not met {' and '.join(line.untried)}" for line in lines if line.untried]
        return [*([RANKS] if has_ranks(lines) else []), *untried]


def _within(budget: int, row: Row, again: bool, pooled: bool) -> Share:
    """The samples that stand after ``budget`` queries; see :data:`Measure`."""
    # An attack that ran with a smaller budget has beaten its samples within this one, too.
    queries = min(budget, query_budget(row)) if pooled else budget
    return lasting(row, queries) if again else robust(row, queries)


def _line(row: Row, columns: Mapping[str, Measure]) -> Line:
    shares = {"clean": clean(row)}
    shares |= {name: share(row, again=False, pooled=False) for name, share in columns.items()}
    shares["final"] = final(row)
    marks = marks_of(row)
    random = "random" in marks
    again = {name: share(row, again=True, pooled=False) for name, share in columns.items()} if random else {}
    return Line(
        row.cell.defense_label, attack_label(row), shares, length(row.measured), marks,
        row=row, figures=figures(row), lasting=again, error=failure(row),
        of=len(row.cell.ids) if row.partial or row.sequential else 0,
    )  # fmt: skip


def worst_case(rows: Sequence[Row], columns: Mapping[str, Measure]) -> Line:
    """The line of a defense: each sample under whichever of the attacks beats it soonest.

    That is asked of each network by itself, and what several of them give is averaged: no one is served three networks.
    A row without records counts with its marks alone.
    """
    if len(rows) == 1:
        return _line(rows[0], columns)
    met = [row for row in rows if row.measured] or rows[:1]
    common = sorted(set.intersection(*map(scope, met)))
    by_network: dict[int | None, list[Row]] = {}
    for row in met:
        by_network.setdefault(network(row), []).append(restricted(row, common))
    networks = list(by_network.values())

    def pooled(right: Callable[[Row], Any]) -> Share:
        return under_all(networks, common, right)

    shares = {name: pooled(partial(_right, share, False)) for name, share in columns.items()}
    marks = frozenset().union(*(marks_of(row) for row in rows)) & POOLED
    marks |= {"incomplete"} if common and not list(shares.values())[-1].n else frozenset()
    random = "random" in marks
    again = {name: pooled(partial(_right, share, True)) for name, share in columns.items()} if random else {}
    before = under_all([first_answers(rows) for rows in networks], common, lambda row: clean(row).right)
    shares = {"clean": before, **shares, "final": pooled(lambda row: final(row).right)}
    attacks = dict.fromkeys(attack_label(row, seed=len(networks) == 1) for row in met)
    name = f"worst of {len(attacks)}" if len(attacks) > 1 else next(iter(attacks))
    if len(networks) > 1:
        name += f" · {len(networks)} networks"
    planned = set.intersection(*(set(row.cell.ids) for row in met)) if any(row.sequential for row in met) else ()
    return Line(met[0].cell.defense_label, name, shares, len(common), marks, lasting=again, of=len(planned))


def _right(share: Measure, again: bool, row: Row) -> NDArray[np.bool_]:
    return share(row, again=again, pooled=True).right


def shown(rows: Sequence[Row], budgets: Sequence[int]) -> list[int]:
    """The budgets asked for that rows reach, and those that they ran with."""
    largest = max(query_budget(row) for row in rows)
    return sorted({budget for budget in budgets if budget < largest} | {query_budget(row) for row in rows})
