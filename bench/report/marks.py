"""What a reader of a figure must know, as signs in a table: what bars a row from ranking, and what colours it."""

from bench.report.outcomes import column, is_control
from bench.results.store import Row

MARKS = {
    "limited": ("†", "run with --limit on fewer samples than its suite asks for; never ranked"),
    "incomplete": ("…", "not all samples have run yet; never ranked"),
    "failed": ("✗", "failed; run again, or read the traceback in its .failed.json; never ranked"),
    "invalid": ("!", "the model answered NaN or infinity; never ranked"),
    "spared": ("⊂", "not met by every attack that the undefended model has met; never ranked"),
    "short": ("<", "fewer queries, samples or seeds than the undefended model has met; never ranked"),
    "older": ("∘", "made with an older version of a component; never ranked"),
    "cut": ("∩", "ranked by the queries, samples and seeds that all have in common; its own figures are of more"),
    "rescaled": ("↔", "schedule rescaled to the largest budget, so smaller budgets are not what a run at them gives"),
    "batch-dependent": ("∥", "samples not independent of their batch: a foreign attack, or a defense that mixes rows"),
    "stateful": ("‡", "the defense remembers earlier queries, so figures depend on their order and on resuming"),
    "control": ("⇄", "made on the undefended network, which no attacker of a service has: not in the worst case"),
    "random": (
        "~",
        "random defense: @ counts the first success of a query, or of the mean that an averaging attack asks for, "
        "lucky or not; final, the majority of 16 repeats, flatters the defense where it was lucky",
    ),
}
UNRANKED = {"limited", "incomplete", "failed", "invalid", "spared", "short", "older"}


def marks_of(row: Row) -> frozenset[str]:
    """What a reader of the figures of ``row`` must know, as names in :data:`MARKS`."""
    found = {
        "limited": row.cell.limited,
        "incomplete": not row.complete,
        "failed": bool(row.errors),
        "invalid": bool(column(row, "invalid").any()),
        "control": is_control(row) and row.cell.defense_name != "none",
    }
    traits = [trait for component in (row.cell.attack, *row.cell.defense) for trait in component.traits]
    return frozenset([name for name, present in found.items() if present] + traits)
