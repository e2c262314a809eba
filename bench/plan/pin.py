"""What a cell remembers of a component: what it is and does, and not where it lies."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.errors import ConfigError
from bench.plan.cell import Component
from bench.registry import describe
from bench.rules import rules_of
from bench.spec import Spec
from bench.system.user_code import joint_hash, named_file

TRAITS = ("random", "rescaled", "batch-dependent", "stateful", "service")  # attributes of components that tables mark


def pin(text: str, component: Any, *, hashed: bool = False) -> Component:
    """What a cell remembers of ``component``, which ``text`` names.

    Of a user's file, here or in an argument (``tap(network=mine.py:Net)``), that is its name and the hash of its code.

    Args:
        hashed: what the component reads has a hash in the cell, so of every path the name is enough.
    """
    spec, params = Spec.parse(text), describe(component)
    read = set() if hashed or not named_file(spec.name) else {value for value in spec.args.values() if _is_file(value)}
    files = code_files(spec) | {Path(value) for value in read}
    for value in params.values():
        files |= _named_in(value)
    version = getattr(component, "version", 1)
    if files:
        version = f"{version}+{joint_hash(files)}"
    traits = tuple(trait for trait in TRAITS if getattr(component, trait.replace("-", "_"), False))
    stage = getattr(component, "stage", "")
    control = rules_of(component).control and not getattr(component, "sources", ())

    def is_path(value: str) -> bool:
        return hashed or value in read

    shown = {key: _placeless(value, is_path) for key, value in params.items()}
    asks, knows = getattr(component, "most_queries", 0), getattr(component, "knows", ())
    return Component(str(placeless(spec, is_path)), version, shown, traits, stage, control, asks=asks, knows=knows)


def rewritten(component: Component, told: Mapping[str, str]) -> Component:
    """``component`` with other words for those of its parameters that are ``told`` and that it has."""
    spec = Spec.parse(component.spec)
    args = {name: told.get(name, value) for name, value in spec.args.items()}
    params = {name: told.get(name, value) for name, value in component.params.items()}
    return replace(component, spec=str(Spec(spec.name, args)), params=params)


def code_files(spec: Spec) -> set[Path]:
    """The users' files that ``spec`` names, in its arguments, too."""
    named = named_file(spec.name)
    return ({named[0]} if named else set()).union(*map(_named_in, spec.args.values()))


def placeless(spec: Spec, is_path: Callable[[str], bool] = lambda value: False) -> Spec:
    """``spec`` with the paths in it, and those of users' files, cut down to what they end in, as cells keep it."""
    named = named_file(spec.name)
    name = f"{named[0].name}:{named[1]}" if named else spec.name
    return Spec(name, {key: _placeless(value, is_path) for key, value in spec.args.items()})


def _placeless(value: Any, is_path: Callable[[str], bool]) -> Any:
    if _named_in(value):
        return str(placeless(Spec.parse(value), is_path))
    return Path(value).name if isinstance(value, str) and is_path(value) else value


def _named_in(value: object) -> set[Path]:
    """The users' files that ``value`` names, if it is the name of a component."""
    try:
        return code_files(Spec.parse(value)) if isinstance(value, str) else set()
    except ConfigError:
        return set()


def _is_file(value: object) -> bool:
    try:
        return isinstance(value, str) and Path(value).is_file()
    except (OSError, ValueError):  # too long, or with characters that no path has
        return False
