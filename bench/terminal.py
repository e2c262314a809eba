"""Where people read: a console on which texts of others stay text, and streams that can say everything."""

import codecs
import io
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from bench.text import in_terminal

ASCII = {
    "…": "...", "×": "x", "✗": "x", "†": "+", "‡": "++", "⊂": "c", "↔": "<->", "⇄": "<=>", "∥": "//", "·": "-",
    "−": "-", "→": "->", "≤": "<=", "≥": ">=", "≠": "!=", "Δ": "d", "–": "-", "—": "-", "█": "#", "│": "|", "─": "-",
}  # fmt: skip


class Terminal(Console):
    """Prints what it is given: nothing in a text is markup, moves the cursor or turns the direction of reading."""

    def __init__(self, **options: Any) -> None:
        # What users write may look like markup or, as in "file.py:x:", like an emoji.
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed, in a table or by itself, comes by here."""
        return super().render_str(in_terminal(text), **options)


def speak_plainly() -> None:
    """Let standard output and errors say what their encoding cannot: our signs in ASCII, the rest as escapes."""
    codecs.register_error("ascii-signs", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or a notebook has put something else
            stream.reconfigure(errors="ascii-signs")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    return "".join(ASCII.get(char, ascii(char)[1:-1]) for char in characters), error.end
