"""Ranks: who stands better than whom where all have met the same attacks, queries, samples and seeds.

Where a run has stopped early, a pair is compared on the samples that both have taken, by a test that holds at any time.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from bench.plan.order import in_order
from bench.report.marks import UNRANKED, marks_of
from bench.report.outcomes import Share, aligned, is_control, network, query_budget, seen, standing, tested
from bench.report.sequence import paired_sequence
from bench.report.stats import holm, mcnemar_of, paired_t
from bench.results.store import Row

SIGNIFICANT = 0.05
Name = TypeVar("Name", bound=Hashable)
Encounter = tuple[str, int]  # an attack or a learner, and its seed


def tiers(test: str) -> str:
    """What a reader of ranks by this ``test`` must know."""
    return (
        "Ranks are tiers: 1 + the number of defenses that are significantly better, so those that as many are better "
        f"than share one ({test}, Holm over all pairs of the table, 5 %)"
    )


TIERS = tiers("exact McNemar on the worst case of common images")


@dataclass(frozen=True)
class Terms:
    """What a defense must have met to be ranked: each attack under each seed, with so many queries, on these samples.

    They are those of the undefended model, or of all defenses together where it is not there. ``ids`` come in the order
    in which samples are taken.
    """

    budgets: Mapping[Encounter, int]
    ids: tuple[int, ...]

    @classmethod
    def of(cls, by_defense: Mapping[str, Sequence[Row]]) -> "Terms":
        """The terms among these rows. What was run with --limit counts only where nothing else was."""
        every = [row for rows in by_defense.values() for row in rows]
        choices = (list(by_defense.get("none", ())), every)
        rows = next((whole for choice in choices if (whole := [row for row in choice if not row.cell.limited])), every)
        budgets: dict[Encounter, int] = {}
        for row in rows:
            budgets[encounter(row)] = max(query_budget(row), budgets.get(encounter(row), 0))
        ids = sorted(set.intersection(*(set(row.cell.ids) for row in rows)))
        return cls(budgets, tuple(ids[place] for place in in_order(ids)))

    def bars(self, rows: Sequence[Row]) -> frozenset[str]:
        """The marks of a defense, with these rows, that falls short of the terms."""
        specs = {row.cell.attack.spec for row in rows}
        found = {"spared" for spec, _ in self.budgets if spec not in specs}
        needed = set(self.ids)
        for met, budget in self.budgets.items():
            same = [row for row in rows if encounter(row) == met and query_budget(row) >= budget]
            if met[0] in specs and not any(needed.issubset(row.cell.ids) for row in same):
                found.add("short")
        return frozenset(found)

    def untried(self, rows: Sequence[Row]) -> tuple[str, ...]:
        """The attacks that know a defense, with these rows, and that have not met it: it names them itself.

        To meet it takes all samples of the terms, and at least the fewest queries that the terms give any attack.
        """
        least = min(self.budgets.values())
        met = [row for row in rows if query_budget(row) >= least and set(self.ids).issubset(row.cell.ids)]
        named = dict.fromkeys(name for row in rows for part in row.cell.defense for name in part.knows)
        return tuple(name for name in named if not any(row.cell.attack.is_called(name) for row in met))

    def held(self, rows: Sequence[Row]) -> "Held":
        """How a served model with these rows stands on these terms.

        An attack that is no part of them, such as one made for this defense, counts with the queries it had, up to the
        most that the terms allow.
        """
        common = {spec for spec, _ in self.budgets}
        seeds = {seed for _, seed in self.budgets}
        most = max(self.budgets.values())
        by_network: dict[int | None, list[tuple[NDArray[np.bool_], NDArray[np.bool_]]]] = {}
        cut, taken = self._more(rows), self._taken(rows)
        for row in rows:
            spec, seed = encounter(row)
            if (spec in common and (spec, seed) not in self.budgets) or (
                network(row) is not None and seed not in seeds
            ):
                cut = True
                continue
            queries = min(query_budget(row), self.budgets.get((spec, seed), most))
            cut |= queries < query_budget(row)
            stands = self._paired(row, standing(seen(row), queries))
            by_network.setdefault(network(row), []).append((stands, self._passed(row)))
        networks = [np.logical_and.reduce([stands for stands, _ in met]) for met in by_network.values()]
        passed = [np.logical_or.reduce([passed for _, passed in met]) for met in by_network.values()]
        undecided = any((stands & by & taken).any() for stands, by in zip(networks, passed, strict=True))
        undecided |= len(self.ids) > 0 and not taken.any()
        sequential = any(row.sequential for row in rows)
        return Held(np.mean(networks, axis=0) if networks else np.zeros(0), taken, cut, undecided, sequential)

    def learned(self, rows: Sequence[Row]) -> "Held":
        """On how many of its networks a learner, with these rows, is wrong on each sample: what a protection is for."""
        on_terms = [row for row in rows if row.cell.seed in {seed for _, seed in self.budgets}]
        wrong = [~self._paired(row, tested(row)) for row in on_terms]
        cut = len(on_terms) < len(rows) or self._more(on_terms)
        taken, sequential = self._taken(on_terms), any(row.sequential for row in on_terms)
        undecided = len(taken) > 0 and not taken.any()
        return Held(np.mean(wrong, axis=0) if wrong else np.zeros(0), taken, cut, undecided, sequential)

    def _more(self, rows: Sequence[Row]) -> bool:
        """Whether the samples that all ``rows`` have met are more than those of the terms."""
        return len(set.intersection(*(set(row.cell.ids) for row in rows)) - set(self.ids)) > 0 if rows else False

    def _paired(self, row: Row, share: Share) -> NDArray[np.bool_]:
        """(n,) of the terms' samples, by their numbers; one that an attack has not met stands."""
        return aligned(share.right, row.measured.get("sample_id", np.zeros(0)), self.ids, True)

    def _taken(self, rows: Sequence[Row]) -> NDArray[np.bool_]:
        """(n,) of the terms' samples: those that all ``rows`` have, of which some have stopped early."""
        taken = np.ones(len(self.ids), dtype=bool)
        for row in rows:
            if row.stopped:
                taken &= np.isin(self.ids, row.measured.get("sample_id", ()))
        return taken

    def _passed(self, row: Row) -> NDArray[np.bool_]:
        """(n,) of the terms' samples: whether they are of the cell of ``row``, and its attack was not run on them."""
        spared = set(row.cell.ids) - set(row.partial["sample_id"].tolist()) if row.partial else set()
        return np.isin(self.ids, list(spared))


@dataclass(frozen=True)
class Held:
    """By sample of the terms, the share of a defense's networks that stand; and whether its rows hold more.

    Where attacks have stopped early it says something of the samples alone that all of them have ``taken``. It is
    ``undecided`` where one of these stands under all attacks that have met it, and one has not, or where there is none.
    It is ``sequential`` where outcomes could have decided how many these are.
    """

    standing: NDArray[Any]  # (n,)
    taken: NDArray[np.bool_]  # (n,)
    cut: bool
    undecided: bool = False
    sequential: bool = False


class Test(Protocol):
    """How the outcomes of defenses (m, n), paired by sample, compare for the pairs ``one``, ``other`` (k,) of them: by
    how much each first one is better (k,), of which the sign counts, and the p-value (k,) that it is not."""

    def __call__(
        self, outcomes: NDArray[Any], one: NDArray[Any], other: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...


def by_count(
    outcomes: NDArray[Any], one: NDArray[Any], other: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """A :class:`Test` on how many samples one stands alone, by exact McNemar."""
    more = np.stack([(each > outcomes).sum(axis=1) for each in outcomes])  # (m, m)
    return more[one, other] - more[other, one], mcnemar_of(more[one, other], more[other, one])


def by_mean(
    outcomes: NDArray[Any], one: NDArray[Any], other: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """A :class:`Test` on the means, of outcomes that are more than right or wrong, by the paired t-test."""
    pairs = [outcomes[a] - outcomes[b] for a, b in zip(one, other, strict=True)]
    return np.array([pair.mean() for pair in pairs]), np.array([paired_t(pair) for pair in pairs])


@dataclass(frozen=True)
class AtAnyTime:
    """A :class:`Test` as :func:`by_count`, but for pairs of which one is ``sequential`` (m,): on the samples that both
    have ``taken`` (m, n), which come in their order, by :func:`bench.report.sequence.paired_sequence`."""

    taken: NDArray[np.bool_]
    sequential: NDArray[np.bool_]

    def __call__(
        self, outcomes: NDArray[Any], one: NDArray[Any], other: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        counts, p = by_count(outcomes, one, other)
        ahead = counts.astype(float)
        for each in np.unique(one[self.sequential[one] | self.sequential[other]]):
            pairs = np.flatnonzero((one == each) & (self.sequential[each] | self.sequential[other]))
            both = self.taken[each] & self.taken[other[pairs]]
            ours, theirs = outcomes[each], outcomes[other[pairs]]
            p[pairs], ahead[pairs] = paired_sequence(np.where(both, (ours > theirs).astype(int) - (ours < theirs), 0))
        return ahead, p


def ranks(standing: Mapping[Name, NDArray[Any]], test: Test = by_count) -> dict[Name, int]:
    """Tiers, as :func:`tiers` says, by ``test``.

    A rank counts, it does not tell a pair apart: two ranks may differ by a third defense that is better than one only.

    Args:
        standing: by defense, the outcome on each sample, paired by position; of several networks, their mean.
    """
    return {name: 1 + len(by) for name, by in _beaten(standing, test).items()}


def ranks_of(held: Mapping[str, Held]) -> dict[str, int]:
    """The same of defenses that stand so on the terms of all."""
    return {name: 1 + len(by) for name, by in beaten(held).items()}


def beaten(held: Mapping[str, Held]) -> dict[str, frozenset[str]]:
    """By which others each defense is beaten: those that are significantly better."""
    some = {name: each for name, each in held.items() if len(each.standing)}
    if not some:
        return {}
    taken, sequential = np.stack([each.taken for each in some.values()]), [each.sequential for each in some.values()]
    return _beaten({name: each.standing for name, each in some.items()}, AtAnyTime(taken, np.array(sequential)))


def _beaten(standing: Mapping[Name, NDArray[Any]], test: Test) -> dict[Name, frozenset[Name]]:
    names = [name for name in standing if len(standing[name])]
    if len(names) < 2:
        return dict.fromkeys(names, frozenset())
    one, other = np.triu_indices(len(names), 1)
    ahead, p_values = test(np.stack([standing[name] for name in names]), one, other)
    found: dict[Name, set[Name]] = {name: set() for name in names}
    for pair in np.flatnonzero(holm(p_values) < SIGNIFICANT):
        better, worse = (one, other) if ahead[pair] > 0 else (other, one)
        found[names[worse[pair]]].add(names[better[pair]])
    return {name: frozenset(by) for name, by in found.items()}


def counted(rows: Sequence[Row]) -> list[Row]:
    """The rows that a worst case is made of: no controls, where there is anything else.

    Of two tries of one attack, the one that holds all samples and queries of the other stands for both.
    """
    attacks = [row for row in rows if not is_control(row)] or list(rows)
    return [row for row in attacks if not any(_covers(other, row) for other in attacks)]


def _covers(row: Row, other: Row) -> bool:
    """Whether ``row`` is a whole run of the same attack with more queries or samples than ``other``, and no fewer."""
    same = row is not other and encounter(row) == encounter(other) and not marks_of(row) & (UNRANKED | {"sequence"})
    if not same or ("rescaled" in row.cell.attack.traits and query_budget(row) != query_budget(other)):
        return False
    more = query_budget(row) >= query_budget(other) and set(row.cell.ids) >= set(other.cell.ids)
    return more and (query_budget(row), len(row.cell.ids)) != (query_budget(other), len(other.cell.ids))


def encounter(row: Row) -> Encounter:
    """The attack or the learner of a row, and its seed."""
    return row.cell.attack.spec, row.cell.seed
