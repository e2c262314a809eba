"""What the authors of an entry say of themselves and their defense, from flags or a small TOML file."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from bench.errors import ConfigError, did_you_mean

LARGEST = 1 << 20  # bytes of a TOML file
Text = Annotated[str, Field(max_length=2000)]
Name = Annotated[str, Field(min_length=1, max_length=100)]


class About(BaseModel):
    """Free text, which nothing in an entry depends on; ``name`` and ``authors`` cannot be left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Name
    authors: Annotated[list[Name], Field(min_length=1, max_length=100)]
    paper: Text = ""
    link: Text = ""
    summary: Text = ""


def read_about(path: Path | None, given: Mapping[str, Any]) -> About:
    """What the TOML file at ``path`` says, flags that are ``given`` taking the place of its keys.

    Raises:
        ConfigError: no such file, no TOML, an unknown key, or a name or authors that nobody has given.
    """
    content = _toml(path) if path else {}
    try:
        return About.model_validate({**content, **{key: value for key, value in given.items() if value}})
    except pydantic.ValidationError as error:
        problem = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")  # a typing error explains
        key, where = str(problem["loc"][0]), f"{path}: " if path else ""
        if problem["type"] == "extra_forbidden":
            raise ConfigError(f"{where}{key}: unknown key; {did_you_mean(key, About.model_fields)}") from None
        if problem["type"] == "missing":
            keys = [str(each["loc"][0]) for each in error.errors() if each["type"] == "missing"]
            be, it = ("is", "it") if len(keys) == 1 else ("are", "them")
            flags = " and ".join(f"--{key}" for key in keys)
            told = f"{' and '.join(keys)} {be} missing; write {it} into --about FILE, or add {flags}"
            raise ConfigError(told) from None
        raise ConfigError(f"{where}{key} is {problem['input']!r}; {problem['msg'].lower()}") from None


def _toml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(
                f"{path} has {path.stat().st_size:,} bytes; name, authors, paper, link, summary need less"
            )
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}; name a TOML file with --about") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
