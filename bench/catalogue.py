"""What every registered component says of itself, as plain values, for those who make none.

Tables and lists need a name, a stage or a default, and no network. Importing components means importing torch, which
takes longer than most tables do, so what they say is kept in the user's cache: a file whose name is the hash of all
code of the benchmark and of its plug-ins. A changed byte is another file, so what is read is what an import would say.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from bench import registry
from bench.errors import StoreError
from bench.registry import Registry, attacks, code_hash, datasets, defenses, load_plugins, models, parameters
from bench.rules import rules_of
from bench.system.files import cache_folder, keep_file

Value = TypeVar("Value")
REGISTRIES: tuple[Registry[Any], ...] = (attacks, defenses, models, datasets)
TOLD = ("access", "knows", "norms", "paper", "random", "stage")  # declarations that readers ask for
KEPT = 8  # files of other code, such as that of other checkouts


@dataclass(frozen=True)
class Facts:
    """What one component says of itself, whatever its arguments.

    ``parameters`` are those that users may give and their defaults, ``None`` where only the component itself can tell.
    ``declared`` holds what its class declares, and None for what depends on the parameters; ``about`` is its docstring,
    ``members`` what a family says of those whom it names.
    """

    parameters: Mapping[str, Any] | None = None
    declared: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    members: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def facts_of(factory: Callable[..., Any]) -> Facts:
    """What ``factory``, a class or a function that makes components, says."""
    declared = {name: getattr(factory, name) for name in TOLD if hasattr(factory, name)}
    declared["control"] = None if isinstance(getattr(factory, "rules", None), property) else rules_of(factory).control
    plain = {name: None if isinstance(value, property) else value for name, value in declared.items()}
    members = getattr(factory, "members", {})
    found = Facts(parameters(factory), plain, _about(factory), members if isinstance(members, dict) else {})
    return Facts(**json.loads(json.dumps(asdict(found), default=_plain)))  # the same, whether read or made


_of_registered = cache(facts_of)


def _plain(value: object) -> object:
    """``value``, which JSON does not have, as what it has."""
    return sorted(map(str, value)) if isinstance(value, frozenset | set) else str(value)


def _about(factory: Callable[..., Any]) -> str:
    """Its docstring; nothing where it has none of its own."""
    text = inspect.getdoc(factory) or ""
    return "" if text.startswith(f"{getattr(factory, '__name__', '')}(") else text  # what dataclasses write for one


def listed(which: Registry[Any]) -> Mapping[str, Facts]:
    """The components of one kind by name, families last."""
    if not load_plugins.cache_info().currsize:
        return _remembered()[which.kind]
    return {name: _of_registered(which.factory(name)) for name in which.names()}


def facts(which: Registry[Any], spec: str) -> Facts | None:
    """What is registered under the name in ``spec``, whose arguments are not read; nothing where nothing is."""
    name = spec.partition("(")[0]
    if not load_plugins.cache_info().currsize:
        return _remembered()[which.kind].get(name)
    factory = which.registered(name)
    return _of_registered(factory) if factory else None


def declared(which: Registry[Any], spec: str, attribute: str, default: Value, stored: Value | None = None) -> Value:
    """What the class that is registered under the name in ``spec`` declares; ``default`` where it does not.

    For readers of results: makes no component, reads no arguments and imports no user's file. What a row has
    ``stored`` counts only where no class says it, so nobody can say of ours what it is not.
    """
    known = facts(which, spec)
    value = stored if known is None else known.declared.get(attribute, default)
    value = stored if value is None else value  # which depends on the parameters
    return value if isinstance(value, type(default)) else default


def defaults(which: Registry[Any], spec: str) -> Mapping[str, Any]:
    """The defaults of what is registered under the name in ``spec``, by parameter; read as in :func:`declared`."""
    known = facts(which, spec)
    return (known.parameters or {}) if known else {}


def described(which: Registry[Any], spec: str) -> bool:
    """Whether parameters say all of what is registered under the name in ``spec``; read as in :func:`declared`."""
    known = facts(which, spec)
    return known is not None and known.parameters is not None


def problems() -> tuple[str, ...]:
    """What is wrong with plug-ins that do not import."""
    if not load_plugins.cache_info().currsize:
        _remembered()
    return load_plugins() if load_plugins.cache_info().currsize else ()  # what is kept had none


def keep() -> dict[str, dict[str, Facts]]:
    """Keep what all components say for commands to come; returns it by kind and name."""
    broken = load_plugins()
    found = {each.kind: dict(listed(each)) for each in REGISTRIES}
    if not broken:  # who mends a library changes no code of ours
        with suppress(StoreError, OSError):  # a cache that cannot be written costs time alone
            keep_file(_file(), json.dumps(found, default=asdict).encode())
            for old in sorted(_file().parent.glob("components-*.json"), key=lambda file: -file.stat().st_mtime)[KEPT:]:
                old.unlink()
    return found


def kept_hash() -> str:
    """A hash of all code and of what components say of themselves, for who imports none; empty where that is not kept,
    as where a plug-in does not import."""
    with suppress(OSError):
        if load_plugins.cache_info().currsize:  # those of this process may be more than the code of files says
            return ""
        path = _file()
        return sha256(path.name.encode() + path.read_bytes()).hexdigest()
    return ""


@cache
def _remembered() -> dict[str, dict[str, Facts]]:
    """The components of every kind: as they were kept, or else by importing them, which is kept for the next time."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # nothing there, or nothing of ours
        content = json.loads(_file().read_bytes())
        return {each.kind: {name: Facts(**told) for name, told in content[each.kind].items()} for each in REGISTRIES}
    return keep()


def _file() -> Path:
    """Named by all code, and by what is announced, of which one may have none."""
    told = repr((code_hash(), sorted((plugin.name, plugin.value) for plugin in registry.plugins())))
    return cache_folder() / f"components-{sha256(told.encode()).hexdigest()[:32]}.json"
