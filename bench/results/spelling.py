"""One spelling for each component: ``pgd`` and ``pgd(steps=40)`` are the same attack, and rows may hold either."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from bench.plan.cell import Cell, Component
from bench.registry import Registry, attacks, datasets, defenses, models


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
