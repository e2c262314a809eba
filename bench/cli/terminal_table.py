"""Tables on a terminal whose lines break between words, never inside one while there is room."""

from collections.abc import Collection, Sequence
from itertools import zip_longest

from rich.cells import cell_len
from rich.table import Table

from bench.report.escape import in_terminal

BETWEEN = 2  # blanks after each column but the last
# Columns whose cells stay in one line where there is room.
SHORT = ("norms", "samples", "queries ≤", "training ≈", "time ≤")
NUMBERS = SHORT[1:]


def columns(
    names: Sequence[str],
    lines: Sequence[Sequence[str]],
    room: int,
    title: str | None = None,
    numbers: Collection[str] = NUMBERS,
) -> Table:
    """The ``lines`` as a table for a terminal of ``room`` characters."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    widths = _widths(names, lines, room) or ()
    for name, width in zip_longest(names, widths):
        table.add_column(name, width=width, overflow="fold", justify="right" if name in numbers else "left")
    for line in lines:
        table.add_row(*line)
    return table


def fit(names: Sequence[str], lines: Sequence[Sequence[str]], room: int) -> bool:
    """Whether ``room`` characters are enough for the table without a break inside a word."""
    return _widths(names, lines, room) is not None


def _widths(
    names: Sequence[str], lines: Sequence[Sequence[str]], room: int, short: Collection[str] = SHORT
) -> list[int] | None:
    """The width of each column: its longest word, and a share of what is left for those that lack more."""
    cells = [[in_terminal(line[place]) for line in (names, *lines)] for place in range(len(names))]
    whole = [max(map(cell_len, texts)) for texts in cells]
    words = [max(cell_len(word) for text in texts for word in text.split() or [""]) for texts in cells]
    widths = [full if name in short else word for name, full, word in zip(names, whole, words, strict=True)]
    lack = [full - width for full, width in zip(whole, widths, strict=True)]
    spare = room - sum(widths) - BETWEEN * (len(names) - 1)
    if spare < 0:
        return _widths(names, lines, room, ()) if short else None
    for count, place in enumerate(sorted(range(len(names)), key=lack.__getitem__)):
        given = min(lack[place], spare // (len(names) - count))
        widths[place] += given
        spare -= given
    return widths
