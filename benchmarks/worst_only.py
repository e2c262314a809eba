"""What `bench run --worst-only` saves, from rows of full runs: the queries that it would not have asked.

The planner of a run takes its turns on the stored records, as if each attack ran when its turn came. Records do not
depend on the samples beside them, so the queries of a sample are those that the run would have asked for it.

    python benchmarks/worst_only.py leaderboards/query-cifar10 query-cifar10
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bench.declarations import is_entangled
from bench.entries.plan import asked, met
from bench.plan.cell import Cell
from bench.plan.suite import load_suite
from bench.registry import attacks, defenses, load_plugins
from bench.report.versions import by_version
from bench.results.store import Row, Store
from bench.run.worst_only import Turn, WorstOnly


class Spent(NamedTuple):
    """Queries of one defense on one model: of the full run, and of the worst case alone."""

    full: int
    worst: int

    @property
    def saved(self) -> float:
        return 1 - self.worst / self.full


class Replay:
    """A store in which an attack comes to be when its turn comes, of what full runs have stored."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._full = {row.cell.key: row for row in rows}
        self.met: dict[str, list[int]] = {key: [] for key in self._full}

    def row(self, cell: Cell) -> Row:
        full, met = self._full[cell.key], self.met[cell.key]
        shard = replace(full.shards[0], chosen=tuple(met))
        return Row.of(cell, full.records.iloc[met].reset_index(drop=True), (shard,) if met else ())

    def missing(self, cell: Cell) -> list[int]:
        return sorted(set(range(len(cell.ids))) - set(self.met[cell.key]))

    def run(self, turn: Turn) -> None:
        self.met[turn.key] = sorted({*self.met[turn.key], *turn.positions})

    def spent(self, key: str) -> Spent:
        asked = self._full[key].records["forwards"]
        return Spent(int(asked.sum()), int(asked.iloc[self.met[key]].sum()))


def replay(rows: Sequence[Row]) -> tuple[Replay, dict[tuple[str, str], Spent]]:
    """The turns that ``rows``, in this order, would have taken; and by model and defense what they have cost."""
    store = Replay(rows)
    plan = WorstOnly([row.cell for row in rows], store, [row.cell.key for row in rows if _entangled(row.cell)])
    waiting = plan.first()[::-1]
    while waiting:
        turn = waiting.pop()
        store.run(turn)
        waiting += plan.after(turn.key)
    found: dict[tuple[str, str], Spent] = {}
    for row in rows:
        name = row.cell.model.spec, row.cell.defense_name
        before, now = found.get(name, Spent(0, 0)), store.spent(row.cell.key)
        found[name] = Spent(before.full + now.full, before.worst + now.worst)
    return store, found


def _entangled(cell: Cell) -> bool:
    parts = [attacks.create(cell.attack.spec), *(defenses.create(part.spec) for part in cell.defense)]
    return is_entangled(*parts)


def of_suite(rows: Sequence[Row], name: str) -> list[Row]:
    """Those of ``rows`` that the suite ``name`` has, in its order."""
    by_met = {met(row.cell): row for row in rows}
    return [by_met[each] for each in asked(load_suite(name, {})) if each in by_met]


def total(found: dict[tuple[str, str], Spent]) -> Spent:
    return Spent(sum(each.full for each in found.values()), sum(each.worst for each in found.values()))


if __name__ == "__main__":
    load_plugins()
    folder, suite = sys.argv[1:]
    rows, _ = Store(Path(folder)).rows()
    _, found = replay(of_suite(by_version(rows).newest, suite))
    every = {" | ".join(name): spent for name, spent in found.items()} | {"all": total(found)}
    for name, spent in every.items():
        print(f"{name}: {spent.full:,} queries, {spent.worst:,} for the worst case, {spent.saved:.1%} saved")
