"""Versions of one component among stored rows: a table shows the newest, and never two of them as one."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from bench.plan.cell import Component
from bench.report.settings import place
from bench.results.store import Row

Code = tuple[str, str]  # how a component of a user's file is written, and its version with the hash


class Versions(NamedTuple):
    """Rows made with the newest version of each of their components, and the others."""

    newest: list[Row]
    older: list[Row]


def by_version(rows: Iterable[Row], entered: Collection[Code] = frozenset()) -> Versions:
    """Rows apart by whether each of their components is the newest of its name, kind and arguments in their setting.

    The higher version is the newer one. What a user edits keeps its number and changes its hash; there, the version of
    the row that finished last is. Data sets and models come first: an attack that met only a former model does not
    outdate the attacks on today's. Defenses that were ``entered`` are works of their own, as two authors may call their
    files alike, and neither outdates the other.
    """
    newest, older = list(rows), []
    for kinds in (("data", "model"), ("defense", "attack")):
        latest: dict[tuple[object, ...], tuple[int, str, str]] = {}
        for row in newest:
            for where, component in _places(row, kinds, entered):
                latest[where] = max(latest.get(where, (0, "", "")), _age(row, component))
        current = {where: age[-1] for where, age in latest.items()}
        outdated = [
            any(str(component.version) != current[where] for where, component in _places(row, kinds, entered))
            for row in newest
        ]
        older += [row for row, late in zip(newest, outdated, strict=True) if late]
        newest = [row for row, late in zip(newest, outdated, strict=True) if not late]
    return Versions(newest, older)


def versioned(component: Component) -> str:
    """What tells a version of a component from the others: the hash of a user's code, or the number of ours."""
    return component.label if "+" in str(component.version) else f"{component.label} (version {component.version})"


def _places(
    row: Row, kinds: tuple[str, ...], entered: Collection[Code]
) -> list[tuple[tuple[object, ...], Component]]:
    """The components of those kinds that ``row`` was made with, each with the place in which its versions compete."""
    cell = row.cell
    chain = [part for part in cell.defense if (part.spec, str(part.version)) not in entered]
    parts = {"data": [cell.dataset], "model": [cell.model], "defense": chain, "attack": [cell.attack]}
    return [((*place(row), kind, part.spec), part) for kind in kinds for part in parts[kind]]


def _age(row: Row, component: Component) -> tuple[int, str, str]:
    """Larger for newer versions: the number, when the row was finished, and the version itself."""
    number = str(component.version).partition("+")[0]
    finished = max((str(shard.provenance.get("finished", "")) for shard in row.shards), default="")
    return int(number) if number.isdecimal() and len(number) < 10 else 0, finished, str(component.version)
