"""``bench check``: whether a component keeps the contract, before anything slow."""

import json
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from bench.cli.console import console, say_whose_code
from bench.cli.terminal_table import columns
from bench.run.progress import duration
from bench.spec import Spec

if TYPE_CHECKING:
    from bench.check import Verdict

STYLES = {"FAIL": "red", "note": "yellow", "pass": "green"}


def check(
    component: Annotated[str, typer.Argument(help="path/to/file.py:Name or a registered name, arguments too.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Try an attack, a defense or a model on tiny data: the contract, rule by rule, with the fix for what fails.

    It takes seconds and downloads nothing. The exit code is 1 where a rule is broken.
    """
    from bench.check import check as check_component

    spec = Spec.parse(component)
    say_whose_code([spec])
    started = perf_counter()
    verdicts = check_component(spec)
    failed = [verdict for verdict in verdicts if verdict.failed]
    if as_json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    else:
        _print(component, verdicts, perf_counter() - started)
    if failed:
        raise typer.Exit(1)


def _print(component: str, verdicts: "list[Verdict]", seconds: float) -> None:
    lines = [(verdict.rule, verdict.outcome, verdict.saw + (f"; fix: {verdict.fix}" if verdict.fix else ""))
             for verdict in verdicts]  # fmt: skip
    table = columns(("rule", "", "what was seen"), lines, console.width)
    for row, verdict in zip(table.rows, verdicts, strict=True):
        row.style = STYLES[verdict.outcome] if verdict.outcome != "pass" else None
    console.print(table)
    console.print()
    count = {outcome: sum(verdict.outcome == outcome for verdict in verdicts) for outcome in ("pass", "note", "FAIL")}
    console.print(
        f"{component}: {count['pass']} passed, {count['note']} noted, {count['FAIL']} failed, in {duration(seconds)}",
        soft_wrap=True,
    )
