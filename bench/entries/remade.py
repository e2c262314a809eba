"""A cell of an entry made again here, of what Parry has and of the code that the user has named; never of its own."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.dataset import Dataset
from bench.errors import BenchError
from bench.plan.cell import Cell, Component
from bench.plan.pin import code_files
from bench.plan.suite import Grid, Suite
from bench.plan.tasks import Loader, Task, expand
from bench.spec import Spec
from bench.threat import Access

FRACTION = re.compile(r"\d\s*/\s*\d")


class Unknown(BenchError):
    """What cannot be made here, for a reason that says nothing against the entry."""


class Untrue(BenchError):
    """What is made here otherwise than the entry says."""


def remade(cell: Cell, loader: Loader, code: Path | None = None, whole: bool = True) -> Task:
    """The task of ``cell``; the file ``code`` stands for the one of its name in the cell.

    Unless it is the ``whole`` of it, an attack of Parry's stands for the one of the cell, which then may be anybody's.

    Raises:
        Unknown: it names code that nobody has given, a path, or what is not there or of another version.
        Untrue: made here it has other parameters or other samples than it says.
    """
    cell = cell if whole else plain(cell)
    dataset, model, attack, *chain = (
        spoken(part, code) for part in (cell.dataset, cell.model, cell.attack, *cell.defense)
    )
    threat = cell.threat
    served: dict[str, Any] = {"norm": threat.norm, "eps": threat.eps, "queries": threat.query_budget}
    try:
        grid = Grid(
            dataset=dataset, n=len(cell.ids), model=[model], defense=[" + ".join(chain) or "none"], attack=[attack],
            seed=[cell.seed], numerics=cell.numerics, quantise=cell.quantise, **(served if threat.asks else {}),
        )  # fmt: skip
        (task,) = expand(Suite(name="entry", grid=[grid]), loader)
    except (BenchError, ValueError) as error:
        raise Unknown(str(error).splitlines()[0]) from None
    _compare(cell, task.cell, whole)
    return task


def data_of(cell: Cell, loader: Loader) -> Dataset:
    """The data set of ``cell``, whoever's its model and defense are.

    Raises:
        Unknown: it is not here, or another copy of it is.
    """
    try:
        _, data = loader.dataset(spoken(cell.dataset, None))
    except BenchError as error:
        raise Unknown(str(error).splitlines()[0]) from None
    if data.fingerprint != cell.data_hash:
        raise Unknown(f"{cell.dataset.spec} here has other images or labels than those that were used")
    return data


def plain(cell: Cell) -> Cell:
    """``cell`` under an attack that Parry has and that nothing depends on."""
    attack = Component("noise" if cell.threat.asks else "standard")
    access: Access = "labels" if cell.threat.asks else "training-data"
    return replace(cell, attack=attack, threat=replace(cell.threat, access=access), sources=(), replays=None)


def names_code(part: Component) -> bool:
    """Whether making ``part`` would run a file of somebody."""
    try:
        return bool(code_files(Spec.parse(part.spec)))
    except BenchError:
        return True


def spoken(part: Component, code: Path | None) -> str:
    """How to name ``part`` here.

    Raises:
        Unknown: it names a path, or code that ``code`` is not.
    """
    text = part.title or part.spec
    try:
        spec = Spec.parse(text)
    except BenchError as error:
        raise Unknown(str(error)) from None
    for value in (value for value in spec.args.values() if isinstance(value, str)):
        if "/" in FRACTION.sub("", value) or "\\" in value or value.startswith((".", "~")):
            raise Unknown(f"{part.spec} names a path; nothing outside of the data and model folders is opened")
    files = code_files(spec)
    if not files:
        return text
    if code is None or {file.name for file in files} != {code.name} or not part.spec.startswith(code.name):
        raise Unknown(f"{part.spec} is code that is not Parry's; name your own copy of it with --code")
    return str(Spec(f"{code}:{spec.name.rpartition('.py:')[2]}", spec.args))


def _compare(stated: Cell, made: Cell, whole: bool) -> None:
    if stated.data_hash != made.data_hash:
        raise Unknown(f"{stated.dataset.spec} here has other images or labels than those that were used")
    pairs = [(stated.dataset, made.dataset), (stated.model, made.model)]
    pairs += [(stated.attack, made.attack)] if whole else []
    if len(stated.defense) == len(made.defense):
        pairs += list(zip(stated.defense, made.defense, strict=True))
    for theirs, ours in pairs:
        if "+" in str(ours.version) and ours.version != theirs.version:
            raise Untrue(f"the code of {theirs.spec} has hash {theirs.version}, the file that you named {ours.version}")
        if str(ours.version) != str(theirs.version):
            raise Unknown(f"{theirs.spec} was version {theirs.version} and is version {ours.version} here")
    if stated.weights_hash != made.weights_hash:
        raise Unknown(f"{stated.model.spec} here has other weights than those that were used")
    if stated.ids != made.ids:
        raise Untrue(f"its samples are not the {len(stated.ids)} that Parry takes of {stated.dataset.spec}")
    if plain(stated).meaning != plain(made).meaning:
        raise Untrue(f"{stated.defense_name} on {stated.model.spec} has other parameters here than it says")
    if whole and stated.meaning != made.meaning:
        raise Untrue(f"{stated.attack.spec} has other parameters here than it says")
