"""What a run shows while it runs: one line for each finished cell, and a bar with rate and time left."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.progress import Task as Bar
from rich.text import Text

from bench.report.escape import in_terminal
from bench.report.leaderboard import summary
from bench.results.store import Row

if TYPE_CHECKING:
    from bench.plan.cell import Cell
    from bench.plan.tasks import Task
    from bench.run.units import Unit


def _called(cell: "Cell") -> str:
    return f"{cell.defense_name} × {cell.attack.spec}"


def _traits(cell: "Cell") -> list[str]:
    queries = f"{cell.threat.query_budget:,} queries" if cell.threat.query_budget else "no queries"
    return [cell.dataset.spec, cell.model.spec, str(cell.threat), queries, f"seed {cell.seed}", cell.numerics]


class Screen:
    """A :class:`bench.run.runner.Reporter` on the terminal; where there is none, only the lines of finished cells."""

    def __init__(self, console: Console, cells: "Iterable[Cell]") -> None:
        self.console, cells = console, list(cells)
        self.cells = len(cells)
        self._traits: dict[str, list[list[str]]] = {}  # of the cells that are called alike
        for cell in cells:
            self._traits.setdefault(_called(cell), []).append(_traits(cell))
        self._places: dict[str, int] = {}  # of cells, in the order in which they were started first
        self._progress = _progress(console)
        self._total: TaskID | None = None
        self._bars: dict[Unit, TaskID] = {}
        self._last: dict[Unit, tuple[int, int, str]] = {}
        self._waiting = False

    def __enter__(self) -> "Screen":
        self.console.file = self.console.file  # what components print may be sent elsewhere; this goes on here
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self.console._file = None  # whatever standard output is by then

    def plan(self, samples: int) -> None:
        if self._total is None:
            self._total = self._progress.add_task("all samples", total=samples, unit="samples")
        self._progress.update(self._total, total=samples)

    def start(self, task: "Task", unit: "Unit") -> None:
        label = f"{self._place(task)} {self._name(task.cell)}"
        which = f"{len(unit.chosen)} samples" if unit.chosen else f"samples {unit.start + 1} to {unit.stop}"
        what = "what it needs" if unit.makes else f"{which} of {len(task.cell.ids)}"
        self._bars[unit] = self._progress.add_task(in_terminal(f"{label}, {what}"), total=None)
        self._last[unit] = 0, 1, ""

    def work(self, unit: "Unit", done: int, total: int, what: str) -> None:
        last = self._last[unit]
        if (total, what) != last[1:] or done < last[0]:  # training gave way to querying
            self._progress.reset(self._bars[unit])
        self._last[unit] = done, total, what
        self._progress.update(self._bars[unit], completed=done, total=total, unit=what)

    def end(self, unit: "Unit", samples: int) -> None:
        if unit in self._bars:  # another run may have done it
            self._progress.remove_task(self._bars.pop(unit))
            del self._last[unit]
        if self._total is not None:
            self._progress.advance(self._total, samples)

    def finish(self, task: "Task", row: Row, seconds: float) -> None:
        style = "red" if row.errors else "default"
        told = f"{self._place(task)} {self._name(task.cell)}: {summary(row)}"
        line = Text(in_terminal(told), style=style)
        line.append(f"  ({duration(seconds)})", style="dim")
        self.console.print(line, soft_wrap=True)

    def wait(self, cells: int) -> None:
        if not self._waiting:
            self.console.print(f"waiting for {cells} of {self.cells} cells that other runs are at", style="dim")
        self._waiting = True

    def _name(self, cell: "Cell") -> str:
        """Its defense and its attack, and what tells it from others of the same two."""
        alike = zip(*self._traits.get(_called(cell), [_traits(cell)]), strict=True)
        telling = [own for own, of in zip(_traits(cell), alike, strict=True) if len(set(of)) > 1]
        return ", ".join([_called(cell), *telling])

    def _place(self, task: "Task") -> str:
        return f"[{self._places.setdefault(task.cell.key, len(self._places) + 1)}/{self.cells}]"


class Steps:
    """One bar, for the step at hand of a job with several; what is shown may come from any thread."""

    def __init__(self, console: Console) -> None:
        self._progress = _progress(console)
        self._bar = self._progress.add_task("", total=None)

    def __enter__(self) -> "Steps":
        if self._progress.console.is_terminal:  # elsewhere it would leave an empty line
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress.console.is_terminal:
            self._progress.stop()

    def step(self, label: str, total: int | None = None, unit: str = "") -> None:
        """Begin a step of ``total`` units."""
        self._progress.reset(self._bar, description=label, total=total, unit=unit)

    def advance(self, count: int = 1) -> None:
        """``count`` more units are done."""
        self._progress.advance(self._bar, count)

    def work(self, done: int, total: int) -> None:
        """``done`` of ``total`` units are."""
        self._progress.update(self._bar, completed=done, total=total)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"), _Pace(), console=console, transient=True, refresh_per_second=4,
    )  # fmt: skip


class _Pace(ProgressColumn):
    """``1,240 queries/s, 3 min left``."""

    def render(self, task: Bar) -> Text:
        speed, unit = task.speed, task.fields.get("unit", "")
        if not speed or not unit:
            return Text("")
        left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
        rate = f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"
        return Text(f"{rate} {unit}/s{left}", style="dim")


def duration(seconds: float) -> str:
    """A duration that one can say: ``0.8 s``, ``45 s``, ``12 min``, ``3.5 h``, ``12 days``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:,.0f} days"
