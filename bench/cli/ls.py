"""``bench ls``: what can be named in a suite."""

import json
from typing import Annotated, Any, Literal, get_args

import typer
from rich.table import Table

from bench.cli.console import console
from bench.errors import ConfigError
from bench.registry import REQUIRED, Registry, attacks, datasets, defenses, models, parameters
from bench.suite import suite_names

Kind = Literal["attacks", "defenses", "models", "datasets", "suites"]


def ls(
    kind: Annotated[str, typer.Argument(help="attacks, defenses, models, datasets or suites.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List what can be named in a suite."""
    if kind not in get_args(Kind):
        raise ConfigError(f"cannot list {kind!r}; use one of {', '.join(get_args(Kind))}")
    if kind == "suites":
        entries: list[dict[str, Any]] = [{"name": name, "title": title} for name, title in suite_names().items()]
    else:
        registries: dict[str, Registry[Any]] = {
            "attacks": attacks, "defenses": defenses, "models": models, "datasets": datasets,
        }  # fmt: skip
        entries = [_entry(registries[kind], name) for name in registries[kind].names()]
    if as_json:
        print(json.dumps(entries, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in entries[0]:
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for entry in entries:
        table.add_row(*(_cell(value) for value in entry.values()))
    console.print(table)


def _entry(registry: Registry[Any], name: str) -> dict[str, Any]:
    """What a component says of itself."""
    factory = registry.factory(name)
    family = name.endswith(":")
    takes = list((parameters(factory) or {}).items())[family:]  # a family's first argument follows the colon
    entry: dict[str, Any] = {"name": name}
    if registry is defenses:
        entry |= {"stage": factory.stage, "random": getattr(factory, "random", False)}  # type: ignore[attr-defined]
    if registry is attacks:
        norms = getattr(factory, "norms", ())
        entry |= {
            "access": "depends" if family else _declared(getattr(factory, "access", None)),
            "norms": [] if isinstance(norms, property) else sorted(norms),
        }
    about = (factory.__doc__ or "").splitlines()[0] if family and not hasattr(factory, "paper") else ""
    return {**entry, "parameters": dict(takes), "paper": about or _declared(getattr(factory, "paper", ""))}


def _declared(value: Any) -> str:
    """A class attribute; families decide only once they are named in full."""
    return "depends" if isinstance(value, property) else value or ""


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(key if item is REQUIRED else f"{key}={_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
