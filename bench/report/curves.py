"""How networks were trained, epoch by epoch: a table, a plot, and where single-step training collapsed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from bench.report.collapse import collapse
from bench.report.escape import in_terminal, markdown_table, tidy
from bench.results.store import Row

Style = Literal["md", "csv", "json"]

LEGEND = (
    "Accuracies (%) on held-out images, in the defense's own ball: PGD has ten steps, the single step is Fast-AT's. "
    "Alignment is the mean cosine of the loss's gradients at an image and at a random point of its ball; the norm is "
    "the gradient's mean l2, the weight gradient that of a sample's own in all weights where the single step ends. "
    "Channels: the Gini coefficient of their sizes, mean of all convolutions, on clean images and where the step ends. "
    "Self-information: the share of single-step perturbations that give an image of another class their own, as where "
    "a training has fitted itself. "
    "Variance: the share of its first training's path that the subspace of Sub-AT holds. "
    "A collapse is the first epoch after which the network withstands the single step alone."
)
LINES = {  # what is drawn: figure, colour, dashes
    "clean": ("clean_accuracy", "#999999", ""), "single step": ("step_accuracy", "#e69f00", ""),
    "PGD": ("pgd_accuracy", "#0072b2", ""), "alignment": ("alignment", "#009e73", "4 3"),
}  # fmt: skip
MORE = {  # what trainings of earlier versions do not know, or only some
    "weight gradient": ("weight_gradient_norm", "{:.2g}"), "channels": ("channel_inequality", "{:.2f}"),
    "channels, single step": ("step_channel_inequality", "{:.2f}"),
    "self-information": ("self_information", "{:.2f}"), "variance": ("explained_variance", "{:.3f}"),
}  # fmt: skip
WIDTH, HEIGHT, COLUMNS = 320, 180, 2  # pixels of a panel's axes, panels beside each other
TITLE = 52  # letters that fit above a panel
LEFT, TOP, GAP = 44, 34, 46


@dataclass(frozen=True)
class Training:
    """One network's training: who it is, and the figures of :func:`bench.measure.diagnostics.diagnose` by epoch."""

    dataset: str
    model: str
    defense: str
    seed: int
    epochs: Sequence[Mapping[str, float]]

    @property
    def title(self) -> str:
        """One line."""
        return f"{self.defense} · {self.model} · {self.dataset}, seed {self.seed}"


def trainings(rows: Iterable[Row]) -> list[Training]:
    """The trainings behind ``rows``, each once, however many attacks have met its network."""
    found: dict[Any, Training] = {}
    for row in rows:
        cell = row.cell
        early = [part.label for part in cell.defense if part.stage != "output"]
        key = cell.data_hash, cell.model.label, *early, cell.seed
        if row.training and key not in found:
            found[key] = Training(cell.dataset.label, cell.model.label, " + ".join(early), cell.seed, row.training)
    return list(found.values())


def render_curves(found: Sequence[Training], style: Style) -> str:
    """A line for each training in Markdown; in CSV and JSON a record for each epoch, counted from 1."""
    if style != "md":
        return tidy(
            [
                {"dataset": one.dataset, "model": one.model, "defense": one.defense, "seed": one.seed, "epoch": epoch,
                 **line}
                for one in found for epoch, line in enumerate(one.epochs, start=1)
            ],
            style,
        )  # fmt: skip
    return f"{markdown_table([_line(one) for one in found])}\n\n{LEGEND}\n"


def _line(one: Training) -> dict[str, str]:
    first, last = one.epochs[0], one.epochs[-1]
    robust = [line["pgd_accuracy"] for line in one.epochs]
    best = max(robust)
    fell = collapse(one.epochs)
    return {
        "defense": one.defense, "model": one.model, "data": one.dataset, "seed": str(one.seed),
        "epochs": str(len(one.epochs)),
        "clean": f"{100 * last['clean_accuracy']:.1f}",
        "single step": f"{100 * last['step_accuracy']:.1f}",
        "PGD": f"{100 * last['pgd_accuracy']:.1f}",
        "best PGD (epoch)": f"{100 * best:.1f} ({robust.index(best) + 1})",
        "alignment": _change(first, last, "alignment", "{:.2f}"),
        "gradient norm": _change(first, last, "gradient_norm", "{:.2g}"),
        **{head: _change(first, last, name, form) for head, (name, form) in MORE.items() if _knows(one, name)},
        "collapse": "none" if fell is None else f"epoch {fell.epoch}: PGD {100 * fell.pgd_accuracy:.1f}, "
                                                f"single step {100 * fell.step_accuracy:.1f}",
    }  # fmt: skip


def _knows(one: Training, name: str) -> bool:
    return any(name in line for line in one.epochs)


def _change(first: Mapping[str, float], last: Mapping[str, float], name: str, form: str) -> str:
    return " → ".join(form.format(line[name]) if name in line else "not finite" for line in (first, last))


def plot(found: Sequence[Training]) -> str:
    """An SVG with a panel for each training: :data:`LINES` over the epochs, and a line where it collapsed."""
    rows = -(-len(found) // COLUMNS)
    across, down = LEFT + WIDTH + GAP, TOP + HEIGHT + GAP
    size = COLUMNS * across, rows * down + 24
    corners = [(number % COLUMNS * across + LEFT, number // COLUMNS * down + TOP) for number in range(len(found))]
    panels = [
        f'<g transform="translate({x},{y})">{_panel(one)}</g>' for (x, y), one in zip(corners, found, strict=True)
    ]
    keys = [
        f'<g transform="translate({LEFT + 110 * number},{rows * down + 8})"><path d="M0 0H24" stroke="{colour}" '
        f'stroke-width="2" stroke-dasharray="{dashes}"/><text x="30" y="4">{name}</text></g>'
        for number, (name, (_, colour, dashes)) in enumerate(LINES.items())
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
        f'height="{size[1]}" font-family="sans-serif" font-size="11" fill="#222">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(panels)}{"".join(keys)}</svg>\n'
    )


def _panel(one: Training) -> str:
    last = max(len(one.epochs) - 1, 1)

    def point(epoch: int, value: float) -> str:
        return f"{WIDTH * epoch / last:.1f},{HEIGHT * (1 - min(max(value, 0), 1)):.1f}"

    parts = [f'<text y="-10" font-weight="bold">{escape(_cut(in_terminal(one.title)))}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = HEIGHT * (1 - share)
        parts.append(f'<path d="M0 {y}H{WIDTH}" stroke="#e4e4e4"/>'
                     f'<text x="-6" y="{y + 4}" text-anchor="end">{share:g}</text>')  # fmt: skip
    if (fell := collapse(one.epochs)) is not None:
        x = WIDTH * (fell.epoch - 1) / last
        parts.append(f'<path d="M{x:.1f} 0V{HEIGHT}" stroke="#d55e00" stroke-dasharray="2 3"/>'
                     f'<text x="{x + 3:.1f}" y="10" fill="#d55e00">collapse</text>')  # fmt: skip
    for name, colour, dashes in LINES.values():
        points = " ".join(point(epoch, line[name]) for epoch, line in enumerate(one.epochs) if name in line)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6" '
                     f'stroke-dasharray="{dashes}"/>')  # fmt: skip
    parts.append(f'<text y="{HEIGHT + 16}">epoch 1</text>'
                 f'<text x="{WIDTH}" y="{HEIGHT + 16}" text-anchor="end">{len(one.epochs)}</text>')  # fmt: skip
    return "".join(parts)


def _cut(title: str) -> str:
    """``title`` as far as it fits above a panel."""
    return title if len(title) <= TITLE else f"{title[: TITLE - 1]}…"
