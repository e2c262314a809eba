"""Suite files: which cells to run, in TOML."""

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bench.errors import ConfigError, did_you_mean
from bench.precision import Numerics
from bench.ranges import Count, Whole
from bench.spec import LONGEST, Spec, parse_chain
from bench.threat import Norm, parse_eps

CHOSEN = ("model", "defense", "attack")  # keys of which a name picks what a suite has
FROM = "from"  # key of a grid for the networks that each of its attacks is made on in turn
OPEN = ("model", "defense")  # keys that a board leaves to those who enter


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


Seed = Annotated[Whole, Field(lt=2**32)]
Names = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]


class Grid(BaseModel):
    """A product of models, defense chains, attacks and seeds on ``n`` test images under one threat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    n: Count
    model: Names
    defense: Names = ["none"]
    attack: Names
    norm: Norm = "linf"
    eps: Annotated[float, BeforeValidator(parse_eps), Field(allow_inf_nan=False)] = 8 / 255
    queries: Count = 1000
    seed: Annotated[list[Seed], BeforeValidator(_listed), Field(min_length=1)] = [0]
    numerics: Numerics = "fast"
    quantise: bool = False


TrackName = Literal["query", "white-box", "certificate", "data"]  # of each of ``bench.tracks.TRACKS``


class Board(BaseModel):
    """What makes a suite a board, on which defenses stand beside each other for good.

    The ``track`` says how they are ranked. A change of anything that the suite fixes but its defenses is a new
    ``version``, and nothing of one stands beside another.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    track: TrackName
    version: Count


class Suite(BaseModel):
    """A named list of grids; ``budgets`` are the query budgets that its table shows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str = ""
    budgets: list[Count] = []
    board: Board | None = None
    grid: Annotated[list[Grid], Field(min_length=1)]

    @property
    def label(self) -> str:
        """What it is called: of a board with its version, ``query-cifar10 v1``."""
        return f"{self.name} v{self.board.version}" if self.board else self.name


def load_suite(name: str | None, overrides: Mapping[str, Any]) -> Suite:
    """Read the suite ``name`` (one of ours, or a file), its keys replaced by ``overrides`` in every grid.

    Of models, defenses and attacks, what the suite has is chosen by being named, by a name without arguments whatever
    the suite gives it; grids without any are left out. What the suite does not have takes the place of what it has.
    Keys at the top of the file are defaults for all of its grids; with ``from``, which files alone have, a grid makes
    each of its attacks on each of those networks. Without a name the overrides are the whole suite. A board of which
    anything but models and defenses is replaced is none any more.

    Raises:
        ConfigError: no such suite, a file that is not TOML, an unknown key, or a value of the wrong type.
    """
    content: dict[str, Any] = {"grid": [{}]} if name is None else _read(name)
    shared = {key: content.pop(key) for key in list(content) if key in (*Grid.model_fields, FROM)}
    grids = content.get("grid", [{}])
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        what = "a table" if isinstance(grids, dict) else repr(grids)
        raise ConfigError(f"suite {name}: 'grid' is {what}; write [[grid]], with two brackets")
    given = {key: value for key, value in overrides.items() if value is not None}
    if set(given) - set(OPEN):
        content.pop("board", None)
    merged = [_on_sources({**shared, **grid}, f"suite {name}: grid {number}") for number, grid in enumerate(grids, 1)]
    for key in CHOSEN:
        if name is not None and key in given:
            merged = _choose(merged, key, given.pop(key))
    content["grid"] = [{**grid, **given} for grid in merged]
    content["name"] = Path(name).stem if name else "custom"
    try:
        return Suite.model_validate(content)
    except pydantic.ValidationError as error:
        problem = _first(error)
        raise ConfigError(f"suite {name}: {problem}" if name else problem.removeprefix("grid 1, ")) from None


def _on_sources(grid: dict[str, Any], where: str) -> dict[str, Any]:
    """``grid`` with each of its attacks once for each network under ``from``, as ``ATTACK(from=NETWORK)``."""
    if FROM not in grid:
        return grid
    networks, attacks = _listed(grid[FROM]), _listed(grid.get("attack", []))
    if not networks or not all(isinstance(text, str) and text for text in networks):
        raise ConfigError(f"{where}, from is {grid[FROM]!r}; name one model or several that attacks are made on")
    if not attacks:
        raise ConfigError(f"{where} has a from and no attack; add the attacks that are made on {networks[0]}")
    made: list[object] = []
    for network in networks:
        for attack in attacks:
            if not isinstance(attack, str):  # told with every other key of a wrong type
                made.append(attack)
                continue
            spec = Spec.parse(attack)
            if FROM in spec.args:
                raise ConfigError(f"{where} has a from, and so has {attack}; keep one")
            made.append(str(Spec(spec.name, {**spec.args, FROM: network})))
    return {**{key: value for key, value in grid.items() if key != FROM}, "attack": made}


def _choose(grids: list[dict[str, Any]], key: str, wanted: list[str]) -> list[dict[str, Any]]:
    """``grids`` with those of their entries under ``key`` that ``wanted`` names.

    What no grid has stands beside what is picked, and where nothing is picked, in every grid.
    """
    listed = [[entry for entry in _listed(grid.get(key, "none")) if isinstance(entry, str)] for grid in grids]
    new = [name for name in wanted if not any(_names(name, entry) for entries in listed for entry in entries)]
    kept = [[entry for entry in entries if any(_names(name, entry) for name in wanted)] for entries in listed]
    return [{**grid, key: [*own, *new]} for grid, own in zip(grids, kept, strict=True) if own or not any(kept)]


def _names(name: str, entry: str) -> bool:
    """Whether ``name`` stands for ``entry`` of a suite: the same chain, with the same arguments or none."""
    try:
        ours, theirs = parse_chain(name), parse_chain(entry)
    except ConfigError:  # told when the cell is made
        return name == entry
    if [part.name for part in ours] != [part.name for part in theirs]:
        return False
    return all(not a.args or a == b for a, b in zip(ours, theirs, strict=True))


def suite_names() -> dict[str, str]:
    """The suites that come with the package, and their titles."""
    folder = resources.files("bench") / "suites"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    content = {file.name.removesuffix(".toml"): tomllib.loads(file.read_text(encoding="utf-8")) for file in files}
    return {name: suite.get("title", "") for name, suite in content.items()}


def _read(name: str) -> dict[str, Any]:
    ours = suite_names()
    if len(name) > LONGEST:
        raise ConfigError(f"suite {name[:40]!r}... has {len(name):,} characters; name a suite or a file")
    if name in ours:
        content = (resources.files("bench") / "suites" / f"{name}.toml").read_bytes()
    elif Path(name).is_file():
        content = Path(name).read_bytes()
    else:
        hint = did_you_mean(name, ours, otherwise=f"suites: {', '.join(ours)}")
        raise ConfigError(f"no suite or file is named {name!r}; {hint}")
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"suite {name} is not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"suite {name} nests too deeply; a suite holds keys and [[grid]] tables") from None


def _first(error: pydantic.ValidationError) -> str:
    """The first thing that is wrong with a suite, in one line."""
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")  # a typing error explains
    loc = problem["loc"]
    place = [str(part) for part in loc if isinstance(part, str)]
    if len(loc) > 1 and loc[0] == "grid":
        place[0] = f"grid {int(loc[1]) + 1}"
    where = ", ".join(place)
    if problem["type"] == "extra_forbidden":
        known = [*Grid.model_fields, FROM, *(key for key in Suite.model_fields if len(place) == 1)]
        return f"{where}: unknown key; {did_you_mean(place[-1], known)}"
    if problem["type"] == "missing":
        return f"{where} is missing; name a suite that has it, or add it as --{place[-1]}"
    cause = problem.get("ctx", {}).get("error")  # of our own checks, which say what came
    return str(cause) if cause else f"{where} is {problem['input']!r}; {problem['msg'].lower()}"
