"""``docs/figures.md``: every figure and every sign, from the catalogues that tables are made of.

Written by ``python -m bench.report.figures_page > docs/figures.md``.
"""

from bench.report.escape import markdown_table
from bench.report.figures import FIGURES, Figure
from bench.report.marks import MARKS

HEAD = """# Figures and signs

Made of the catalogues in `bench/report/figures.py` and `bench/report/marks.py`; a new figure or sign is an entry there.
Tables show labels; JSON and CSV have names, and shares between 0 and 1 where tables print percent. *Better* is what a
defense wants. Tables leave a column out where no line has the figure.

## Accuracies

Each is a share of all samples with its 95 % Wilson interval. **clean**: right before any attack. **@Q**: right when
clean, and not beaten by any of the first Q queries. **final**: right when clean, and right on the final example,
re-evaluated in float32; a random defense by the majority of 16 evaluations. **re-evaluated** (random defenses): as @Q,
but an image counts as beaten only where its hit is wrong again. **test**: right on clean test images, for a network
that was trained on released data."""
SECTIONS = {
    "defense": "What a defense does to its answers (query track)",
    "attack": "What the queries achieved (query track)",
    "certifier": "What a certifier proves (certificate track)",
    "learner": "What a learner got from released data (data track)",
}


def as_markdown() -> str:
    """The page."""
    parts = [HEAD]
    for place, title in SECTIONS.items():
        shown = [figure for figure in FIGURES if figure.place == place]
        parts += [f"## {title}", markdown_table([_line(figure) for figure in shown])]
    signs = [
        {"sign": mark.sign, "name": mark.name, "meaning": mark.sentence, "ranked": "never" if mark.bars else ""}
        for mark in MARKS
    ]
    parts += ["## Signs", markdown_table(signs)]
    return "\n\n".join(parts) + "\n"


def _line(figure: Figure) -> dict[str, str]:
    names = [name for name in (figure.name, figure.after) if name]
    return {
        "label": figure.label, "name": ", ".join(names), "unit": figure.unit, "better": figure.better,
        "meaning": figure.sentence, "needs": ", ".join(figure.needs),
    }  # fmt: skip


if __name__ == "__main__":
    print(as_markdown(), end="")
