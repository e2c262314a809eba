"""The pictures of a defense as plotly draws them: plain data for its JavaScript, which alone draws.

Plotly reads markup in names, so all texts of others are escaped.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from bench.report.collapse import collapse
from bench.report.curves import LINES, Training
from bench.report.escape import in_terminal
from bench.report.portrait import CONTROL, PALETTE, WORST, Axis, Bar, Curve, Reliability

VISIBLE = 5  # curves that are drawn at first; the legend shows the others
LONGEST = 34  # letters of a name in a picture
Figure = dict[str, Any]


def curves_chart(curves: Sequence[Curve], axis: Axis) -> Figure:
    """Accuracy along ``axis``: a line and its band for each attack, the worst case thickest."""
    data: list[Figure] = []
    for place, each in enumerate(curves):
        colour = WORST if each.pooled else CONTROL if each.control else PALETTE[place % len(PALETTE)]
        at, name = each.at.round(4).tolist(), _text(each.name)
        shared = {"legendgroup": str(place), "visible": True if place < VISIBLE else "legendonly"}
        data.append({
            **shared, "x": at + at[::-1], "y": _percent(each.high) + _percent(each.low[::-1]),
            "fill": "toself", "fillcolor": _faint(colour), "line": {"width": 0}, "hoverinfo": "skip",
            "showlegend": False, "mode": "lines",
        })  # fmt: skip
        ends = [f"{100 * low:.0f} to {100 * high:.0f}" for low, high in zip(each.low, each.high, strict=True)]
        data.append({
            **shared, "x": at, "y": _percent(each.share), "text": ends, "name": name, "mode": "lines",
            "line": {"color": colour, "width": 3.5 if each.pooled else 2, "dash": "dot" if each.control else "solid"},
            "hovertemplate": f"{axis.reading}: %{{y:.1f}} % [%{{text}}]",
        })  # fmt: skip
    axes = {
        "xaxis": {"title": {"text": axis.title}, "exponentformat": "none",
                  **({"type": "log", "dtick": 1} if axis.log else {"rangemode": "tozero"})},
        "yaxis": {"range": [0, 100], "title": {"text": f"{axis.measures} (%)"}},
    }
    return {"data": data, "layout": {**axes, "hovermode": "closest"}}


def bars_chart(bars: Sequence[Bar], axis: str) -> Figure:
    """What each attack leaves, with its interval, the worst case on top."""
    colours = [WORST if bar.pooled else CONTROL if bar.control else PALETTE[0] for bar in bars]
    data = {
        "type": "bar", "orientation": "h", "y": [_text(bar.name) for bar in bars],
        "x": _percent([bar.share for bar in bars]), "marker": {"color": colours},
        "error_x": {
            "type": "data", "symmetric": False, "array": _percent([bar.high - bar.share for bar in bars]),
            "arrayminus": _percent([bar.share - bar.low for bar in bars]), "thickness": 1.4, "width": 4,
        },
        "text": [f"{100 * bar.low:.0f} to {100 * bar.high:.0f}" for bar in bars], "textposition": "none",
        "hovertemplate": "%{x:.1f} % [%{text}]<extra></extra>",
    }  # fmt: skip
    return {
        "data": [data],
        "layout": {
            "xaxis": {"range": [0, 100], "title": {"text": axis}},
            "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
            "height": 110 + 24 * len(bars), "bargap": 0.35,
        },
    }  # fmt: skip


def reliability_chart(found: Sequence[Reliability]) -> Figure:
    """Accuracy against confidence; a point is as large as its bin is full."""
    data: list[Figure] = [{
        "x": [0, 100], "y": [0, 100], "mode": "lines", "line": {"color": CONTROL, "dash": "dot", "width": 1},
        "hoverinfo": "skip", "showlegend": False,
    }]  # fmt: skip
    for each, colour in zip(found, (PALETTE[0], WORST), strict=False):
        most = max(each.count.tolist(), default=1)
        data.append({
            "x": _percent(each.confidence), "y": _percent(each.accuracy), "text": each.count.tolist(),
            "mode": "lines+markers", "name": _text(each.name), "line": {"color": colour, "width": 1.5},
            "marker": {"size": [round(6 + 16 * (count / most) ** 0.5, 1) for count in each.count.tolist()]},
            "hovertemplate": "confidence %{x:.0f} %: %{y:.0f} % right of %{text} images",
        })  # fmt: skip
    axes = {"xaxis": {"range": [0, 101], "title": {"text": "confidence (%)"}},
            "yaxis": {"range": [-3, 103], "title": {"text": "accuracy (%)"}}}  # fmt: skip
    return {"data": data, "layout": {**axes}}


def training_chart(training: Training) -> Figure:
    """What the network withstood after each epoch, and where single-step training collapsed."""
    epochs = list(range(1, len(training.epochs) + 1))
    data = [
        {
            "x": epochs, "y": [_rounded(epoch.get(figure)) for epoch in training.epochs], "name": name,
            "mode": "lines", "line": {"color": colour, "dash": "dash" if dashes else "solid", "width": 2},
            "hovertemplate": "epoch %{x}: %{y:.1f}",
        }
        for name, (figure, colour, dashes) in LINES.items()
    ]  # fmt: skip
    fell = collapse(training.epochs)
    marked = [] if fell is None else [
        {"type": "line", "x0": fell.epoch, "x1": fell.epoch, "yref": "paper", "y0": 0, "y1": 1,
         "line": {"color": WORST, "dash": "dot"}, "label": {"text": "collapse", "font": {"color": WORST}}}
    ]  # fmt: skip
    axes = {"xaxis": {"title": {"text": "epoch"}}, "yaxis": {"range": [0, 100], "title": {"text": "%"}}}
    return {"data": data, "layout": {**axes, "shapes": marked}}


def _text(name: str) -> str:
    """``name`` in one line of a picture, none of it markup."""
    name = in_terminal(name)
    return escape(name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…", quote=False)


def _percent(shares: Any) -> list[float]:
    return [round(100 * float(share), 2) for share in shares]


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.13)"
