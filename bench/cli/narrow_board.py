"""Tables of a board in a terminal that is narrower than they are, and what was left out of them.

Each makes room in this order: names are cut to ``aaa-linear…[2]`` with a legend, intervals go, columns go, those that
the fewest lines fill first. Only what is shown changes: the figures are those of the wide table.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.text import Text

from bench.cli.terminal import Terminal
from bench.cli.terminal_table import BETWEEN
from bench.cli.terminal_table import columns as terminal_table
from bench.report.escape import Lines, columns, in_terminal
from bench.report.leaderboard import FAILED, FLAGS, failures, frames, signs_told
from bench.report.standings import Table

LONGEST = 18  # characters of a name that stays whole, and of a short one without its number
NAMES = ("defense", "attack", "under")
ALWAYS = (
    *NAMES, "rank", "clean", "final", "test", "robust", "n",
    "at", "A", "B", "A − B", "p Holm",  # of two defenses beside each other
)  # columns that stay


class Frame(NamedTuple):
    """One table as it is shown, the columns that had no room, and whether its intervals had none."""

    lines: Lines
    dropped: list[str]
    bare: bool


def fits(markdown: str, room: int) -> bool:
    """Whether no line of a table in ``markdown`` is wider than ``room`` characters."""
    return all(cell_len(line) <= room for line in markdown.splitlines() if line.startswith("|"))


def print_narrow(table: Table, console: Terminal) -> None:
    """Print all that Markdown says of ``table``, as far as there is room for it."""
    short = short_names([*(line.defense for line in table.lines), *(line.attack for line in table.lines)])
    wide, bare = frames(table), frames(table, intervals=False)
    shown = [fitted(a, b, short, console.width) for (_, a), (_, b) in zip(wide, bare, strict=True)]
    console.print(table.title, style="bold")
    print_frame(shown[0], console)
    console.print()
    notes = *_no_intervals(shown, table), *signs_told(table), *table.notes, table.origin
    for line in (*told_names(shown, short), *notes):
        console.print(line)
    flags = [f"{flag.defense}: {flag.flag}. {flag.evidence}." for flag in table.flags]
    for title, told in ((FLAGS, flags), (FAILED, failures(table))):
        for line in ("", title, *(f"- {each}" for each in told)) if told else ():
            console.print(line)
    for frame, (title, _) in list(zip(shown, bare if shown[0].bare else wide, strict=True))[1:]:
        console.print()
        console.print(title)
        print_frame(frame, console)
    console.print()


def short_names(labels: Iterable[str]) -> dict[str, str]:
    """Labels that are long or have arguments, each with a short form that ends in a number of its own."""
    long = [label for label in dict.fromkeys(labels) if "(" in label or cell_len(label) > LONGEST]
    bare = [in_terminal(_without_arguments(label))[:LONGEST] for label in long]
    return {label: f"{name}…[{number}]" for number, (label, name) in enumerate(zip(long, bare, strict=True), 1)}


def _without_arguments(label: str) -> str:
    kept, depth = "", 0
    for char in label:
        depth += char == "("
        kept += "" if depth else char
        depth -= char == ")" and depth > 0
    return kept


def fitted(whole: Lines, bare: Lines, short: Mapping[str, str], room: int) -> Frame:
    """The first way to show a table for which there is room: ``whole``, then in short names, then ``bare``."""
    numbers = {label: name[name.rindex("[") :] for label, name in short.items()}
    for lines in (whole, _renamed(whole, short, short)):
        if _width(_widths(lines)) <= room:
            return Frame(lines, [], False)
    lines = _renamed(bare, short, numbers)
    widths, dropped = _widths(lines), []
    for name in _least(lines):
        if _width(widths) > room:
            del widths[name]
            dropped.append(name)
    shown = [{name: text for name, text in line.items() if name in widths} for line in lines]
    return Frame(shown, [name for name in columns(lines) if name in dropped], bare != whole)


def _least(lines: Lines) -> list[str]:
    """The columns that may go, those that the fewest lines fill first, of several the last one."""
    names = columns(lines)
    ends = [*ALWAYS, *[name for name in names if name.startswith("@")][-1:], *names[:1]]
    filled = [(sum(bool(line.get(name)) for line in lines), -place, name)
              for place, name in enumerate(names) if name not in ends]  # fmt: skip
    return [name for *_, name in sorted(filled)]


def _renamed(lines: Lines, cells: Mapping[str, str], heads: Mapping[str, str]) -> Lines:
    return [
        {_short(name, heads): _short(text, cells) if name in NAMES else text for name, text in line.items()}
        for line in lines
    ]


def _short(text: str, names: Mapping[str, str]) -> str:
    """``text`` with the name that it is, or that stands before its last word, which are signs or a budget, cut."""
    before, blank, last = text.rpartition(" ")
    return names[text] if text in names else f"{names.get(before, before)}{blank}{last}"


def _widths(lines: Lines) -> dict[str, int]:
    """The widest cell of each column."""
    texts = {name: {name, *(line.get(name, "") for line in lines)} for name in columns(lines)}
    return {name: max(cell_len(in_terminal(text)) for text in cells) for name, cells in texts.items()}


def _width(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + BETWEEN * (len(widths) - 1)


def print_frame(frame: Frame, console: Terminal) -> None:
    """The table, with an empty line before each defense that has several lines, or before each rank if none has."""
    names = columns(frame.lines)
    several = any(line.get("defense") == "" for line in frame.lines)  # under one name, which is said once
    cells: list[list[str]] = []
    for before, line in zip([None, *frame.lines], frame.lines, strict=False):
        if before and (line.get("defense") if several else line.get("rank") != before.get("rank")):
            cells.append([""] * len(names))
        cells.append([line.get(name, "") for name in names])
    console.print()
    widths = _widths(frame.lines)
    if _width(widths) > console.width:
        numbers = [name for name in names if name not in NAMES]
        console.print(terminal_table(names, cells, console.width, numbers=numbers))
    else:  # nothing has to break, and rich takes seconds for thousands of lines
        head, *others = [_padded(line, widths) for line in (names, *cells)]
        console.print(Text(head, style="bold"), soft_wrap=True)
        console.print(Text("\n".join(others)), soft_wrap=True)
    if frame.dropped:
        console.print(f"No room for {', '.join(frame.dropped)}; --wide shows all columns.")


def _padded(cells: Sequence[str], widths: Mapping[str, int]) -> str:
    """The cells in their columns, names to the left and numbers to the right."""
    parts = []
    for text, (name, width) in zip(map(in_terminal, cells), widths.items(), strict=True):
        blank = " " * (width - cell_len(text))
        parts.append(text + blank if name in NAMES else blank + text)
    return (" " * BETWEEN).join(parts)


def told_names(shown: Sequence[Frame], short: Mapping[str, str]) -> list[str]:
    """What the numbers in these tables stand for."""
    texts = {text for frame in shown for line in frame.lines for pair in line.items() for text in pair}
    numbers = {label: name[name.rindex("[") :] for label, name in short.items()}
    return [f"{number} = {label}" for label, number in numbers.items() if any(number in text for text in texts)]


def _no_intervals(shown: Sequence[Frame], table: Table) -> list[str]:
    """How wide the intervals are that had no room."""
    shares = [share for line in table.lines for share in (*line.shares.values(), *line.lasting.values()) if share.n]
    if not shares or not any(frame.bare for frame in shown):
        return []
    far = max(abs(end - share.value) for share in shares for end in share.interval)
    return [f"No room for 95 % intervals, which reach up to {100 * far:.1f} points to either side; --wide shows them."]
