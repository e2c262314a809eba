"""The data track: learners that train on released data, and what they know of clean images afterwards."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from bench.plan.cell import Cell
from bench.report.figures import figures, placed
from bench.report.line import Line, attack_label, by_defense, has_ranks, with_rank
from bench.report.marks import UNRANKED, marks_of
from bench.report.outcomes import Share, failure, restricted, scope, taken, tested, under_all
from bench.report.ranking import TIERS, Held, Terms, ranks_of
from bench.results.store import Row
from bench.threat import Access
from bench.tracks.track import Progress, Tools, Words

if TYPE_CHECKING:
    from bench.measure.measured import Measured
    from bench.plan.tasks import Task

RANKS = f"{TIERS}; the worst case of a protection is the learner that gets most, and better is where that one is wrong"
WORDS = Words(
    "best learner", "learner", "learner", "What each learner gets", "what the learner gets from unprotected images"
)


@dataclass(frozen=True)
class Data:
    """A :class:`bench.tracks.track.Track`; the better protection leaves less of the test accuracy."""

    name: str = "data"
    accesses: frozenset[Access] = frozenset({"training-data"})
    beside: frozenset[Access] = frozenset()
    pools: bool = False
    heads: bool = True
    words: Words = WORDS
    measures: str = "test accuracy"
    good: Literal["high", "low"] = "low"
    reading: str = (
        "The test accuracy of a network that the best of the learners has trained on the released images. Low is good "
        "for their owner."
    )

    def shard_size(self, task: "Task", size: int) -> int:
        return len(task.cell.ids)

    def measure(
        self, task: "Task", positions: Sequence[int], tools: Tools, progress: Progress
    ) -> "AbstractContextManager[Measured]":
        from bench.tracks.learning import measure  # only here: who reads results needs no torch

        return measure(task, positions, tools, progress)

    def queries(self, task: "Task", samples: int) -> int | None:
        return None

    def title(self, cell: Cell) -> str:
        return cell.setting

    def facts(self, cell: Cell) -> dict[str, str]:
        return {}

    def summary(self, row: Row) -> str:
        return f"test accuracy {tested(taken(row))} %"

    def line(self, row: Row, budgets: Sequence[int]) -> Line:
        return _line(row)

    def lines(self, rows: Sequence[Row], budgets: Sequence[int]) -> list[Line]:
        """Each protection under each learner; the learner that gets furthest decides, and low is good for the owner."""
        met = by_defense(list(map(taken, rows)))
        learners = {name: _by_learner(members) for name, members in met.items()}
        reached = {name: {each: learned(members) for each, members in of.items()} for name, of in learners.items()}
        best = {name: max(of_it, key=lambda learner: _known(of_it[learner].value)) for name, of_it in reached.items()}
        marks, held = _standing(met, {name: learners[name][best[name]] for name in met})
        ranked = ranks_of(held)
        unprotected = {learner: share.value for learner, share in reached.get("none", {}).items()}
        lines = []
        for name in sorted(best, key=lambda name: (ranked.get(name, len(best) + 1), reached[name][best[name]].value)):
            learner = best[name]
            share, members = reached[name][learner], met[name]
            head = len(members) > 1
            if head:
                attack = f"best of {len(learners[name])}: {learner}" if len(learners[name]) > 1 else learner
                attack += f" · {share.networks} networks" if share.networks > 1 else ""
                line = Line(members[0].cell.defense_label, attack, {"test": share}, share.n, marks[name])
                line = replace(line, extra=_beside(unprotected, learner) | (_over_networks(share)))
                lines.append(with_rank(line, ranked.get(name), held.get(name)))
            for row in members:
                line = _line(row)
                line = replace(line, extra=_beside(unprotected, row.cell.attack.spec) | line.extra)
                if not head:
                    line = with_rank(replace(line, marks=marks[name]), ranked.get(name), held.get(name))
                lines.append(line)
        return lines

    def shares(self, rows: Sequence[Row], budgets: Sequence[int]) -> dict[str, Share]:
        return {"test": learned(rows)}

    def notes(self, lines: Sequence[Line]) -> list[str]:
        """How the ranks were found, where there are any to tell apart."""
        return [RANKS] if has_ranks(lines) else []


def _standing(
    met: Mapping[str, Sequence[Row]], best: Mapping[str, Sequence[Row]]
) -> tuple[dict[str, frozenset[str]], dict[str, Held]]:
    """The marks of each protection, and how each stands that can be ranked, whose ``best`` learner has these rows."""
    terms = Terms.of(met)
    marks = {name: frozenset().union(terms.bars(rows), *map(marks_of, rows)) for name, rows in met.items()}
    held = {name: terms.learned(best[name]) for name in met if not marks[name] & UNRANKED}
    for name in [name for name, each in held.items() if each.undecided]:
        marks[name] |= {"incomplete"}
        del held[name]
    return marks, held


def _line(row: Row) -> Line:
    found = figures(row)
    extra = {figure.name: found[figure.name] for figure in placed("learner") if figure.name in found}
    shares, n, of = {"test": tested(row)}, row.n, len(row.cell.ids) * row.sequential
    return Line(
        row.cell.defense_label, attack_label(row), shares, n, marks_of(row), extra=extra, error=failure(row), of=of
    )


def _beside(unprotected: Mapping[str, float], learner: str) -> dict[str, float]:
    """What the learner reaches without protection, where that was measured."""
    return {"clean": unprotected[learner]} if _known(unprotected.get(learner, -1.0)) >= 0 else {}


def _over_networks(share: Share) -> dict[str, float]:
    return {"mean": share.value, "SD": share.spread} if share.networks > 1 else {}


def learned(rows: Sequence[Row]) -> Share:
    """The test accuracy of a learner, of each network that it has trained, on the samples that all have met."""
    met = [row for row in rows if row.n]
    if not met:
        return Share(np.zeros(0, dtype=bool))
    common = sorted(set.intersection(*(scope(row) for row in met)))
    return under_all([[restricted(row, common)] for row in met], common, lambda row: tested(row).right)


def _known(value: float) -> float:
    """``value`` for an order, below all others where nothing was measured."""
    return -1.0 if np.isnan(value) else value


def _by_learner(rows: Sequence[Row]) -> dict[str, list[Row]]:
    result: dict[str, list[Row]] = {}
    for row in rows:
        result.setdefault(row.cell.attack.spec, []).append(row)
    return result
