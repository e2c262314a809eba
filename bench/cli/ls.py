"""``bench ls``: what can be named in a suite."""

import json
import re
from importlib import resources
from typing import Annotated, Any, Literal, get_args

import typer
from rich.padding import Padding
from rich.text import Text

from bench.catalogue import Facts, facts_of, listed
from bench.cli.console import console
from bench.cli.terminal_table import columns, fit
from bench.errors import ConfigError
from bench.plan.suite import suite_names
from bench.registry import REQUIRED, Registry, attacks, datasets, defenses, models
from bench.report.escape import in_terminal

Kind = Literal["attacks", "defenses", "models", "datasets", "suites"]
REGISTRIES: dict[str, Registry[Any]] = {
    "attacks": attacks, "defenses": defenses, "models": models, "datasets": datasets,
}  # fmt: skip


def ls(
    kind: Annotated[str | None, typer.Argument(help="attacks, defenses, models, datasets or suites.")] = None,
    name: Annotated[str | None, typer.Argument(help="One of them: what it is, takes and is called with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List what can be named in a suite, or tell of one name."""
    if kind is not None and kind not in get_args(Kind):
        raise ConfigError(f"cannot list {kind!r}; use one of {', '.join(get_args(Kind))}")
    if name is not None:
        _tell(str(kind), name, as_json)
        return
    if kind is None:
        entries = [{"kind": each, "names": len(names := _names(each)), "such as": names[0]} for each in get_args(Kind)]
    elif kind == "suites":
        entries = [{"name": name, "title": title} for name, title in suite_names().items()]
    else:
        entries = [
            entry for name, facts in listed(REGISTRIES[kind]).items()
            for entry in (_entry(kind, name, facts), *_members(name, facts))
        ]  # fmt: skip
    if as_json:
        print(json.dumps(entries, indent=1))
        return
    names = list(entries[0])
    told_apart = "parameters" in names and not fit(names, _lines(entries, names), console.width)
    if told_apart:
        names.remove("parameters")
    console.print(columns(names, _lines(entries, names), console.width))
    if told_apart:
        console.print()
        console.print(f"bench ls {kind} NAME tells the parameters of one", style="dim")
    if kind is None:
        console.print()
        console.print("bench ls KIND lists them, bench ls KIND NAME tells of one", style="dim")


def _lines(entries: list[dict[str, Any]], names: list[str]) -> list[list[str]]:
    return [[_cell(entry[name]) for name in names] for entry in entries]


def _names(kind: str) -> list[str]:
    return list(suite_names() if kind == "suites" else listed(REGISTRIES[kind]))


def _tell(kind: str, name: str, as_json: bool) -> None:
    """What one name stands for, with its parameters and a command that uses it."""
    if kind == "suites":
        if name not in suite_names():
            raise ConfigError(f"no suite is named {name!r}; suites: {', '.join(suite_names())}")
        print((resources.files("bench") / "suites" / f"{name}.toml").read_text(encoding="utf-8"), end="")
        return
    facts = listed(REGISTRIES[kind]).get(name) or facts_of(REGISTRIES[kind].factory(name))  # of a file, or a mistake
    entry, about, example = _entry(kind, name, facts), _unmarked(facts.about), _example(kind, name, facts)
    if as_json:
        print(json.dumps({**entry, "about": about, "example": example}, indent=1))
        return
    console.print(Text(in_terminal(name), style="bold"))
    told = {key: value for key, value in entry.items() if key not in ("name", "parameters") and value not in ("", [])}
    for key, value in told.items():
        console.print(f"{key}: {_cell(value)}", soft_wrap=True)
    if about:
        console.print()
        for indent, text in _paragraphs(about):
            console.print(Padding(Text(in_terminal(text)), (0, 0, 0, indent)))
    if entry["parameters"]:
        console.print()
        table = columns(
            ("parameter", "default"),
            [(key, _written(default)) for key, default in entry["parameters"].items()],
            console.width,
        )
        console.print(table)
    console.print()
    console.print(example, soft_wrap=True, style="cyan")


def _unmarked(text: str) -> str:
    return re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "")


def _paragraphs(about: str) -> list[tuple[int, str]]:
    """The paragraphs of a docstring and their indents, to be broken at the width of the terminal."""
    found: list[tuple[int, str]] = []
    for line in about.splitlines():
        text = line.strip()
        indent, (above, before) = len(line) - len(line.lstrip()), found[-1] if found else (0, "")
        goes_on = (indent == above == 0 and not before.endswith(":")) or indent > above > 0
        if text and before and goes_on and not text.startswith("- "):
            found[-1] = above, f"{before} {text}"
        else:
            found.append((indent, text))
    return found


def _example(kind: str, name: str, facts: Facts) -> str:
    """A command that uses ``name``, with its first parameter written out."""
    takes = {} if name.endswith(":") else facts.parameters or {}
    required = [f"{key}=..." for key, default in takes.items() if default == REQUIRED]
    optional = [f"{key}={_written(value)}" for key, value in takes.items() if isinstance(value, int | float | str)]
    inside = ", ".join(required or [each for each in optional if not each.endswith(f"={REQUIRED}")][:1])
    spec = f"{name}NAME" if name.endswith(":") else f"{name}({inside})" if inside else name
    option = f"--{kind.removesuffix('s')} '{spec}'"
    if kind == "datasets":
        return f"bench run {option} --n 200 --model cnn --attack square"
    if kind == "models":
        return f"bench run --dataset cifar10 --data-dir DATA --n 200 {option} --attack square"
    if kind == "defenses":
        attack = "standard" if facts.declared.get("stage") == "data" else "square"
        return f"bench run --dataset digits --n 200 --model cnn {option} --attack {attack}"
    norms = _norms(facts)
    threat = "" if "linf" in norms or not norms else f" --norm {norms[0]} --eps 0.5"
    return f"bench run --dataset digits --n 200 --model cnn {option}{threat}"


def _entry(kind: str, name: str, facts: Facts) -> dict[str, Any]:
    """What a component says of itself."""
    family = name.endswith(":")
    takes = list((facts.parameters or {}).items())[family:]  # a family's first argument follows the colon
    entry: dict[str, Any] = {"name": name}
    if kind == "defenses":
        entry |= {"stage": _declared(facts, "stage"), "random": facts.declared.get("random", False)}
    if kind == "attacks":
        entry |= {"access": "depends" if family else _declared(facts, "access"), "norms": _norms(facts)}
    about = _unmarked(facts.about).partition("\n")[0] if family and "paper" not in facts.declared else ""
    return {**entry, "parameters": dict(takes), "paper": about or _declared(facts, "paper")}


def _norms(facts: Facts) -> list[str]:
    """The norms that an attack declares; none where only the attack itself can tell."""
    return list(facts.declared.get("norms") or ())


def _members(name: str, facts: Facts) -> list[dict[str, Any]]:
    """What a family says of those whom it names, usable or not."""
    return [{"name": name + member, **says} for member, says in sorted(facts.members.items())]


def _declared(facts: Facts, attribute: str) -> str:
    """A class attribute; families decide only once they are named in full."""
    return "depends" if facts.declared.get(attribute, "") is None else facts.declared.get(attribute, "")


def _written(value: Any) -> str:
    """A parameter's value as a suite writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return '""' if value == "" else _cell(value)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(key if item == REQUIRED else f"{key}={_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
