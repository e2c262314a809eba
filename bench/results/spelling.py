"""One spelling for each component: ``pgd`` and ``pgd(steps=40)`` are the same attack, and rows may hold either."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from bench.catalogue import defaults
from bench.errors import ConfigError
from bench.plan.cell import Cell, Component
from bench.plan.pin import placeless
from bench.registry import Registry, attacks, datasets, defenses, models
from bench.spec import Spec, parse_chain

_UNKNOWN = object()  # a default that only a user's code could tell


class Spelling:
    """How ``cells`` are written: each of their components as it is written first."""

    def __init__(self, cells: Iterable[Cell]) -> None:
        self._first: dict[tuple[str, ...], Component] = {}
        for cell in cells:
            self.alike(cell)

    def alike(self, cell: Cell) -> Cell:
        """``cell`` in the words of the cells, a component that is new among them in its own; itself if it has these."""
        parts = {
            "dataset": self._known(datasets, cell.dataset),
            "model": self._known(models, cell.model),
            "defense": tuple(self._known(defenses, part) for part in cell.defense),
            "attack": self._known(attacks, cell.attack),
        }
        changed: dict[str, Any] = {name: part for name, part in parts.items() if part != getattr(cell, name)}
        return replace(cell, **changed) if changed else cell

    def _known(self, registry: Registry[Any], part: Component) -> Component:
        first = self._first.setdefault((registry.kind, *part.meaning(registry)), part)
        same = (first.spec, first.title) == (part.spec, part.title)
        return part if same else replace(part, spec=first.spec, title=first.title)


def is_spelt(parts: Sequence[Component], text: str, registry: Registry[Any]) -> bool:
    """Whether ``text`` is a way to write the chain ``parts``: what it leaves out, and what they do, are defaults."""
    try:
        specs = [placeless(spec) for spec in parse_chain(text)]
        return len(specs) == len(parts) and all(_is(*each, registry) for each in zip(parts, specs, strict=True))
    except ConfigError:  # no text that can be read, or a row that somebody else has written
        return False


def _is(part: Component, wanted: Spec, registry: Registry[Any]) -> bool:
    written = Spec.parse(part.title or part.spec)
    usual = defaults(registry, part.name)
    meant = {**usual, **written.args, **part.params}
    names = {*written.args, *wanted.args}
    asked = {name: wanted.args.get(name, usual.get(name, _UNKNOWN)) for name in names}
    return wanted.name == written.name and all(
        name in meant and _plain(meant[name]) == _plain(value) for name, value in asked.items()
    )


def _plain(value: object) -> object:
    """A sequence as JSON has it."""
    return list(value) if isinstance(value, tuple) else value
