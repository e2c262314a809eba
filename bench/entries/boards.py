"""Results apart by the board that they stand on, so that nothing of one changes a figure or a rank of another.

A row carries no board. A board is the folder that holds its rows, as ``bench run --out BOARD`` writes them,
``BOARD/DATA-MODEL/DEFENSE/ATTACK-KEY``, and is called as that folder. An entry stands on the board that it answers,
wherever it lies: with the rows of the folder that is called so, and with the other entries that answer it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bench.entries.standing import Known, check_boards, entries_in, marked
from bench.errors import StoreError
from bench.report.standings import Table, tables
from bench.results.store import Row, cell_folders, links_in, rows_in
from bench.tracks import TRACKS, track_of

DEPTH = 3  # a cell's folder below its board


class OnBoard(NamedTuple):
    """What stands on one board."""

    name: str
    rows: list[Row]
    entries: list[Known]


def boards_in(folders: Iterable[Path]) -> tuple[list[OnBoard], list[StoreError]]:
    """The boards in ``folders`` and below, track by track and by name, and what is wrong with what cannot be read.

    Raises:
        StoreError: there is no such folder.
        ConfigError: two entries answer different versions of one board.
    """
    entries: dict[Path, Known] = {}
    cells: dict[Path, tuple[Path, Path]] = {}  # by its real path, a cell's folder as it was named, and what it lies in
    damaged: list[StoreError] = []
    for folder in folders:
        real = folder.resolve()
        known, unread = entries_in(folder)
        entries |= {real / path.relative_to(folder): each for path, each in known}
        damaged += [*unread, *links_in(folder)]
        for path in cell_folders(folder):
            cells.setdefault(real / path.relative_to(folder), (path, real))
    check_boards(entries.values())
    homes = {cell: _home(cell, within, entries) for cell, (_, within) in cells.items()}
    names = _names({home for home in homes.values() if isinstance(home, Path)})
    members: dict[str, list[Path]] = {known.entry.suite: [] for known in entries.values()}
    for cell, home in homes.items():
        members.setdefault(names[home] if isinstance(home, Path) else home, []).append(cells[cell][0])
    found = []
    for name, paths in sorted(members.items()):
        rows, broken = rows_in(paths)
        damaged += broken
        found.append(OnBoard(name, rows, [known for known in entries.values() if known.entry.suite == name]))
    return sorted(found, key=_track), damaged


def standings(boards: Sequence[OnBoard], budgets: Sequence[int] = (), all_versions: bool = False) -> list[Table]:
    """The tables of each board by itself, of :func:`bench.report.standings.tables`, with the marks of its entries.

    Where there are several boards, the title of a table begins with the name of its board.
    """
    found = []
    for board in boards:
        entered = frozenset(code for known in board.entries for code in known.codes)
        own = marked(tables(board.rows, budgets, all_versions, entered), board.entries)
        if len(boards) > 1:
            own = [replace(table, title=f"{board.name} · {table.title}", board=board.name) for table in own]
        found += own
    return found


def _home(cell: Path, within: Path, entries: Mapping[Path, Known]) -> Path | str:
    """The folder of the board of a cell, not above ``within``, or the name of the board that its entry answers."""
    above = [cell, *cell.parents]
    if entry := next((entries[place] for place in above if place in entries), None):
        return entry.entry.suite
    return max(above[min(DEPTH, len(above) - 1)], within, key=lambda place: len(place.parts))


def _names(folders: Iterable[Path]) -> dict[Path, str]:
    """What each folder is called: its name, after as much of its path as tells it from the others."""
    ends = {folder: ["/".join(folder.parts[-k:]) for k in range(1, len(folder.parts) + 1)] for folder in folders}
    taken = Counter(end for each in ends.values() for end in each)
    return {folder: next((end for end in each if taken[end] == 1), str(folder)) for folder, each in ends.items()}


def _track(board: OnBoard) -> int:
    """Where the first of its tracks stands among all."""
    return min((TRACKS.index(track_of(row.cell)) for row in board.rows), default=len(TRACKS))
