"""Suite files: which cells to run, in TOML."""

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bench.errors import ConfigError
from bench.numerics import Numerics
from bench.threat import Norm, parse_eps


def _listed(value: object) -> object:
    return value if isinstance(value, list) else [value]


Names = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]


class Grid(BaseModel):
    """A product of models, defense chains, attacks and seeds on ``n`` test images under one threat."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    n: Annotated[int, Field(ge=1)]
    model: Names
    defense: Names = ["none"]
    attack: Names
    norm: Norm = "linf"
    eps: Annotated[float, BeforeValidator(parse_eps)] = 8 / 255
    queries: Annotated[int, Field(ge=1)] = 1000
    seed: Annotated[list[int], BeforeValidator(_listed), Field(min_length=1)] = [0]
    numerics: Numerics = "fast"
    quantise: bool = False


class Suite(BaseModel):
    """A named list of grids; ``budgets`` are the query budgets that its table shows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str = ""
    budgets: list[Annotated[int, Field(ge=1)]] = []
    grid: Annotated[list[Grid], Field(min_length=1)]


def load_suite(name: str | None, overrides: Mapping[str, Any]) -> Suite:
    """Read the suite ``name`` (one of ours, or a file), its keys replaced by ``overrides`` in every grid.

    Keys at the top of the file are defaults for all of its grids. Without a name the overrides are the whole suite.

    Raises:
        ConfigError: no such suite, a file that is not TOML, an unknown key, or a value of the wrong type.
    """
    content: dict[str, Any] = {"grid": [{}]} if name is None else _read(name)
    shared = {key: content.pop(key) for key in list(content) if key in Grid.model_fields}
    grids = content.get("grid", [{}])
    if not isinstance(grids, list):
        raise ConfigError(f"suite {name}: 'grid' is a table; write [[grid]], with two brackets")
    given = {key: value for key, value in overrides.items() if value is not None}
    content["grid"] = [{**shared, **grid, **given} for grid in grids]
    content["name"] = Path(name).stem if name else "custom"
    try:
        return Suite.model_validate(content)
    except pydantic.ValidationError as error:
        raise ConfigError(f"suite {name or 'from the command line'}: {_first(error)}") from None


def suite_names() -> dict[str, str]:
    """The suites that come with the package, and their titles."""
    folder = resources.files("bench") / "suites"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): tomllib.loads(file.read_text()).get("title", "") for file in files}


def _read(name: str) -> dict[str, Any]:
    ours = suite_names()
    if name in ours:
        text = (resources.files("bench") / "suites" / f"{name}.toml").read_text()
    elif Path(name).is_file():
        text = Path(name).read_text()
    else:
        raise ConfigError(f"no suite or file is named {name!r}; suites: {', '.join(ours)}")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"suite {name} is not TOML: {error}") from None


def _first(error: pydantic.ValidationError) -> str:
    """The first thing that is wrong with a suite, in one line."""
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"]]
    if len(place) > 1 and place[0] == "grid":
        place[:2] = [f"grid {int(place[1]) + 1}"]
    where = ", ".join(place)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key; known: {', '.join(Grid.model_fields)}"
    if problem["type"] == "missing":
        return f"{where} is missing; add it to the file or as --{place[-1]}"
    cause = problem.get("ctx", {}).get("error")
    return f"{where} is {problem['input']!r}; {cause if cause else problem['msg'].lower()}"
