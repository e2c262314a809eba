"""Pictures of defenses as files, drawn by matplotlib, which is imported here alone and when something is drawn."""

import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from bench.report.escape import in_terminal
from bench.report.portrait import CONTROL, PALETTE, WORST, Axis, Bar, Curve, Portrait, Reliability, shown
from bench.system.extras import library
from bench.system.files import keep_file

Style = Literal["svg", "png", "pdf"]
MOST = 8         # curves of a picture
LONGEST = 44     # letters of a name
SETTINGS = {     # texts stay texts, and the same figures give the same file
    "svg.fonttype": "none", "svg.hashsalt": "parry", "pdf.fonttype": 42, "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "legend.frameon": False,
    "text.parse_math": False,
}  # fmt: skip
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}


def draw(found: Portrait, title: str, measures: str, stem: Path, styles: Sequence[Style]) -> list[Path]:
    """Draw what there is of ``found``, in each style: curves into ``STEM-queries`` and ``STEM-radius``,
    ``STEM-attacks`` and ``STEM-calibration``.

    Args:
        title: what stands above each picture.
        measures: what the shares are of, as in "robust accuracy".

    Raises:
        ConfigError: matplotlib is missing.
        StoreError: a file cannot be written.
    """
    written = []
    with library("matplotlib", "site").rc_context(SETTINGS):
        for name, figure in _figures(found, _text(title), measures):
            for style in styles:
                path = stem.with_name(f"{stem.name}-{name}.{style}")
                drawn = io.BytesIO()
                figure.savefig(drawn, format=style, dpi=160, bbox_inches="tight", metadata=UNDATED[style])
                keep_file(path, drawn.getvalue())
                written.append(path)
    return written


def _figures(found: Portrait, title: str, measures: str) -> Iterator[tuple[str, Any]]:
    for graph in found.graphs:
        yield graph.axis.name, _curves(shown(graph.curves, MOST), graph.axis, title)
    if found.bars:
        yield "attacks", _bars(found.bars, title, measures)
    if found.reliability:
        yield "calibration", _reliability(found.reliability, title)


def _axes(title: str, width: float, height: float) -> Any:
    # Without pyplot: no display, and nothing that outlives the picture.
    axes = library("matplotlib.figure", "site").Figure(figsize=(width, height)).subplots()
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    return axes


def _curves(curves: Sequence[Curve], axis: Axis, title: str) -> Any:
    axes = _axes(title, 6.4, 4)
    for place, each in enumerate(curves):
        colour = WORST if each.pooled else PALETTE[place % len(PALETTE)]
        width = 2.5 if each.pooled else 1.4
        axes.plot(each.at, 100 * each.share, color=colour, linewidth=width, label=_text(each.name, lines=3))
        axes.fill_between(each.at, 100 * each.low, 100 * each.high, color=colour, alpha=0.12, linewidth=0)
    axes.set(ylim=(0, 100), xlabel=axis.title, ylabel=f"{axis.measures} (%)")
    if axis.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda queries, _: f"{queries:,.0f}")
    axes.set_xlim(left=1 if axis.log else 0)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return axes.figure


def _bars(bars: Sequence[Bar], title: str, measures: str) -> Any:
    axes = _axes(title, 6.4, 1 + 0.24 * len(bars))
    shares = [100 * bar.share for bar in bars]
    ends = [[100 * (bar.share - bar.low) for bar in bars], [100 * (bar.high - bar.share) for bar in bars]]
    colours = [WORST if bar.pooled else CONTROL if bar.control else PALETTE[0] for bar in bars]
    axes.barh(range(len(bars)), shares, xerr=ends, color=colours, error_kw={"elinewidth": 1, "capsize": 2})
    axes.set_yticks(range(len(bars)), [_text(bar.name) for bar in bars])
    axes.set(xlim=(0, 100), xlabel=f"{measures} (%)")
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    return axes.figure


def _reliability(found: Sequence[Reliability], title: str) -> Any:
    axes = _axes(title, 4.6, 4.2)
    axes.plot((0, 100), (0, 100), color=CONTROL, linestyle=":", linewidth=1)
    for each, colour in zip(found, (PALETTE[0], WORST), strict=False):
        axes.plot(100 * each.confidence, 100 * each.accuracy, color=colour, linewidth=1, alpha=0.6)
        sizes = 12 + 120 * each.count / each.count.max()
        axes.scatter(100 * each.confidence, 100 * each.accuracy, s=sizes, color=colour, label=_text(each.name))
    axes.set(xlim=(0, 102), ylim=(-3, 103), xlabel="confidence (%)", ylabel="accuracy (%)")
    axes.legend(loc="upper left", markerscale=0.6)
    return axes.figure


def _text(name: str, lines: int = 1) -> str:
    """``name`` in so many lines that fit, and that a legend does not hide, as what begins with an underscore."""
    words = in_terminal(name).lstrip("_") or "?"
    if lines == 1:
        return words if len(words) <= LONGEST else f"{words[: LONGEST - 1]}…"
    return textwrap.fill(words, LONGEST, max_lines=lines, placeholder="…")
