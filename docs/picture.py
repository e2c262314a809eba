"""Draws ``docs/queries.svg`` from committed rows: what one attack leaves of each defense, and what all of them leave.

    python docs/picture.py
"""

import math
from html import escape
from pathlib import Path

from bench.report.standings import Line, tables
from bench.results.store import Store

ROOT = Path(__file__).parents[1]
BOARD = ROOT / "leaderboards" / "query-cifar10"
SETTING = "cifar10-resnet20-weights-cifar10-resnet20-safetensors"
BUDGETS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 400, 500, 700, 1000, 1500, 2000, 2500)
DRAWN = {  # colours that can be told apart without red or green; the name as people say it
    "none": ("#222222", "no defense"),
    "rnd(sigma=0.02)": ("#cc79a7", "random noise"),
    "unig(variant=stateless)": ("#009e73", "UniG (stateless)"),
    "aaa-linear(temperature=tuned)": ("#0072b2", "AAA"),
    "aaa-linear(offset=secret, temperature=tuned)": ("#d55e00", "AAA, secret offset"),
}
PANELS = {"square": "Square alone", "worst": "All attacks together"}  # lines of the table that begin so
WIDTH, HEIGHT, LEFT, TOP, SIDE, GAP = 760, 380, 52, 44, 300, 52

Point = tuple[int, float]  # queries, accuracy in percent


def curves(board: Path) -> dict[str, dict[str, list[Point]]]:
    """Accuracy at each budget, by panel and defense; where a budget was not run, nothing."""
    rows, _ = Store(board / SETTING).rows()
    lines = tables(rows, BUDGETS)[0].lines
    return {
        panel: {line.defense: _points(line) for line in lines
                if line.defense in DRAWN and line.attack.startswith(panel)}
        for panel in PANELS
    }  # fmt: skip


def _points(line: Line) -> list[Point]:
    found = {budget: line.shares.get(f"@{budget}") for budget in BUDGETS}
    return [(budget, 100 * share.value) for budget, share in found.items() if share is not None and share.n]


def draw(found: dict[str, dict[str, list[Point]]]) -> str:
    """The curves as SVG: a panel for each set of attacks, queries on a logarithmic scale, one legend below."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#222222" role="img">',
        "<title>Robust accuracy against queries: CIFAR-10, ResNet-20, linf 8/255</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for place, (panel, title) in enumerate(PANELS.items()):
        left = LEFT + place * (SIDE + GAP)
        parts += _axes(left, title)
        for defense, points in found[panel].items():
            path = " ".join(f"{left + _x(queries):.1f},{_y(value):.1f}" for queries, value in points)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{DRAWN[defense][0]}" stroke-width="2.5" '
                'stroke-linejoin="round"/>'
            )
    left = LEFT
    for colour, name in DRAWN.values():
        parts.append(
            f'<path d="M{left} {HEIGHT - 18}h22" stroke="{colour}" stroke-width="4"/>'
            f'<text x="{left + 28}" y="{HEIGHT - 14}">{escape(name)}</text>'
        )
        left += 52 + 7 * len(name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _axes(left: int, title: str) -> list[str]:
    parts = [f'<text x="{left}" y="{TOP - 16}" font-weight="600" font-size="15">{escape(title)}</text>']
    for value in (0, 25, 50, 75, 100):
        parts.append(
            f'<path d="M{left} {_y(value):.1f}h{SIDE}" stroke="#dddddd"/>'
            f'<text x="{left - 8}" y="{_y(value) + 4:.1f}" text-anchor="end">{value}</text>'
        )
    for queries in (1, 10, 100, 1000):
        parts.append(f'<text x="{left + _x(queries):.1f}" y="{_y(0) + 18:.1f}" text-anchor="middle">{queries:,}</text>')
    parts.append(
        f'<text x="{left + SIDE / 2}" y="{_y(0) + 38:.1f}" text-anchor="middle">queries of each image</text>'
    )
    if left == LEFT:
        parts.append(
            f'<text transform="translate(16 {_y(50):.1f}) rotate(-90)" text-anchor="middle">'
            "robust accuracy (%)</text>"
        )
    return parts


def _x(queries: int) -> float:
    return SIDE * math.log(queries) / math.log(BUDGETS[-1])


def _y(value: float) -> float:
    return TOP + (HEIGHT - TOP - 92) * (1 - value / 100)


if __name__ == "__main__":
    (ROOT / "docs" / "queries.svg").write_text(draw(curves(BOARD)), encoding="utf-8")
