"""A random part of an entry run again here, and whether it agrees within what chance and rounding allow."""

import math
import random
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.entries.folder import ENTRY, NETWORKS, VERIFIED
from bench.entries.remade import remade, spoken
from bench.entries.standing import Verified
from bench.entries.statement import Entry, origin, write
from bench.entries.validate import Report
from bench.measure.pipeline import Pipeline
from bench.plan.cell import Cell, Component
from bench.plan.tasks import Loader, Task
from bench.report.outcomes import (
    Share,
    certified,
    certified_radius,
    clean,
    column,
    query_budget,
    radii,
    restricted,
    standing,
    tested,
)
from bench.report.stats import holm, mcnemar
from bench.results.store import Row, Store
from bench.run.runner import Reporter
from bench.run.runner import run as run_tasks
from bench.spec import Spec, parse_chain
from bench.system.files import keep_file

LEVEL = 0.01  # of all paired tests of an entry together, after Holm
ROUNDING = 0.05  # of the samples of a cell may end otherwise where nothing is random: another order of float32 sums
LEAST = 10  # samples of a cell, where it has so many


class Compared(NamedTuple):
    """A cell run again on ``n`` samples, of which ``differ`` ended otherwise; ``p`` as far as that may be chance."""

    cell: Cell
    n: int
    differ: int
    stated: float
    again: float
    p: float
    exact: bool

    @property
    def allowed(self) -> int:
        """How many samples may end otherwise; all of them, within chance, where something is random."""
        return math.ceil(ROUNDING * self.n) if self.exact else self.n


@dataclass(frozen=True)
class Verdict:
    """What came of running a part again."""

    compared: list[Compared]
    failed: list[str]

    @property
    def problems(self) -> list[str]:
        """What rounding and chance do not explain, a line each."""
        adjusted = holm(np.array([each.p for each in self.compared]))
        found = [f"{cell} fails here" for cell in self.failed]
        for each, p in zip(self.compared, adjusted, strict=True):
            said = f"{each.cell}: {100 * each.stated:.1f} % stated, {100 * each.again:.1f} % here (n={each.n})"
            if each.differ > each.allowed:
                found.append(f"{said}; {each.differ} samples end otherwise, rounding allows {each.allowed}")
            elif p < LEVEL:
                found.append(f"{said}; by chance with p={p:.2g}")
        return found

    @property
    def samples(self) -> int:
        return sum(each.n for each in self.compared)


def check_code(entry: Entry, code: Path | None) -> None:
    """Whether what the entry names can be made with ``code``, asked before anything slow.

    Raises:
        Unknown: somebody's file is needed that is not given.
    """
    for spec in (*parse_chain(entry.defense), *map(Spec.parse, entry.models)):
        spoken(Component(str(spec)), code)


def verify(
    report: Report, loader: Loader, code: Path | None, fraction: float, seed: int, pipeline: Pipeline, store: Store,
    batch_size: int, reporter: Reporter,
) -> Verdict:  # fmt: skip
    """Run ``fraction`` of the samples of each cell of the entry again, in ``store``; networks are trained anew.

    Raises:
        BenchError: a cell cannot be made here.
    """
    parts = [(row, _part(remade(row.cell, loader, code), fraction, seed)) for row in report.rows]
    run_tasks([task for _, task in parts], store, pipeline, len(parts[0][1].cell.ids), batch_size, reporter)
    again = [(row, task, store.row(task.cell)) for row, task in parts]
    failed = [str(row.cell) for row, _, found in again if found.errors or not found.complete]
    compared = [
        _compare(row, found, _same_network(report.folder, task, pipeline))
        for row, task, found in again
        if found.complete
    ]
    return Verdict(compared, failed)


def write_verification(folder: Path, verdict: Verdict, by: str, fraction: float, seed: int, rows: list[Row]) -> None:
    """Say beside ``entry.json`` who has run a part of it again; ``rows`` are those of that run.

    Raises:
        StoreError: it cannot be written.
    """
    facts = origin(rows)
    found = Verified(
        schema_=1, entry_sha256=sha256((folder / ENTRY).read_bytes()).hexdigest(), by=by, fraction=fraction, seed=seed,
        samples=verdict.samples, outcome=outcome(verdict), hardware="; ".join(facts["hardware"]),
        packages="; ".join(facts["packages"]), commit="; ".join(facts["commits"]), finished=facts["finished"],
    )  # fmt: skip
    keep_file(folder / VERIFIED, write(found.model_dump(by_alias=True)))


def outcome(verdict: Verdict) -> str:
    """What came of it, in one sentence."""
    differ, paired = sum(each.differ for each in verdict.compared), sum(not each.exact for each in verdict.compared)
    return (
        f"{differ} of {verdict.samples} samples in {len(verdict.compared)} cells ended otherwise; rounding may explain "
        f"{100 * ROUNDING:g} % of a cell, and of {paired} random or retrained cells what exact McNemar (Holm, "
        f"{100 * LEVEL:g} %) does not tell from chance"
    )


def _part(task: Task, fraction: float, seed: int) -> Task:
    """``task`` on a random part of its samples, the same for all cells of one list."""
    ids = task.cell.ids
    n = min(len(ids), max(LEAST, math.ceil(fraction * len(ids))))
    drawn = random.Random(seed).sample(range(len(ids)), n)
    part = tuple(ids[position] for position in sorted(drawn))
    return replace(task, cell=replace(task.cell, ids=part))


def _same_network(folder: Path, task: Task, pipeline: Pipeline) -> bool:
    """Whether the network that was trained here is that of the entry, bit for bit, if there is one."""
    mine = pipeline.made_for(task)
    theirs = [folder / NETWORKS / path.name for path in mine]
    return all(b.is_file() and a.read_bytes() == b.read_bytes() for a, b in zip(mine, theirs, strict=True))


def _compare(stated: Row, again: Row, same_network: bool) -> Compared:
    cell = stated.cell
    theirs = restricted(stated, set(again.cell.ids))
    ours = restricted(again, set(again.cell.ids))
    traits = {trait for part in (cell.attack, *cell.defense) for trait in part.traits}
    proves = cell.threat.proves
    exact = same_network and not traits & {"random", "batch-dependent", "stateful"} and (cell.threat.asks or proves)
    measures = [clean, _stands] if cell.threat.asks else [tested]
    if proves:
        measures = [partial(certified, radius=radius) for radius in radii([theirs, ours])]
    pairs = [(measure(theirs), measure(ours)) for measure in measures]
    differ = sum((a.right != b.right).astype(int) for a, b in pairs) > 0
    fell = column(theirs, "first_hit") != column(ours, "first_hit") if cell.threat.asks else np.zeros_like(differ)
    if exact and all(origin([stated])[name] == origin([again])[name] for name in ("hardware", "packages")):
        differ = differ | fell  # elsewhere, sums in another order may end a search a query sooner or later
    a, b = pairs[-1]
    p = min(mcnemar(a.right, b.right) for a, b in pairs) * len(pairs)
    if proves:
        a, b = max(pairs, key=lambda pair: abs(pair[0].value - pair[1].value))
        p = mcnemar(certified_radius(theirs), certified_radius(ours))  # on radii it is the sign test
    return Compared(cell, a.n, int(differ.sum()), a.value, b.value, min(p, 1.0), exact)


def _stands(row: Row) -> Share:
    return standing(row, query_budget(row))
