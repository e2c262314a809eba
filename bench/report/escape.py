"""Text of others on its way out: names, evidence and errors, which may be anything, made harmless for each format."""

import json
import re
from collections.abc import Callable
from typing import Any, Literal

import pandas as pd

Tidy = Literal["csv", "json"]

_CONSTRUCTS = re.compile(
    r"""[`*|$]                                    # code, emphasis, cells, mathematics
    | \\(?=[!-/:-@[-`{-~])                        # an escape
    | <(?=[a-zA-Z/!?])                            # HTML, or a link
    | (?<=\])[(]                                  # the second half of a link or an image
    | (?<![^\W_])_ | _(?![^\W_])                  # emphasis; inside a word it is none
    | ~(?=~)                                      # strikethrough
    """,
    re.VERBOSE,
)
_LINKS = re.compile(r"(?<=http):(?=//)|(?<=https):(?=//)|(?<=ftp):(?=//)|(?<=www)\.|(?<=\S)@(?=\S)|&(?=#?\w+;)", re.I)
_FORMULA = re.compile(r"\s*([=+\-＝＋－＠]|@(?!\d+$))")  # @60, a budget, is none
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "†": r"$\dagger$", "‡": r"$\ddagger$",
    "✗": r"$\times$", "…": r"$\ldots$", "⊂": r"$\subset$", "∘": r"$\circ$", "∩": r"$\cap$", "±": r"$\pm$",
    "≤": r"$\leq$", "“": "``", "”": "''", "⇄": r"$\rightleftarrows$", "↔": r"$\leftrightarrow$", "∥": r"$\parallel$",
    "◷": r"$\odot$", "·": r"$\cdot$", "<": "$<$", ">": "$>$", "|": "$|$", "÷": r"$\div$",
    "Δ": r"$\Delta$", "→": r"$\to$", "⊣": r"$\dashv$", "≈": r"$\approx$", "✓": r"$\surd$", "◦": r"$\circ$",
}  # fmt: skip


def in_terminal(text: str) -> str:
    """``text`` as one line that moves no cursor and turns no direction: what cannot be printed stands as its escape."""
    return "".join(char if char.isprintable() else " " if char.isspace() else ascii(char)[1:-1] for char in text)


def in_markdown(text: str) -> str:
    """``text`` as Markdown that shows it in one line and makes nothing of it: no cell, markup, link, image or HTML."""
    return re.sub(r"^(\d*)([#+=>-]|(?<=\d)[.)](?=\s))", r"\1\\\2", _in_cell(text))  # no heading, list or quotation


def in_latex(text: str) -> str:
    """``text`` as LaTeX that prints it, in a caption or as a cell: no command, no end of a paragraph or of a line."""
    escaped = "".join(_LATEX.get(char, char) for char in _flat(text))
    # After the end of a line, a star or a bracket would be an argument of it.
    return f"{{{escaped[0]}}}{escaped[1:]}" if escaped[:1] in ("[", "*") else escaped


def in_csv(text: str) -> str:
    """``text`` as a cell in which no spreadsheet sees a formula."""
    return "'" + in_terminal(text) if _FORMULA.match(text) else in_terminal(text)


def text_frame(lines: list[dict[str, str]]) -> pd.DataFrame:
    """Lines of text, which may be any; a missing value is an empty cell."""
    return pd.DataFrame(lines, dtype=object).fillna("")  # Arrow's strings, the default, hold UTF-8 alone


def markdown_table(lines: pd.DataFrame) -> str:
    """Lines of text as a Markdown table for people."""
    frame = _each(lines, _in_cell)
    return str(frame.to_markdown(index=False, disable_numparse=True))


def latex_table(lines: pd.DataFrame, caption: str) -> str:
    """Lines of text as a floating LaTeX table (booktabs)."""
    frame = _each(lines, in_latex)
    return str(frame.to_latex(index=False, escape=False, caption=in_latex(caption), position="ht"))


def tidy(records: list[dict[str, Any]], style: Tidy) -> str:
    """Records for programs, who meet numbers as numbers and columns under our own names for them."""
    if style == "json":
        return json.dumps(records, indent=1)
    escaped = [
        {name: in_csv(value) if isinstance(value, str) else value for name, value in record.items()}
        for record in records
    ]
    return str(pd.DataFrame(escaped).to_csv(index=False))


def _each(lines: pd.DataFrame, escape: Callable[[str], str]) -> pd.DataFrame:
    """``lines`` with every text escaped; the names of columns may be texts of others, too."""
    escaped = lines.map(lambda text: escape(str(text)))
    return escaped.set_axis([escape(str(name)) for name in lines.columns], axis=1)


def _in_cell(text: str) -> str:
    """Markdown inside a line, where no block can begin."""
    marked = _CONSTRUCTS.sub(r"\\\g<0>", _flat(text))
    return _LINKS.sub(lambda found: f"&#{ord(found[0])};", marked)


def _flat(text: str) -> str:
    return in_terminal(text).strip()
