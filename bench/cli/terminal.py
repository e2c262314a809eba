"""Where people read: a console on which texts of others stay text, and streams that can say everything."""

import codecs
import errno
import io
import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from bench.report.escape import in_terminal

ASCII = {
    "†": "+", "…": "...", "✗": "x", "⊂": "c", "∘": "o", "∩": "n", "↔": "<->", "∥": "//", "‡": "++", "⇄": "<=>",
    "·": "-", "−": "-", "–": "-", "—": "-", "±": "+-", "×": "x", "→": "->", "≤": "<=", "≥": ">=", "≠": "!=", "Δ": "d",
    "█": "#", "│": "|", "─": "-", "⊣": "-|", "≈": "~=", "✓": "v", "◦": "o", "÷": "-:-", "◷": "(t)", "∌": "!>",
    "⇥": "->|",
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


def is_of_output(error: OSError) -> bool:
    """Whether ``error`` came of printing: a stream has no file name."""
    return error.filename is None and error.errno in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF)


def abandon_output() -> None:
    """Let what is not printed yet go nowhere, so that the end of the process does not fail over it again."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    return "".join(ASCII.get(char, ascii(char)[1:-1]) for char in characters), error.end
