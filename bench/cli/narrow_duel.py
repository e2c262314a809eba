"""Two defenses beside each other in a terminal that is narrower than their table."""

from bench.cli.narrow_board import fitted, print_frame, short_names, told_names
from bench.cli.terminal import Terminal
from bench.report.compare import Duel
from bench.report.compare_table import lines_of, notes_of, setting_of


def print_narrow_duel(duel: Duel, console: Terminal) -> None:
    """Print all that Markdown says of ``duel``, in short names, and without the columns for which there is no room."""
    lines, short = lines_of(duel), short_names(line.attack for line in duel.lines)
    frame = fitted(lines, lines, short, console.width)
    console.print(f"A = {duel.a}, B = {duel.b}", style="bold")
    console.print(setting_of(duel))
    print_frame(frame, console)
    console.print()
    for line in (*told_names([frame], short), *notes_of(duel)):
        console.print(line)
    console.print()
