"""Stored rows as standings: who stands after how many queries, under each attack and the worst of them, and ranks."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.report.flags import Flag, flags
from bench.report.line import Line, ordered, seed_label
from bench.report.settings import by_setting, place
from bench.report.versions import Code, by_version, versioned
from bench.results.store import Row
from bench.tracks import track_of


@dataclass(frozen=True)
class Table:
    """Lines that compare with each other: one data set, model and threat."""

    title: str
    lines: list[Line]
    origin: str = ""  # hardware, version and commit that the rows come from
    flags: list[Flag] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what the reader of this table must know
    rows: list[Row] = field(default_factory=list)  # that its ranked lines are of: the newest version of each component
    track: str = ""  # its name
    whole: list[Line] = field(default_factory=list)  # all its lines, where ``lines`` are a selection
    board: str = ""  # its name, where tables of several boards are shown together; then the title begins with it
    words: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict)  # of who entered each defense


def tables(
    rows: Iterable[Row],
    budgets: Sequence[int] = (),
    all_versions: bool = False,
    entered: Collection[Code] = frozenset(),
) -> list[Table]:
    """One table for each model under each threat, one for the learners on each data set.

    Args:
        rows: what :meth:`bench.results.store.Store.rows` read.
        budgets: query budgets to show; those that the rows have run with are always there.
        all_versions: show the rows of older versions of a component, too; they are never ranked.
        entered: users' defenses each of which somebody has entered; they outdate nothing of the same name.
    """
    newest, older = by_version(rows, entered)
    shown = by_setting([*newest, *older] if all_versions else newest)
    outdated = {id(row) for row in older}
    left_out = {} if all_versions else _by_place(older)
    result = []
    for title, members in shown.items():
        current = [row for row in members if id(row) not in outdated]
        track = track_of(members[0].cell)
        lines = track.lines(current, budgets) if current else []
        lines += [_older_line(row, budgets) for row in ordered(members) if id(row) in outdated]
        note = _left_out(left_out.get(place(members[0]), []))
        notes = [*track.notes(lines), *([note] if note else [])]
        result.append(Table(title, lines, _origin(members), flags(current, newest), notes, current, track.name))
    return result


def _older_line(row: Row, budgets: Sequence[int]) -> Line:
    """The line of a row of an older version, which says of each component which version it was."""
    chain = " + ".join(map(versioned, row.cell.defense)) or "none"
    line = track_of(row.cell).line(row, budgets)
    attack = versioned(row.cell.attack) + seed_label(row)
    return replace(line, defense=chain, attack=attack, marks=line.marks | {"older"})


def _by_place(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    result: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        result.setdefault(place(row), []).append(row)
    return result


def _left_out(older: Sequence[Row]) -> str:
    if not older:
        return ""
    return f"Left out: rows of older versions of a component ({len(older)}); --all-versions shows them"


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
