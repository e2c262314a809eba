"""Whether an entry is what it says, without running any code or any attack of it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from bench.entries.folder import CODE, ENTRY, ROWS, contents, hashed
from bench.entries.plan import met, required
from bench.entries.proof import Rescorer
from bench.entries.remade import Unknown, Untrue, names_code, remade
from bench.entries.standing import verification
from bench.entries.statement import Entry, read_entry, statement
from bench.errors import BenchError, StoreError
from bench.plan.cell import Component
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader
from bench.results.records import length
from bench.results.shards import SHARDS, read_shard
from bench.results.store import Row, Store
from bench.spec import Spec
from bench.system.user_code import joint_hash, named_file

MOST = 20  # lines about one thing
AUTHORED = ("about",)  # what follows from nothing

Outcome = Literal["ok", "WRONG", "note"]


class Check(NamedTuple):
    """What was looked at, and what came of it; a note is what could not be."""

    what: str
    outcome: Outcome
    said: str = ""


@dataclass
class Report:
    """Everything that was looked at in one entry."""

    folder: Path
    checks: list[Check] = field(default_factory=list)
    entry: Entry | None = None
    rows: list[Row] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        return any(check.outcome == "WRONG" for check in self.checks)

    def add(self, what: str, problems: list[str], fine: str) -> None:
        """What is wrong with ``what``, a line each; or that it is ``fine``."""
        shown = problems[:MOST] + ([f"and {len(problems) - MOST} more"] if len(problems) > MOST else [])
        self.checks += [Check(what, "WRONG", line) for line in shown] or [Check(what, "ok", fine)]


def validate(folder: Path, loader: Loader, code: Path | None, device: torch.device, proof: bool = True) -> Report:
    """Look at everything in the entry ``folder``; the user's file ``code`` stands for the one of its name in it.

    Without ``proof`` no model is asked about the final examples.
    """
    report = Report(folder)
    try:
        sizes = contents(folder)
        if not (folder / ENTRY).exists():
            raise StoreError(f"{folder} holds no {ENTRY}; name a folder that bench submit has written")
        entry, said = read_entry(folder / ENTRY)
        verified = verification(folder)
    except StoreError as error:
        report.add("schema", [str(error)], "")
        return report
    report.entry = entry
    report.add("schema", [], "every field is there, of its type, under the seal")
    report.add("files", list(_files(folder, entry, sizes)), f"{len(sizes)} files with the sizes and hashes stated")
    if report.wrong:
        return report
    try:
        report.rows, damaged = Store(folder / ROWS).rows()
    except StoreError as error:
        damaged = [error]
    report.add("records", [str(error) for error in damaged], f"{len(report.rows)} cells, each with checksums that hold")
    if report.wrong or not report.rows:
        return report
    report.add("complete", list(_complete(entry, report.rows)), _all_of(report.rows))
    report.add("code", list(_code(folder, report.rows)), "the source has the hash that the cells state")
    try:
        again = statement(report.rows, entry.about, entry.suite, entry.board, entry.budgets)
        told = {name: value for name, value in said.items() if name != "files"}
        report.add("figures", list(differences(told, again)), "every figure and flag follows from the records")
    except BenchError as error:
        report.add("figures", [str(error)], "")
    if proof:
        _prove(report, loader, code, device)
    said_by = f"verified by {verified.by} on {100 * verified.fraction:g} % of the samples" if verified else ""
    report.checks.append(Check("standing", "ok" if verified else "note", said_by or "self-reported"))
    return report


def _all_of(rows: Sequence[Row]) -> str:
    if any(row.cell.limited for row in rows):
        return "every cell that was run, with each of the few samples that --limit took; never ranked"
    return "every cell of the suite, with every sample"


def differences(stated: Any, again: Any, where: str = "") -> Iterator[str]:
    """Where two plain values differ, floats beyond rounding."""
    if isinstance(stated, dict) and isinstance(again, dict):
        for name in [*again, *(name for name in stated if name not in again)]:
            if name not in stated or name not in again:
                yield f"{where}{name} is {'missing' if name not in stated else 'not what follows from the records'}"
            else:
                yield from differences(stated[name], again[name], f"{where}{name}.")
    elif isinstance(stated, list) and isinstance(again, list) and len(stated) == len(again):
        for number, (one, other) in enumerate(zip(stated, again, strict=True)):
            yield from differences(one, other, f"{where.removesuffix('.')}[{number}].")
    elif isinstance(stated, float) and isinstance(again, float):
        if not math.isclose(stated, again, rel_tol=1e-9, abs_tol=1e-12):
            yield f"{where.removesuffix('.')} is {stated!r}; the records say {again!r}"
    elif stated != again or type(stated) is not type(again):
        yield f"{where.removesuffix('.')} is {_short(stated)}; the records say {_short(again)}"


def _files(folder: Path, entry: Entry, sizes: dict[str, int]) -> Iterator[str]:
    yield from (f"{name} is listed and not there" for name in entry.files if name not in sizes)
    yield from (f"{name} is there and not listed" for name in sizes if name not in entry.files)
    both = {name: size for name, size in sizes.items() if name in entry.files}
    for name, digest in hashed(folder, both).items():
        if (entry.files[name].bytes, entry.files[name].sha256) != (both[name], digest):
            yield f"{name} is not the file that {ENTRY} lists"


def _complete(entry: Entry, rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if row.errors:
            yield f"{row.cell} has failed"
        elif not row.complete:
            yield f"{row.cell} has {length(row.measured)} of {len(row.cell.ids)} samples"
    try:
        wanted = required(entry.suite, entry.defense, entry.models)
    except BenchError as error:
        yield str(error)
        return
    limited = any(row.cell.limited for row in rows)
    if wanted is not None and entry.board != (today := load_suite(entry.suite, {}).label):
        yield f"it answers {entry.board}, and the board is {today}; run bench submit again to stand there"
    if wanted is not None and not limited:
        there = {met(row.cell) for row in rows}
        yield from (f"{entry.suite} asks for {one}, which is not there" for one in sorted(wanted - there))
        yield from (f"{one} is no part of {entry.suite}" for one in sorted(there - wanted))


def _code(folder: Path, rows: list[Row]) -> Iterator[str]:
    """Whether the copies of the source have the hash that is part of each cell's key; they are read and not run."""
    parts = {(part.spec, str(part.version)): part
             for row in rows for part in (row.cell.model, row.cell.attack, *row.cell.defense)}  # fmt: skip
    for part in parts.values():
        _, plus, stated = str(part.version).partition("+")
        if plus and stated != (found := _hash_of(folder / CODE, part)):
            yield f"{part.spec} has hash {stated}, and its source in {CODE}/ {found or 'is not there'}"
        if not plus and names_code(part):
            yield f"{part.spec} is somebody's file without a hash"


def _hash_of(code: Path, part: Component) -> str:
    try:
        spec = Spec.parse(part.spec)
        named = named_file(spec.name)
        values = [value for value in spec.args.values() if isinstance(value, str)]
        inside = [file for value in values if (file := named_file(Spec.parse(value).name))]
        names = {file.name for file, _ in ([named] if named else []) + inside}
        names |= {Path(value).name for value in values if (code / Path(value).name).is_file()}
        return joint_hash({code / name for name in names})
    except Exception:  # of a stranger's source: not there, not to be read, nested beyond what a parser takes
        return ""


def _prove(report: Report, loader: Loader, code: Path | None, device: torch.device) -> None:
    problems: list[str] = []
    notes: dict[str, int] = {}
    asked = Rescorer(report.folder, loader, code, device)
    for row in report.rows:
        try:
            if not names_code(row.cell.attack):
                remade(row.cell, loader, code)
        except Untrue as error:
            problems.append(f"{row.cell}: {error}")
        except Unknown:
            pass  # told where its examples are looked at
    paths = sorted((report.folder / ROWS).rglob(SHARDS))
    for path in paths:
        stored = read_shard(path)
        try:
            found, missing = asked.problems(path, stored)
            problems += [f"{stored.shard.cell}: {problem}" for problem in found]
        except Unknown as error:
            missing = f"nothing of it: {error}"
        except BenchError as error:
            problems.append(f"{stored.shard.cell}: {error}")
            continue
        if missing:
            notes[missing] = notes.get(missing, 0) + 1
    whole = len(paths) - sum(notes.values())
    report.add("proof", problems, f"the final examples of {whole} of {len(paths)} shards were asked about again")
    for missing, count in notes.items():
        said = f"{count} of {len(paths)} shards: inside the ball and the box, the model not asked ({missing})"
        report.checks.append(Check("proof", "note", said if "nothing of it" not in missing else f"{count}: {missing}"))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
