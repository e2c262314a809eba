"""The columns of a board: what is shown at first, and what a reader can add."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from bench.report.figures import BY_NAME, placed
from bench.report.line import hardest
from bench.report.marks import signs
from bench.report.outcomes import Share
from bench.report.ranking import TIERS
from bench.site.boards import Board, Entry, Name

Kind = Literal["text", "number", "name", "share", "flags"]


@dataclass(frozen=True)
class Cell:
    """What stands in a table, and by what it is sorted; ``share`` is drawn as a bar with its interval."""

    text: str
    order: float | str
    share: Share | None = None


@dataclass(frozen=True)
class Column:
    """One column; ``wide`` is shown on wide screens alone, ``extra`` only when a reader asks for it."""

    head: str
    about: str
    kind: Kind
    cells: list[Cell]
    wide: bool = False
    extra: bool = False


def columns(board: Board) -> list[Column]:
    """All columns of a board, a cell for each of its entries."""
    entries, words = board.entries, board.track.words
    last = next((entry.head.left[0] for entry in entries if entry.head.left), "")
    at = f" {last}" if last.startswith(("@", "r=")) else ""
    found = [
        Column("rank", TIERS, "number",
               [_number(entry.head.rank) for entry in entries]),
        Column("defense", "", "name", [Cell(entry.label, entry.label) for entry in entries]),
        Column(f"{words.main}{at}", board.track.reading, "share", [_share(entry.left) for entry in entries]),
        _shares("clean", words.clean,
                [_clean(entry) for entry in entries], wide=True),
        Column(words.decisive, "by itself", "text",
               [Cell(Name.of(entry.decisive).short, entry.decisive) for entry in entries], wide=True),
        Column("flags", "red flags: each is a reason to look, none a verdict", "flags",
               [Cell(str(len(entry.flags) or ""), len(entry.flags)) for entry in entries], wide=True),
        Column("signs", "explained below the table", "text",
               [Cell(signs(entry.head.marks), signs(entry.head.marks)) for entry in entries], wide=True),
        Column("n", "images", "number", [_number(entry.head.n) for entry in entries], wide=True),
    ]  # fmt: skip
    return [column for column in found if any(cell.text for cell in column.cells)] + _extra(board)


def _extra(board: Board) -> list[Column]:
    entries = board.entries
    found = []
    heads = dict.fromkeys(name for entry in entries for name in entry.head.shares)
    for name in heads:
        if name not in ("clean", "test", "robust"):
            shares = [entry.head.shares.get(name) for entry in entries]
            found.append(_shares(name, board.track.words.main, [_value(share) for share in shares], extra=True))
    for figure in placed("certifier"):
        values = [entry.head.extra.get(figure.name) for entry in entries]
        if any(value is not None for value in values):
            texts = [Cell("" if value is None else figure.text(value), _order(value)) for value in values]
            found.append(Column(figure.label, figure.sentence, "number", texts))
    for figure in placed("defense"):
        values = [_least(entry, figure.name) for entry in entries]
        if any(value is not None for value in values):
            texts = [Cell("" if value is None else BY_NAME[figure.name].text(value), _order(value)) for value in values]
            found.append(Column(figure.label, figure.sentence, "number", texts, extra=True))
    for attack in sorted({line.attack for entry in entries for line in entry.single}):
        by_entry = [next((line.left[1] for line in entry.single if line.attack == attack and line.left), None)
                    for entry in entries]  # fmt: skip
        found.append(_shares(attack, "by itself", [_value(share) for share in by_entry], extra=True))
    return found


def _shares(head: str, about: str, values: Iterable[float | None], wide: bool = False, extra: bool = False) -> Column:
    cells = [Cell("" if value is None else f"{100 * value:.1f}", _order(value)) for value in values]
    return Column(head, about, "number", cells, wide, extra)


def _share(share: Share | None) -> Cell:
    value = _value(share)
    return Cell("" if value is None else f"{100 * value:.1f}", _order(value), share)


def _number(value: int | None) -> Cell:
    return Cell("–" if value is None else str(value), math.inf if value is None else value)


def _value(share: Share | None) -> float | None:
    return share.value if share is not None and share.n else None


def _order(value: float | None) -> float:
    return -1.0 if value is None else round(value, 6)


def _clean(entry: Entry) -> float | None:
    return _value(entry.head.shares["clean"]) if "clean" in entry.head.shares else entry.head.extra.get("clean")


def _least(entry: Entry, name: str) -> float | None:
    """A figure under the attack that left the least."""
    line = hardest(line for line in entry.single if name in line.figures)
    return line.figures[name] if line else None
