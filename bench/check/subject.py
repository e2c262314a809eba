"""What is to be checked: which kind of component a name or a user's file stands for."""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from bench.errors import ConfigError, did_you_mean
from bench.models import resolve
from bench.protocols import Stage
from bench.registry import Registry, attacks, defenses, models, parameters
from bench.service import declared_by
from bench.spec import Spec
from bench.system.user_code import named_file
from bench.threat import Norm

Kind = Literal[
    "attack", "learner", "certifier", "data defense", "training defense", "output defense", "model", "service"
]

FEWER = {"epochs": 1, "subspace_epochs": 1}  # of what trains, where nothing else is given
FEWER_DRAWS = {"n": 1000}  # of certifiers
FEWEST_STEPS = {**FEWER, "warm_up": 2, "steps": 2, "width": 2}  # of output defenses that are trained
FEWEST = {**FEWER, "checkpoints": 1, "steps": 2, "rounds": 1, "draws": 1, "adv_steps": 1}  # of data defenses


@dataclass(frozen=True)
class Subject:
    """A component to be checked; ``spec`` makes it, with smaller numbers than the user's where it trains."""

    spec: Spec
    kind: Kind
    component: Any
    norms: tuple[Norm, ...] = ()  # of an attack: those to be tried
    learned: dict[str, Tensor] = dataclasses.field(default_factory=dict, compare=False, repr=False)  # of a defense

    @property
    def file(self) -> str:
        """The user's file that it comes from; empty where it is registered."""
        named = named_file(self.spec.name)
        return str(named[0]) if named else ""

    def again(self) -> Any:
        """The component made anew."""
        return made(self.spec, registry_of(self.kind))


def registry_of(kind: Kind) -> Registry[Any]:
    """Where components of this kind are."""
    homes: dict[Kind, Registry[Any]] = {
        "attack": attacks, "learner": attacks, "certifier": attacks, "model": models, "service": models,
    }  # fmt: skip
    return homes.get(kind, defenses)


def recognise(spec: Spec) -> Registry[Any]:
    """The registry of what ``spec`` names, told by what it declares or is called with.

    Raises:
        ConfigError: nothing has this name, or the user's file does not import.
    """
    registries: tuple[Registry[Any], ...] = (defenses, attacks, models)
    if named_file(spec.name) is None:
        family = spec.name.partition(":")[0] + ":"
        for registry in registries:
            if spec.name in registry.names() or (":" in spec.name and family in registry.names()):
                return registry
        known = [name for registry in registries for name in registry.names()]
        hint = did_you_mean(spec.name, known, otherwise="bench ls tells the names, path/to/file.py:Name is your own")
        raise ConfigError(f"no defense, attack or model is named {spec.name!r}; {hint}")
    factory = Registry[Any]("component").factory(spec.name)  # of a file, whatever it is
    if isinstance(factory, nn.Module) or (isinstance(factory, type) and issubclass(factory, nn.Module)):
        return models
    if declared_by(factory):
        return models
    if hasattr(factory, "stage"):
        return defenses
    if hasattr(factory, "access") or hasattr(factory, "norms") or _arguments(factory) == 5:
        return attacks
    called_with = _names(factory)
    if called_with[:1] == ["classes"] or not isinstance(factory, type):
        return models
    return defenses


def subject(spec: Spec | str) -> Subject:
    """The component that ``spec`` names, ready to be tried.

    Raises:
        ConfigError: an unknown name, wrong arguments, or declarations that are missing or misspelt.
    """
    spec = Spec.parse(spec) if isinstance(spec, str) else spec
    registry = recognise(spec)
    if registry is models:
        component = resolve(spec)
        return Subject(spec, "service" if declared_by(component) else "model", component)
    component = made(spec, registry)
    kind = _kind(component, registry)
    smaller = _smaller(spec, registry, kind)
    component = component if smaller == spec else made(smaller, registry)
    norms = tuple(sorted(component.norms)) if kind == "attack" else ()
    return Subject(smaller, kind, component, norms)


def made(spec: Spec, registry: Registry[Any]) -> Any:
    """What ``spec`` names in ``registry``; of models, what gives the network."""
    return resolve(spec) if registry is models else registry.create(spec)


def _kind(component: Any, registry: Registry[Any]) -> Kind:
    if registry is attacks:
        others: dict[str, Kind] = {"training-data": "learner", "certificate": "certifier"}
        return others.get(component.access, "attack")
    kinds: dict[str, Kind] = {"data": "data defense", "training": "training defense", "output": "output defense"}
    assert set(kinds) == set(get_args(Stage))
    return kinds[component.stage]


def _smaller(spec: Spec, registry: Registry[Any], kind: Kind) -> Spec:
    """``spec`` with fewer of what it counts, where that would take long and the user has not said how many."""
    smaller = {"learner": FEWER, "training defense": FEWER, "data defense": FEWEST, "certifier": FEWER_DRAWS}
    factory = registry.factory(spec.name)
    fewer = FEWEST_STEPS if kind == "output defense" and hasattr(factory, "fit") else smaller.get(kind, {})
    known = parameters(factory) or {}
    return Spec(spec.name, {**{key: value for key, value in fewer.items() if key in known}, **spec.args})


def _names(factory: Callable[..., Any]) -> list[str]:
    """What instances of ``factory``, a class, or itself, a function, are called with."""
    called = getattr(factory, "__call__", None) if isinstance(factory, type) else factory  # noqa: B004 - its function
    try:
        names = list(inspect.signature(called).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return []
    return names[1:] if isinstance(factory, type) else names


def _arguments(factory: Callable[..., Any]) -> int:
    return len(_names(factory)) if isinstance(factory, type) and dataclasses.is_dataclass(factory) else 0
