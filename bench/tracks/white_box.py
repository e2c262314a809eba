"""The white-box track: attacks that follow the gradients of a served model, which has no queries to run out of."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.plan.cell import Cell
from bench.report.line import Line, has_ranks
from bench.report.outcomes import Share, clean, lasting, query_budget, standing, taken
from bench.report.ranking import TIERS
from bench.results.store import Row
from bench.threat import Access
from bench.tracks.query import Measure, Query

ROBUST = (
    "Robust: no point that an attack asked about was misclassified, and its final example is right when re-evaluated "
    "in float32. Whoever has gradients can ask for scores and labels, too, so attacks with these count here as well"
)


@dataclass(frozen=True)
class WhiteBox(Query):
    """A :class:`bench.tracks.track.Track`; measured as queries are, and told apart by what its adversary sees.

    Its tables hold one robust accuracy: budgets are there to end attacks, and bound nothing.
    """

    name: str = "white-box"
    accesses: frozenset[Access] = frozenset({"gradients"})
    beside: frozenset[Access] = frozenset({"scores", "labels"})
    informed: bool = False  # gradients pass by what a defense does to scores
    reading: str = (
        "The share of images that stand against every attack, by gradients or by queries. High is good for the defense."
    )

    def columns(self, budgets: Sequence[int]) -> dict[str, Measure]:
        return {"robust": _robust}

    def title(self, cell: Cell) -> str:
        return f"{super().title(cell)} · white-box"

    def summary(self, row: Row) -> str:
        row = taken(row)
        return f"clean {clean(row)} %, robust {standing(row, query_budget(row))} %"

    def notes(self, lines: Sequence[Line]) -> list[str]:
        return [ROBUST, *([TIERS] if has_ranks(lines) else [])] if lines else []


def _robust(row: Row, again: bool, pooled: bool) -> Share:
    return (lasting if again else standing)(row, query_budget(row))
