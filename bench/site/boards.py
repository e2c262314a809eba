"""What the site shows: a board for each table of the standings, an entry for each defense on it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from bench.errors import StoreError
from bench.plan.cell import Cell
from bench.report.curves import Training, trainings
from bench.report.figures import BY_NAME, placed
from bench.report.flags import Flag
from bench.report.line import Line, hardest
from bench.report.marks import UNRANKED
from bench.report.outcomes import Share
from bench.report.portrait import Portrait, portrait
from bench.report.standings import Table
from bench.results.shards import content_of
from bench.results.store import Row
from bench.system.files import slug
from bench.tracks import Track, track_of

RELEASED = "Images as their owner has them, as they are released, and the magnified difference"
ATTACKED = "Clean images, final examples of the strongest attack, and the magnified difference"
PNG, LARGEST_PICTURE = b"\x89PNG\r\n\x1a\n", 32 << 20  # how each begins, and bytes of the largest that is shown
Pictured = Callable[[Row], bytes | None]


@dataclass(frozen=True)
class Name:
    """A chain of components as people read it: their names, and their arguments in smaller letters."""

    short: str
    arguments: str

    @property
    def each(self) -> list[str]:
        """The arguments one by one."""
        return re.split(", | · ", self.arguments) if self.arguments else []

    @classmethod
    def of(cls, text: str, between: str = " + ") -> "Name":
        """The components of ``text``, which is ``a(b=c)`` or several such with ``between`` between them."""
        parts = [part.partition("(") for part in text.split(between)]
        ends = [re.sub(r"\)(?=[^)]*$)", "", rest, count=1) for _, _, rest in parts]
        return cls(between.join(head for head, _, _ in parts), " · ".join(filter(None, ends)))


def told_apart(names: Sequence[Name]) -> list[Name]:
    """The names with those arguments alone that tell them from others of the same components."""
    alike: dict[str, list[set[str]]] = {}
    for name in names:
        alike.setdefault(name.short, []).append(set(name.each))
    common = {short: set.intersection(*parts) for short, parts in alike.items()}
    return [Name(name.short, ", ".join(part for part in name.each if part not in common[name.short])) for name in names]


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows."""

    content: bytes
    about: str

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{sha256(self.content).hexdigest()[:16]}.png"


@dataclass(frozen=True)
class Entry:
    """One defense on one board."""

    label: str
    lines: list[Line]  # the worst case first
    rows: list[Row]
    flags: list[Flag]
    board: str  # the title of its board
    pictures: list[Picture]
    words: Sequence[Mapping[str, str]] = ()  # of those who entered it

    @property
    def id(self) -> str:
        """The name of its files."""
        return _file_name(self.label, f"{self.board}|{self.label}")

    @property
    def name(self) -> Name:
        return Name.of(self.label)

    @property
    def head(self) -> Line:
        return self.lines[0]

    @property
    def single(self) -> list[Line]:
        """The lines of one attack or learner each."""
        return self.lines[1:] or self.lines if track_of(self.rows[0].cell).heads else self.lines

    @property
    def hardest(self) -> str:
        """The attack after which its answers are shown."""
        line = hardest(self.single)
        return line.attack if line else ""

    @property
    def left(self) -> Share | None:
        """What is left in the worst case."""
        return self.head.left[1] if self.head.left else None

    @property
    def decisive(self) -> str:
        """The attack that leaves the least by itself; the learner that gets most. Nobody knows it of attacks that met
        only what others had left."""
        if any(line.of for line in self.single):
            return ""
        if not track_of(self.rows[0].cell).heads:
            return self.head.attack
        pools = track_of(self.rows[0].cell).pools
        known = [(line.left[1].value, line) for line in self.single if line.left and "control" not in line.marks]
        pick = min if pools else max
        return pick(known, key=lambda each: each[0])[1].attack if known else ""

    @property
    def scores(self) -> list[tuple[str, str, str, str]]:
        """What it does to its answers, under the attack that left the least: label, clean, attacked, explanation."""
        line = hardest(line for line in self.single if "ece" in line.figures)
        if line is None:
            return []
        found = []
        for figure in placed("defense"):
            parts = [BY_NAME[name] for name in (figure.name, figure.after) if name in line.figures]
            if parts:
                texts = [part.text(line.figures[part.name], line.row) for part in parts]
                found.append((figure.label, texts[0], texts[1] if len(texts) > 1 else "", figure.sentence))
        return found

    @cached_property
    def portrait(self) -> Portrait:
        return portrait(self.rows, self.lines)

    @property
    def trainings(self) -> list[Training]:
        return trainings(self.rows)

    @property
    def facts(self) -> dict[str, str]:
        """Where the figures come from."""
        cells, facts = [row.cell for row in self.rows], [shard.provenance for row in self.rows for shard in row.shards]
        torch = [fact.get("libraries", {}).get("torch") for fact in facts]
        told = {
            "data": _listed(f"{cell.dataset.label}, version {cell.dataset.version}" for cell in cells),
            "data hash": _listed(cell.data_hash for cell in cells),
            "model": _listed(f"{cell.model.label}, version {cell.model.version}" for cell in cells),
            "weights hash": _listed(cell.weights_hash for cell in cells),
            "defense": _listed(f"{part.label}, version {part.version}" for cell in cells for part in cell.defense),
            "parameters": _listed(
                f"{part.name}: {', '.join(f'{key}={value}' for key, value in part.params.items())}"
                for cell in cells for part in cell.defense if part.params
            ),
            "threat": _listed(str(cell.threat) for cell in cells),
            "precision": _listed(cell.numerics for cell in cells),
            "hardware": _listed(f"{fact.get('hardware', '')}, {fact.get('device', '')}" for fact in facts),
            "code": _listed(f"Parry {fact.get('parry', '')} at {str(fact.get('commit', ''))[:12]}" for fact in facts),
            "torch": _listed(map(str, filter(None, torch))),
            "finished": _listed(str(fact.get("finished", ""))[:10] for fact in facts),
        }  # fmt: skip
        return {name: text for name, text in told.items() if text}


@dataclass(frozen=True)
class Board:
    """One table: the standings in one setting."""

    table: Table
    entries: list[Entry]

    @property
    def track(self) -> Track:
        return track_of(self.table.rows[0].cell)

    @property
    def cell(self) -> Cell:
        """One that shows the setting."""
        return self.table.rows[0].cell

    @property
    def id(self) -> str:
        return _file_name(self.table.title, self.table.title)

    @property
    def pairs(self) -> bool:
        """Whether it has two entries to compare."""
        return len(self.entries) > 1

    @property
    def of(self) -> str:
        """The board that it is a table of, where the site shows several."""
        return self.table.board

    @property
    def name(self) -> Name:
        """The setting."""
        return Name.of(self.table.title.removeprefix(f"{self.of} · "), " · ")

    @cached_property
    def short_names(self) -> dict[str, Name]:
        """The entries by their labels, as :func:`told_apart`."""
        names = told_apart([entry.name for entry in self.entries])
        return dict(zip([entry.label for entry in self.entries], names, strict=True))

    @property
    def best(self) -> Entry | None:
        """The first that has a rank."""
        return next((entry for entry in self.entries if entry.head.rank is not None and entry.left), None)

    @cached_property
    def ranked(self) -> int:
        """How many entries have a rank."""
        return sum(entry.head.rank is not None for entry in self.entries)

    @cached_property
    def marks(self) -> frozenset[str]:
        return frozenset().union(*(line.marks for line in self.table.lines))

    @property
    def barred(self) -> frozenset[str]:
        """Why some are not ranked."""
        return self.marks & UNRANKED


def boards(tables: Sequence[Table], sheets: Iterable[Path] = (), pictured: Pictured = lambda row: None) -> list[Board]:
    """A board for each table that has rows, with what stands there of each defense, the best first.

    Args:
        tables: what :func:`bench.report.standings.tables` made.
        sheets: pictures of released data, as ``bench run`` writes them.
        pictured: a PNG of the final examples of a row, or of what was released for it, where there are any.
    """
    sheets = sorted(sheets)
    return [_board(table, sheets, pictured) for table in tables if table.rows]


def _board(table: Table, sheets: Sequence[Path], pictured: Pictured) -> Board:
    lines: dict[str, list[Line]] = {}
    rows: dict[str, list[Row]] = {}
    flags: dict[str, list[Flag]] = {}
    for line in table.lines:
        lines.setdefault(line.defense, []).append(line)
    for row in table.rows:
        rows.setdefault(row.cell.defense_label, []).append(row)
    for flag in table.flags:
        flags.setdefault(flag.defense, []).append(flag)
    entries = [
        Entry(label, lines[label], rows[label], flags.get(label, []), table.title,
              _pictures(rows[label], lines[label], sheets, pictured), table.words.get(label, ()))
        for label in lines if label in rows
    ]  # fmt: skip
    return Board(table, entries)


def _pictures(
    rows: Sequence[Row], lines: Sequence[Line], sheets: Sequence[Path], pictured: Pictured
) -> list[Picture]:
    """What the data defense of ``rows`` has released, or final examples of the attack that left the least of them."""
    stems = {slug(row.cell.dataset.spec, part.spec) for row in rows for part in row.cell.defense
             if part.stage == "data"}  # fmt: skip
    found = [content for path in sheets if path.stem[:-9] in stems and (content := _png(path))]
    about = RELEASED
    if not found:
        line = hardest(lines)
        content = pictured(line.row if line and line.row else rows[0])
        found = [content] if content else []
        about = ATTACKED if rows[0].cell.threat.asks else RELEASED
    return [Picture(content, about) for content in found]


def _png(path: Path) -> bytes | None:
    """The picture at ``path``; nothing of what is none, or lies elsewhere."""
    try:
        content = b"" if path.is_symlink() else content_of(path, LARGEST_PICTURE)
    except StoreError:
        return None
    return content if content.startswith(PNG) else None


def _file_name(text: str, whole: str) -> str:
    """A name that begins as ``text`` does, and that nothing else than ``whole`` has."""
    return f"{slug(text)[:48]}-{sha256(whole.encode(errors='replace')).hexdigest()[:8]}"


def _listed(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text.strip(", ")))


