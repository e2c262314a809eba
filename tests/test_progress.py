"""What a run says of each cell that it finishes."""

import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from bench.run.progress import Screen
from bench.threat import Threat
from tests.rows import row


def told(*rows: Any) -> list[str]:
    out = io.StringIO()
    screen = Screen(Console(file=out), (each.cell for each in rows))
    for each in rows:
        screen.finish(SimpleNamespace(cell=each.cell), each, 1.0)  # type: ignore[arg-type]
    return [line.partition(":")[0] for line in out.getvalue().splitlines()]


def test_a_cell_is_named_by_what_tells_it_from_the_others_and_no_more():
    wide = Threat("linf", 0.5, "scores", 100)
    assert told(row([1]), row([1], "rnd")) == ["[1/2] none × square", "[2/2] rnd × square"]
    assert told(row([1]), row([1], attack="rays"), row([1], threat=wide)) == [
        "[1/3] none × square, linf 8/255", "[2/3] none × rays", "[3/3] none × square, linf 0.5",
    ]  # fmt: skip
    assert told(row([1]), row([1], seed=3)) == ["[1/2] none × square, seed 0", "[2/2] none × square, seed 3"]
    assert told(row([1]), row([1], budget=1000)) == [
        "[1/2] none × square, 100 queries", "[2/2] none × square, 1,000 queries",
    ]  # fmt: skip
