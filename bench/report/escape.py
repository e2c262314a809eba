"""Text of others on its way out: names, evidence and errors, which may be anything, made harmless for each format."""

import csv
import io
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from tabulate import tabulate

Tidy = Literal["csv", "json"]
Format = Literal["md", "csv", "latex", "json"]  # of tables
Lines = Sequence[Mapping[str, str]]  # of a table: cells by the names of their columns; one that is missing is empty

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
    "≤": r"$\leq$", "≠": r"$\neq$", "“": "``", "”": "''",
    "⇄": r"$\rightleftarrows$", "↔": r"$\leftrightarrow$", "∥": r"$\parallel$",
    "◷": r"$\odot$", "·": r"$\cdot$", "<": "$<$", ">": "$>$", "|": "$|$", "÷": r"$\div$",
    "Δ": r"$\Delta$", "→": r"$\to$", "⊣": r"$\dashv$", "⇥": r"$\mapsto$",
    "≈": r"$\approx$", "✓": r"$\surd$", "−": r"$-$", "◦": r"$\circ$",
    "×": r"$\times$", "∌": r"$\not\ni$",
}  # fmt: skip


def in_terminal(text: str) -> str:
    """``text`` as one line that moves no cursor and turns no direction: what cannot be printed stands as its escape."""
    if text.isprintable():
        return text
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


def markdown_table(lines: Lines) -> str:
    """Lines of text as a Markdown table for people."""
    names = columns(lines)
    cells = [[_in_cell(line.get(name, "")) for name in names] for line in lines]
    return tabulate(cells, [*map(_in_cell, names)], tablefmt="pipe", disable_numparse=True) if names else ""


def latex_table(lines: Lines, caption: str, bold: Collection[tuple[int, str]] = ()) -> str:
    """Lines of text as a floating LaTeX table (booktabs); ``bold`` cells by their line, from 0, and column."""
    import pandas as pd  # which is slow to come, and which other tables need not

    names = columns(lines)
    cells = [
        [rf"\textbf{{{text}}}" if (number, name) in bold else text for name in names
         for text in [in_latex(line.get(name, ""))]]
        for number, line in enumerate(lines)
    ]  # fmt: skip
    frame = pd.DataFrame(cells, columns=[*map(in_latex, names)], dtype=object)
    return str(frame.to_latex(index=False, escape=False, caption=in_latex(caption), position="ht"))


def columns(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all cells in the order in which they come first; the names may be texts of others, too."""
    return list(dict.fromkeys(name for line in lines for name in line))


def tidy(records: Sequence[Mapping[str, Any]], style: Tidy) -> str:
    """Records for programs, who meet numbers as numbers and columns under our own names for them."""
    if style == "json":
        return json.dumps(records, indent=1)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns(records), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _csv_cell(value) for name, value in record.items()} for record in records)
    return out.getvalue()


def _csv_cell(value: Any) -> Any:
    """Texts harmless, floats as Python writes them, nothing for what is no number."""
    if isinstance(value, str):
        return in_csv(value)
    return ("" if math.isnan(value) else float(value)) if isinstance(value, float) else value


def _in_cell(text: str) -> str:
    """Markdown inside a line, where no block can begin."""
    marked = _CONSTRUCTS.sub(r"\\\g<0>", _flat(text))
    return _LINKS.sub(lambda found: f"&#{ord(found[0])};", marked)


def _flat(text: str) -> str:
    return in_terminal(text).strip()
