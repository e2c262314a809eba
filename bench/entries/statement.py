"""What ``entry.json`` says: all of it follows from the rows beside it, except who wrote it and what they call it.

So whoever has the rows can write it again and compare: :mod:`bench.entries.validate` does.
"""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue

from bench.entries.about import About
from bench.errors import ConfigError, StoreError
from bench.plan.cell import Cell, Component
from bench.plan.suite import TrackName
from bench.report.leaderboard import records
from bench.report.standings import tables
from bench.results.shards import content_of
from bench.results.store import Row
from bench.tracks import track_of

SCHEMA: Literal[1] = 1
LARGEST = 16 << 20  # bytes of entry.json
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]*$", max_length=128)]
Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Part(_Strict):
    """A component: every parameter that it means, and of users' code the hash."""

    kind: Literal["data set", "model", "defense", "attack"]
    spec: str
    version: str
    stage: str
    traits: list[str]
    parameters: dict[str, JsonValue]


class Data(_Strict):
    """A list of samples of a data set; ``samples_hash`` is of their numbers."""

    dataset: str
    hash: Digest
    n: Count
    samples_hash: Hash


class Encounter(_Strict):
    """A cell: a defense that met an attack on a model."""

    key: Hash
    model: str
    defense: str
    attack: str
    threat: str
    seed: Count
    n: Count
    limited: bool


class Sign(_Strict):
    """A red flag."""

    setting: str
    defense: str
    flag: str
    evidence: str


class Cost(_Strict):
    """What all cells together took."""

    seconds: FiniteFloat
    forwards: Count
    backwards: Count


class File(_Strict):
    """A file of the entry."""

    bytes: Count
    sha256: Hash


class Entry(_Strict):
    """Everything about an entry, in the order in which people read it."""

    schema_: Annotated[Literal[1], Field(alias="schema")]
    about: About
    track: TrackName
    suite: str
    board: str
    defense: str
    models: list[str]
    command: str
    figures: list[dict[str, str | int | FiniteFloat | None]]
    flags: list[Sign]
    cost: Cost
    seeds: list[Count]
    data: list[Data]
    weights: dict[str, Digest]
    components: list[Part]
    budgets: list[Count]
    hardware: list[str]
    packages: list[str]
    commits: list[str]
    dirty: bool
    finished: str
    cells: list[Encounter]
    files: dict[str, File]
    sha256: Hash


def statement(rows: Sequence[Row], about: About, suite: str, board: str, budgets: Sequence[int]) -> dict[str, Any]:
    """What an entry of ``rows`` says, but for its files and its seal.

    ``board`` is the suite with the version that was answered, ``query-cifar10 v1``; the name alone where it has none.

    Raises:
        ConfigError: the rows are of no defense, of several, or of two tracks.
    """
    cells = [row.cell for row in rows]
    shown = tables(rows, budgets)
    track, defense, models = entered_track(cells), entered(cells), _each(cell.model.spec for cell in cells)
    return {
        "schema": SCHEMA,
        "about": about.model_dump(),
        "track": track,
        "suite": suite,
        "board": board,
        "defense": defense,
        "models": models,
        "command": _command(defense, track, suite, models, any(cell.limited for cell in cells)),
        "figures": records(shown),
        "flags": [asdict(flag) for table in shown for flag in table.flags],
        "cost": {
            "seconds": round(sum(shard.seconds for row in rows for shard in row.shards), 3),
            **{name: sum(int(row.columns[name].sum()) for row in rows if name in row.columns)
               for name in ("forwards", "backwards")},
        },
        "seeds": sorted({cell.seed for cell in cells}),
        "data": _unique(_data(cell) for cell in cells),
        "weights": {cell.model.spec: cell.weights_hash for cell in cells},
        "components": _unique(chain.from_iterable(map(_parts, cells))),
        "budgets": list(budgets),
        **origin(rows),
        "cells": [_encounter(cell) for cell in cells],
    }  # fmt: skip


def origin(rows: Sequence[Row]) -> dict[str, Any]:
    """Where rows were made, by which code, and when the last of them."""
    facts = [shard.provenance for row in rows for shard in row.shards]
    commits = {str(fact.get("commit", "unknown")) for fact in facts}
    return {
        "hardware": _each(f"{fact.get('hardware', '')}, {fact.get('device', '')}" for fact in facts),
        "packages": _each(_packages(fact) for fact in facts),
        "commits": _each(commit.removesuffix("-dirty") for commit in commits),
        "dirty": any(commit.endswith("-dirty") for commit in commits),
        "finished": max((str(fact.get("finished", "")) for fact in facts), default=""),
    }


def sealed(said: Mapping[str, Any]) -> bytes:
    """The file ``entry.json`` that says ``said``, with a hash of it at the end."""
    return write({**said, "sha256": sha256(write(said)).hexdigest()})


def write(said: Mapping[str, Any]) -> bytes:
    """Plain values as JSON that any terminal can show."""
    return (json.dumps(said, indent=1, allow_nan=False) + "\n").encode()


def read_entry(path: Path) -> tuple[Entry, dict[str, Any]]:
    """What the ``entry.json`` at ``path`` says, checked; and the same as plain values.

    Raises:
        StoreError: it is not there, no entry, or altered; in one line.
    """
    content = content_of(path, LARGEST)
    try:
        entry = Entry.model_validate_json(content)
        said: dict[str, Any] = json.loads(content)
        if write(said) != content:
            raise ValueError("is not written as Parry writes it, which leaves one way to say a thing")
        seal = said.pop("sha256")
        if seal != sha256(write(said)).hexdigest():
            raise ValueError("was altered after it was written; run bench submit again")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StoreError(f"{path} is no entry: {where + ': ' if where else ''}{first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} {error}") from None
    return entry, said


def entered(cells: Iterable[Cell]) -> str:
    """The one chain of defenses that is entered; others are there to compare with.

    Raises:
        ConfigError: there is none, or several.
    """
    names = _each(cell.defense_name for cell in cells if cell.defense)
    if len(names) != 1:
        raise ConfigError(f"an entry is of one defense, and here are {', '.join(names) or 'none'}")
    return names[0]


def entered_track(cells: Iterable[Cell]) -> str:
    """The track that cells are of together: gradients, where some see them, since whoever does can ask, too.

    Raises:
        ConfigError: no track holds them all.
    """
    tracks = {(track := track_of(cell)).name: track for cell in cells}
    for name, track in tracks.items():
        if all(other.accesses <= track.accesses | track.beside for other in tracks.values()):
            return name
    raise ConfigError(f"an entry is of one track, and here are {', '.join(sorted(tracks))}")


def _command(defense: str, track: str, suite: str, models: Sequence[str], limited: bool) -> str:
    """What makes this entry again, wherever its files lie."""
    words = ["bench", "submit", defense, "--track", track, "--suite", suite]
    words += [word for model in models for word in ("--model", model)]
    return shlex.join(words) + (" --limit N" if limited else "")


def _data(cell: Cell) -> dict[str, Any]:
    samples = sha256(json.dumps(list(cell.ids)).encode()).hexdigest()
    return {"dataset": cell.dataset.spec, "hash": cell.data_hash, "n": len(cell.ids), "samples_hash": samples}


def _parts(cell: Cell) -> list[dict[str, Any]]:
    kinds: list[tuple[str, Component]] = [("data set", cell.dataset), ("model", cell.model)]
    kinds += [("defense", part) for part in cell.defense] + [("attack", cell.attack)]
    return [
        {"kind": kind, "spec": part.spec, "version": str(part.version), "stage": part.stage,
         "traits": list(part.traits), "parameters": json.loads(json.dumps(dict(part.params), default=str))}
        for kind, part in kinds
    ]  # fmt: skip


def _encounter(cell: Cell) -> dict[str, Any]:
    return {
        "key": cell.key, "model": cell.model.spec, "defense": cell.defense_name, "attack": cell.attack.spec,
        "threat": repr(cell.threat), "seed": cell.seed, "n": len(cell.ids), "limited": cell.limited,
    }  # fmt: skip


def _packages(fact: Mapping[str, Any]) -> str:
    libraries = {name: version for name, version in fact.get("libraries", {}).items() if version}
    named = {"parry": fact.get("parry", ""), "python": fact.get("python", ""), **libraries}
    return ", ".join(f"{name} {version}" for name, version in named.items())


def _each(names: Iterable[str]) -> list[str]:
    return sorted(set(names))


def _unique(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({json.dumps(each, sort_keys=True): each for each in found}.values())
