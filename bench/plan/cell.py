"""One cell of the grid: everything that decides its result, and the key that follows from it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from hashlib import sha256
from typing import Any

from bench.catalogue import declared, defaults, described
from bench.errors import ConfigError
from bench.precision import Numerics
from bench.registry import Registry, attacks, datasets, defenses, models
from bench.spec import Spec
from bench.threat import Threat

SHOWN = 6  # digits of the hash of a user's code


@dataclass(frozen=True)
class Component:
    """A component as a cell pins it: what the user wrote, every parameter it means, its version and its traits.

    The version of a user's own code is ``VERSION+HASH``, where the hash is of the code.
    ``traits`` are what a reader of its figures must know: ``random``, ``rescaled``, ``batch-dependent``,
    ``stateful``. ``stage`` is where a defense acts; ``control`` tells of an attack that it works on the undefended
    network, which no attacker of a service has. Who reads a row asks these and never the component itself, which may
    be anybody's code. Both are empty where nobody has said. ``title`` is what one has to write today for the same
    parameters, where a default has changed since. ``asks`` is how many queries an attack asks for where a sample never
    falls, 0 where it does not say. ``knows`` names the attacks that know a defense. None of the five is part of a
    cell's key.
    """

    spec: str
    version: int | str = 1
    params: Mapping[str, Any] = field(default_factory=dict)
    traits: tuple[str, ...] = ()
    stage: str = ""
    control: bool = False
    title: str = ""
    asks: int = 0
    knows: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What stands before its arguments, which are not read."""
        quote = self.spec[:1]
        return self.spec[1:].partition(quote)[0] if quote in ("'", '"') else self.spec.partition("(")[0]

    @property
    def label(self) -> str:
        """What tables call it: ``title`` or ``spec``, for a user's code with its hash, ``evil.py:Defense #ab12cd``."""
        _, plus, code = str(self.version).partition("+")
        name = self.title or self.spec
        return f"{name} #{code[:SHOWN]}" if plus else name

    @property
    def of_a_file(self) -> bool:
        """Whether it is code of a user's own file, or is given some."""
        return "+" in str(self.version)

    def meaning(self, registry: Registry[Any]) -> tuple[str, ...]:
        """What all its spellings have in common: the parameters, where its class in ``registry`` tells all by them."""
        told = self.params and described(registry, self.spec)
        params = json.dumps(self.params, sort_keys=True, default=str)
        return self.name if told else self.spec, str(self.version), params, *self.traits

    def is_called(self, text: str) -> bool:
        """Whether it has the name in ``text`` and all the arguments that stand there; it may have more."""
        try:
            wanted, said = Spec.parse(text), {**Spec.parse(self.spec).args, **self.params}
        except ConfigError:  # of a row that somebody else has written
            return False
        return wanted.name == self.name and all(said.get(name) == value for name, value in wanted.args.items())

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Component":
        """The component that was written as plain values."""
        return cls(**{**data, "traits": tuple(data["traits"]), "knows": tuple(data.get("knows", ()))})


@dataclass(frozen=True)
class Source:
    """A network that an attack makes examples on, other than the attacked one.

    ``weights_hash`` is empty where the recipe decides its weights: those of the standard training, and of the seed
    after the cell's, so that a model that is its own source is another network.
    """

    model: Component
    weights_hash: str = ""


UNKEYED = ("stage", "control", "title", "asks", "knows")  # fields of components that follow from the others


@dataclass(frozen=True)
class Cell:
    """A model, its chain of defenses and one attack on one set of samples.

    Two cells with equal fields give equal results (up to the rounding of the hardware), and ``key`` is a hash of all
    of them but ``limited``, which only remembers that the samples are fewer than the suite asks for, and what its
    components say for readers.

    ``sources`` are the networks on which the attack makes its examples where that is not the undefended one, and
    ``replays`` is the attack that makes them where it is not its own.
    """

    dataset: Component
    model: Component
    defense: tuple[Component, ...]
    attack: Component
    threat: Threat
    ids: tuple[int, ...]   # rows of the test split
    seed: int
    numerics: Numerics = "fast"
    quantise: bool = False
    data_hash: str = ""
    weights_hash: str = ""  # of the network before any training, or what a service declares; empty for a mere recipe
    limited: bool = False
    sources: tuple[Source, ...] = ()
    replays: Component | None = None

    @cached_property
    def key(self) -> str:
        """64 hexadecimal digits that name this cell and no other."""
        return _digest(self._keyed)

    @cached_property
    def meaning(self) -> str:
        """64 hexadecimal digits that cells have in common whose components are the same in other words.

        ``pgd`` and ``pgd(steps=40)`` mean the same while 40 is the default. What is planned is written in one way only,
        but rows of earlier versions are as somebody wrote them.
        """
        chain = [part.meaning(defenses) for part in self.defense]
        parts = {"dataset": self.dataset.meaning(datasets), "model": self.model.meaning(models), "defense": chain,
                 "attack": self.attack.meaning(attacks)}  # fmt: skip
        return _digest({**self._keyed, **parts})

    @cached_property
    def _keyed(self) -> dict[str, Any]:
        """All fields that decide a result, as plain values."""
        values = {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            **{name: _keyed(getattr(self, name)) for name in ("dataset", "model", "attack")},
            "defense": [_keyed(part) for part in self.defense],
            "threat": asdict(self.threat),
            "sources": [{"model": _keyed(each.model), "weights_hash": each.weights_hash} for each in self.sources],
            "replays": self.replays and _keyed(self.replays),
        }
        del values["limited"]
        for name in ("sources", "replays"):  # cells without are older than these fields
            if not values[name]:
                del values[name]
        return values

    @property
    def of_files(self) -> bool:
        """Whether any of its components is code of a user's own file."""
        parts = (self.dataset, self.model, *self.defense, self.attack, *(source.model for source in self.sources))
        return any(part.of_a_file for part in parts)

    @property
    def defense_name(self) -> str:
        """The chain as it is written in a suite."""
        return " + ".join(component.spec for component in self.defense) or "none"

    @property
    def defense_title(self) -> str:
        """The chain as one would write it today, where a default has changed since."""
        return " + ".join(component.title or component.spec for component in self.defense) or "none"

    @property
    def defense_label(self) -> str:
        """The chain as tables show it, which tells versions of a user's code apart."""
        return " + ".join(component.label for component in self.defense) or "none"

    @property
    def setting(self) -> str:
        """What cells of one table have in common: data set, model and threat."""
        place = f"{self.dataset.spec} · {self.model.spec}"
        return f"{place} · {self.threat}" + (" · 8-bit input" if self.quantise and self.threat.asks else "")

    def __str__(self) -> str:
        parts = (self.dataset.spec, self.model.spec, self.defense_name, self.attack.spec)
        return f"{' | '.join(parts)} | seed {self.seed}"

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file; read back by :meth:`from_json`."""
        return {**asdict(self), "ids": list(self.ids)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Cell":
        """The cell that ``as_json`` wrote; what follows from a name is taken from it where it is registered.

        Raises:
            KeyError, TypeError: the data is not a cell.
        """
        values = dict(data)
        for name in ("dataset", "model"):
            values[name] = Component.from_json(values[name])
        attack = values["attack"]
        values["sources"] = tuple(
            Source(Component.from_json(source["model"]), source["weights_hash"]) for source in values.get("sources", ())
        )
        if replays := values.get("replays"):
            values["replays"] = Component.from_json(replays)
        control = declared(attacks, attack["spec"], "control", False, bool(attack.get("control")))
        control &= not values["sources"]
        values["attack"] = Component.from_json({**attack, "control": control, "title": _title(attacks, attack)})
        values["defense"] = tuple(
            Component.from_json({**part, "stage": stage, "knows": known, "title": _title(defenses, part)})
            for part in values["defense"]
            for stage in [declared(defenses, part["spec"], "stage", "", part.get("stage"))]
            for known in [declared(defenses, part["spec"], "knows", [], list(part.get("knows", ())))]
        )
        values["threat"] = Threat(**values["threat"])
        values["ids"] = tuple(values["ids"])
        return cls(**values)


def _keyed(part: Component) -> dict[str, Any]:
    """The fields of a component that decide a result; they are shared, not copied."""
    return {name: value for name, value in vars(part).items() if name not in UNKEYED}


def _digest(fields: Mapping[str, Any]) -> str:
    return sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def _title(registry: Registry[Any], part: Mapping[str, Any]) -> str:
    """What to write today for the parameters of a stored component; empty where ``spec`` still means them."""
    spec, stored = str(part["spec"]), dict(part.get("params") or {})
    today = defaults(registry, spec)
    changed = [
        f"{name}={value}"
        for name, value in stored.items()
        if name in today and today[name] is not None and value != today[name] and f"{name}=" not in spec
    ]
    if not changed:
        return ""
    return f"{spec[:-1]}, {', '.join(changed)})" if spec.endswith(")") else f"{spec}({', '.join(changed)})"
