"""What a reader of a figure must know, as signs in a table: what bars a row from ranking, and what colours it."""

from collections.abc import Collection
from dataclasses import dataclass

from bench.precision import COARSE
from bench.report.outcomes import column, is_control, query_budget, seen
from bench.results.store import Row


@dataclass(frozen=True)
class Mark:
    """A ``sign`` in a table, the ``name`` that programs read, and the ``sentence`` of the legend."""

    sign: str
    name: str
    sentence: str
    bars: bool = False     # whether a row that has it is never ranked
    partial: bool = False  # whether the figure itself is not whole, so that the sign stands wherever the figure does
    pooled: bool = True    # whether the worst case of several attacks has it where one of them does

    def __str__(self) -> str:
        return f"{self.sign} {self.sentence}" + ("; never ranked" if self.bars else "")


MARKS = (  # in the order in which they stand
    Mark("†", "limited", "run with --limit on fewer samples than its suite asks for", bars=True, partial=True),
    Mark("…", "incomplete", "not all samples have run yet", bars=True, partial=True),
    Mark(
        "÷",
        "worst-only",
        "run only on the samples that other attacks had left, so it has no accuracy of its own",
        bars=True,
        pooled=False,
    ),
    Mark(
        "⇥",
        "sequence",
        "run by --until, which stops when a figure is decided, here after n of its samples: the brackets are a 95 % "
        "confidence sequence, which holds whenever that is, and ranks come of such a test on common samples",
        partial=True,
    ),
    Mark("✗", "failed", "failed; run again, or read the traceback in its .failed.json", bars=True, partial=True),
    Mark("!", "invalid", "the model answered NaN or infinity", bars=True, partial=True),
    Mark("⊣", "curtailed", "fewer queries than the attack asks for, so that parts of it were never run", bars=True),
    Mark("⊂", "spared", "not met by every attack that the undefended model has met", bars=True),
    Mark("<", "short", "fewer queries, samples or seeds than the undefended model has met", bars=True),
    Mark(
        "∌",
        "untried",
        "not met by an attack that knows it, which it names itself (knows), with enough queries and samples",
        bars=True,
    ),
    Mark("∘", "older", "made with an older version of a component", bars=True),
    Mark(
        "∩", "cut", "ranked by the queries, samples and seeds that all have in common; its own figures are of more"
    ),
    Mark(
        "↔",
        "rescaled",
        "schedule rescaled to the largest budget, so smaller budgets are not what a run at them gives",
        pooled=False,
    ),
    Mark(
        "∥",
        "batch-dependent",
        "samples not independent of their batch: a foreign attack, or a defense that mixes rows",
        pooled=False,
    ),
    Mark(
        "‡",
        "stateful",
        "the defense remembers earlier queries, so figures depend on their order and on resuming",
    ),
    Mark(
        "≈",
        "unconfirmed",
        "searched in bf16, and no hit was confirmed in float32, where what is left lies between this and final",
    ),
    Mark(
        "⇄",
        "control",
        "made on the undefended network, which no attacker of a service has: not in the worst case",
        pooled=False,
    ),
    Mark(
        "◷",
        "service",
        "a service, measured at the time of the run: it may answer otherwise today, its weights are not seen, and what "
        "needs them (gradients, the undefended network, transfer from it) is blank",
    ),
    Mark("✓", "verified", "entered, and a part of it run again by somebody else"),
    Mark("◦", "self-reported", "entered, and nobody but its authors has run it"),
    Mark(
        "~",
        "random",
        "random defense: @ counts the first success of a query, or of the mean that an averaging attack asks for, "
        "lucky or not; final, the majority of 16 repeats, flatters the defense where it was lucky",
    ),
)
UNRANKED = frozenset(mark.name for mark in MARKS if mark.bars)
PARTIAL = frozenset(mark.name for mark in MARKS if mark.partial)
APART = PARTIAL | {"control"}  # of shares that may be below the worst case beside them
POOLED = frozenset(mark.name for mark in MARKS if mark.pooled)


def marks_of(row: Row) -> frozenset[str]:
    """What a reader of the figures of ``row`` must know, as names in :data:`MARKS`."""
    found = {
        "limited": row.cell.limited,
        "incomplete": not row.complete and not row.partial and not row.stopped,
        "worst-only": bool(row.partial) and not row.stopped,
        "sequence": row.sequential,
        "failed": bool(row.errors),
        "invalid": bool(column(seen(row), "invalid").any()),
        "curtailed": query_budget(row) < row.cell.attack.asks,
        "unconfirmed": any(_unconfirmed(shard.provenance.get("numerics")) for shard in row.shards),
        "control": is_control(row),
    }
    traits = [trait for component in (row.cell.model, row.cell.attack, *row.cell.defense) for trait in component.traits]
    return frozenset([name for name, present in found.items() if present] + traits)


def _unconfirmed(numbers: object) -> bool:
    """Whether a search in these numbers, as a row remembers them, ended at hits that nobody looked at again."""
    return isinstance(numbers, dict) and str(numbers.get("used")).startswith(COARSE) and "hits" not in numbers


def signs(names: Collection[str]) -> str:
    """The signs of these marks, as they stand behind an attack."""
    return "".join(mark.sign for mark in MARKS if mark.name in names)


def legend(names: Collection[str]) -> list[str]:
    """A line for each of these marks that says what its sign means."""
    return [str(mark) for mark in MARKS if mark.name in names]
