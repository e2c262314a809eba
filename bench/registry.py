"""Every component by name: the one door through which attacks, defenses, models and data sets come in."""

import dataclasses
import importlib
import importlib.util
import keyword
import pkgutil
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_type_hints

from bench.declarations import Declarations, fault, of_attack, of_defense
from bench.errors import ConfigError, did_you_mean
from bench.spec import Spec
from bench.system import user_code
from bench.system.interrupt import Stopped

if TYPE_CHECKING:
    from bench.protocols import Architecture, Attack, DatasetSource, Defense, Learner

GROUP = "bench.plugins"  # of entry points

T = TypeVar("T")
Factory = TypeVar("Factory", bound=Callable[..., Any])
Value = TypeVar("Value")
Names = tuple[dict[str, Callable[..., T]], dict[str, Callable[..., T]]]  # components, families

NAME = re.compile(r"[\w.-]+:?")
OURS = ("attacks", "defenses", "bench.models", "bench.data")  # plug-ins whose names no other can take


class Registry(Generic[T]):
    """The components of one kind by name.

    A component is a frozen dataclass of its hyper-parameters. Its class attributes say what it is (``access``,
    ``norms``, ``stage``, ``version``, ``paper``); its fields are the arguments that users may give.
    """

    def __init__(
        self, kind: str, declares: Callable[[object], Declarations] = lambda component: {}, plugged: bool = False
    ) -> None:
        """``kind`` is what errors call a component; ``declares`` tells what one, or its class, has to say of itself.

        ``plugged``: whoever asks for a name has all plug-ins imported first.
        """
        self.kind, self.declares, self.plugged = kind, declares, plugged
        self._factories: dict[str, Callable[..., T]] = {}
        self._families: dict[str, Callable[..., T]] = {}

    def __call__(self, name: str) -> Callable[[Factory], Factory]:
        """Register the decorated dataclass as ``name``; ``name`` ending in ":" registers a whole family.

        A family is called with what follows the colon as its first argument: ``torchattacks:PGD``.

        Raises:
            ConfigError: the name is taken or cannot be written in a suite, or the class does not declare what it must.
        """

        def add(factory: Factory) -> Factory:
            table = self._families if name.endswith(":") else self._factories
            home = getattr(sys.modules.get(factory.__module__), "__file__", None) or factory.__module__
            if not NAME.fullmatch(name) or name == "none":
                raise ConfigError(f"a {self.kind} cannot be named {name!r}; use letters, digits, _, . and - in {home}")
            if name in table:
                raise ConfigError(f"two {self.kind}s are named {name!r}; rename the one in {home}")
            if isinstance(factory, type) and (wrong := fault(factory, self.declares(factory))):
                raise ConfigError(f"{self.kind} {name!r} {wrong}, in {home}")
            table[name] = factory
            return factory

        return add

    def _plug_in(self) -> None:
        if self.plugged:
            load_plugins()

    def snapshot(self) -> "Names[T]":
        """What is registered now."""
        return dict(self._factories), dict(self._families)

    def restore(self, names: "Names[T]") -> None:
        """Make ``names`` all that is registered."""
        self._factories, self._families = names

    def names(self) -> list[str]:
        """The registered names, families last."""
        self._plug_in()
        return sorted(self._factories) + sorted(self._families)

    def factory(self, name: str) -> Callable[..., T]:
        """What makes the component ``name``, before its arguments.

        Raises:
            ConfigError: nothing has this name; the nearest one is offered.
        """
        self._plug_in()
        if name in self._factories:
            return self._factories[name]
        if (named := user_code.named_file(name)) is not None:
            return _from_file(*named, self.kind)
        prefix, colon, rest = name.partition(":")
        if colon and rest and prefix + ":" in self._families:
            family = self._families[prefix + ":"]
            return lambda **args: family(rest, **args)
        if name in self._families:
            return self._families[name]
        raise ConfigError(f"no {self.kind} is named {name!r}; {did_you_mean(name, self.names())}")

    def registered(self, name: str) -> Callable[..., T] | None:
        """What is registered as ``name``; nothing of users' files, nothing for what follows a family's colon."""
        self._plug_in()
        return self._factories.get(name) or self._families.get(name)

    def shortest(self, text: str) -> str:
        """``text`` without arguments that say the default, the others in the order and the types of their fields.

        Those that change no result (:func:`conduct`) are left out, too. So all ways to write one component are one. It
        is as it was where only the component knows its parameters.

        Raises:
            ConfigError: an unknown name or a value of the wrong type.
        """
        spec = Spec.parse(text)
        factory = self.factory(spec.name)
        known = parameters(factory) if isinstance(factory, type) else None
        if known is None:
            return text
        args = _typed(factory, spec.args, f"{self.kind} {spec.name!r}")
        said = [name for name in known if name in args and name not in _conduct(factory)]
        told = {name: _whole(args[name]) for name in said if args[name] != known[name]}
        return str(Spec(spec.name, told))

    def create(self, spec: Spec | str) -> T:
        """The component that ``spec`` describes, with its arguments checked against the types of its fields.

        Raises:
            ConfigError: an unknown name, an unknown argument, or a value of the wrong type.
        """
        self._plug_in()
        spec = Spec.parse(spec) if isinstance(spec, str) else spec
        if spec.name in self._families:
            raise ConfigError(f"{spec.name!r} is a family of {self.kind}s; add the name of one, as in {spec.name}NAME")
        factory = self.factory(spec.name)
        args = dict(spec.args)
        known = parameters(factory)
        if known is not None:
            missing = [key for key, default in known.items() if default is REQUIRED and key not in args]
            if missing:
                example = ", ".join(f"{key}=..." for key in missing)
                raise ConfigError(f"{self.kind} {spec.name!r} needs {', '.join(missing)}; write {spec.name}({example})")
            for key in args:
                if key not in known:
                    hint = did_you_mean(key, known, otherwise=f"it takes: {', '.join(known) or 'nothing'}")
                    raise ConfigError(f"{self.kind} {spec.name!r} has no parameter {key!r}; {hint}")
            args = _typed(factory, args, f"{self.kind} {spec.name!r}")
            args = {_in_code(key): value for key, value in args.items()}
        try:
            component = factory(**args)
            wrong = _fault(component, self.declares)
        except (ConfigError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.kind} {spec.name!r}: {error}") from error
        except (Stopped, KeyboardInterrupt):
            raise
        except BaseException as error:  # a user's code may raise anything, sys.exit among it
            raise ConfigError(f"{self.kind} {spec.name!r}: {type(error).__name__}: {error}") from error
        if wrong:
            raise ConfigError(f"{self.kind} {spec.name!r} {wrong}")
        return component


REQUIRED = "(required)"  # stands for the default of an argument that has none

attacks: "Registry[Attack | Learner]" = Registry("attack", of_attack, plugged=True)
defenses: "Registry[Defense]" = Registry("defense", of_defense, plugged=True)
models: "Registry[Architecture]" = Registry("model", plugged=True)
datasets: "Registry[DatasetSource]" = Registry("data set", plugged=True)


def parameters(factory: Callable[..., Any]) -> dict[str, Any] | None:
    """The arguments of a component and their defaults; ``None`` where only the component itself can tell."""
    if not dataclasses.is_dataclass(factory):
        return None
    return {_written(field.name): _default(field) for field in dataclasses.fields(factory) if field.init}


def added(default: Any) -> Any:
    """A parameter that a component got after rows of it were stored, neutral at ``default``.

    Where it has that value, :func:`describe` leaves it out, so the keys of the stored cells still hold.
    """
    return dataclasses.field(default=default, metadata={"added": True})


def conduct(default: Any) -> Any:
    """A parameter that says how a component goes about its work and changes no result: no cell keeps it."""
    return dataclasses.field(default=default, metadata={"conduct": True})


def _conduct(factory: Callable[..., Any]) -> set[str]:
    """The parameters of a component that change no result."""
    fields = dataclasses.fields(factory) if dataclasses.is_dataclass(factory) else ()
    return {_written(field.name) for field in fields if "conduct" in field.metadata}


def describe(component: Any) -> dict[str, Any]:
    """The values of the parameters of a component that decide its results, as a row stores them."""
    if not dataclasses.is_dataclass(component) or isinstance(component, type):
        return {}
    values = dataclasses.asdict(component)
    for field in dataclasses.fields(component):
        neutral = "added" in field.metadata and values[field.name] == field.default
        if neutral or "conduct" in field.metadata:
            del values[field.name]
    return {_written(name): value for name, value in values.items()}


def _written(field: str) -> str:
    """How users write a parameter: one that Python keeps for itself, such as ``from``, is ``from_`` in code."""
    return field[:-1] if field.endswith("_") and keyword.iskeyword(field[:-1]) else field


def _in_code(name: str) -> str:
    """The field of the parameter that users write as ``name``."""
    return f"{name}_" if keyword.iskeyword(name) else name


@lru_cache
def plugins() -> tuple[EntryPoint, ...]:
    """Every module that announces itself under ``bench.plugins``.

    A checkout that is not installed has announced nothing; then ours are those that stand in its ``pyproject.toml``.
    """
    announced = tuple(entry_points(group=GROUP))
    project = Path(__file__).parents[1] / "pyproject.toml"
    if announced or not project.is_file():
        return announced
    content = tomllib.loads(project.read_text(encoding="utf-8"))
    modules = content.get("project", {}).get("entry-points", {}).get(GROUP, {})
    return tuple(EntryPoint(name, module, GROUP) for name, module in modules.items())


@lru_cache
def load_plugins() -> tuple[str, ...]:
    """Import every plug-in; ours come in by the same door, and first.

    Returns:
        What is wrong with each that does not import; nothing of it is registered.
    """
    registries: tuple[Registry[Any], ...] = (attacks, defenses, models, datasets)
    problems = []
    for plugin in sorted(plugins(), key=lambda plugin: plugin.value not in OURS):
        before = [registry.snapshot() for registry in registries]
        try:
            plugin.load()  # importing runs the decorators
        except (Exception, SystemExit) as error:
            for registry, names in zip(registries, before, strict=True):
                registry.restore(names)
            cause = str(error) or type(error).__name__
            problems.append(f"plug-in {plugin.name} ({plugin.value}) does not load and is left out: {cause}")
    return tuple(problems)


@lru_cache
def code_hash() -> str:
    """A hash of the code of the benchmark and of every plug-in, committed or not."""
    packages = {"bench", *(plugin.module.partition(".")[0] for plugin in plugins())}
    digest = sha256()
    for package in sorted(packages):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin)
        for file in sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def import_all(package: str) -> None:
    """Import every module below ``package``, so that a component is one new file and no list to keep."""
    for module in pkgutil.walk_packages(sys.modules[package].__path__, prefix=f"{package}."):
        importlib.import_module(module.name)


def _fault(component: object, declares: Callable[[object], Declarations]) -> str:
    """Why what a factory made, perhaps in a user's file, cannot take part; empty where it can."""
    if not callable(component):
        return f"is a {type(component).__name__}; return something callable from it"
    return fault(component, declares(component))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def _typed(factory: Callable[..., Any], args: Mapping[str, Any], who: str) -> dict[str, Any]:
    """``args`` in the ranges and converted to the types of the dataclass's fields (so ``eps=1`` is a float)."""
    from bench.ranges import convert  # which brings pydantic, and who names no argument need not wait for it

    hints = get_type_hints(factory, include_extras=True)
    typed = {}
    for key, value in args.items():
        try:
            typed[key] = convert(value, hints[_in_code(key)])
        except ValueError as error:
            raise ConfigError(f"{who}: {key} is {value!r}; {error}") from None
    return typed


def _whole(value: Any) -> Any:
    """A float without a fraction as a whole number, which is how most people write it."""
    from bench.ranges import LARGEST  # as above

    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < LARGEST else value


def _from_file(file: Path, name: str, kind: str) -> Callable[..., Any]:
    """A component in the user's own file, ``path/to/file.py:Name``."""
    if not name:
        raise ConfigError(f"{str(file)!r} names a file; add the component in it, as in {file}:Name")
    if not file.is_file():
        raise ConfigError(f"no file {str(file)!r} for {kind} {file}:{name}; check the path")
    module = user_code.load(file)
    factory = getattr(module, name, None)
    if factory is None:
        raise ConfigError(f"{file} has no {name!r}; it defines {', '.join(_public(module))}")
    return factory  # type: ignore[no-any-return]


def _public(module: Any) -> list[str]:
    return [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
