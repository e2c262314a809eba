"""Which rows compare at all: those of one data set, model, threat and precision."""

from collections.abc import Iterable, Sequence

from bench.plan.cell import Cell
from bench.results.store import Row
from bench.tracks import TRACKS, Track, track_of

HASH = 8  # digits of a hash that tell two settings apart


def place(row: Row) -> tuple[str, str]:
    """What the setting of a row is called, whatever versions, data and weights go by these names."""
    return _title(row.cell), row.cell.numerics


def by_setting(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the setting that they share, track by track, each under a title that no other setting has.

    In each the rows of its track come first, then those of others that its adversary could have run, too.
    """
    rows = list(rows)
    ordered = [members for track in TRACKS for members in _in_track(rows, track)]
    alike: dict[str, list[Cell]] = {}
    for members in ordered:
        alike.setdefault(_title(members[0].cell), []).append(members[0].cell)
    return {_apart(members[0].cell, alike[_title(members[0].cell)]): members for members in ordered}


def _in_track(rows: Sequence[Row], track: Track) -> list[list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for accesses in (track.accesses, track.beside):
        for row in rows:
            if row.cell.threat.access in accesses:
                key = track.title(row.cell), *_facts(row.cell, track).values()
                if accesses is track.accesses or key in groups:
                    groups.setdefault(key, []).append(row)
    return [groups[key] for key in sorted(groups)]


def _title(cell: Cell) -> str:
    return track_of(cell).title(cell)


def _facts(cell: Cell, track: Track) -> dict[str, str]:
    """What has to be equal in a table of ``track`` beside what a title says."""
    return {
        **track.facts(cell),
        "data": cell.data_hash,
        "weights": cell.weights_hash,
        "data version": str(cell.dataset.version),
        "model version": str(cell.model.version),
        "precision": cell.numerics,
    }


def _apart(cell: Cell, alike: list[Cell]) -> str:
    """The title of a cell, with what tells it from those that have the same."""
    track = track_of(cell)
    facts = _facts(cell, track)
    names = [name for name in facts if len({_facts(other, track)[name] for other in alike}) > 1]
    shown = {name: facts[name][:HASH] if name in ("data", "weights") else facts[name] for name in names}
    return _title(cell) + "".join(f" · {name} {value or 'none'}" for name, value in shown.items())
