"""What an entry has to meet: every grid of its suite, with the defense and without."""

from collections.abc import Sequence
from typing import NamedTuple

from bench.catalogue import declared
from bench.errors import ConfigError
from bench.plan.cell import Cell
from bench.plan.suite import Suite, load_suite, suite_names
from bench.registry import attacks
from bench.spec import parse_chain

DEFAULTS = {"query": "query-cifar10", "white-box": "white-box-cifar10", "certificate": "certified-cifar10-small",
            "data": "data-cifar10-small"}  # of tracks


def entry_suite(name: str, defense: str, models: Sequence[str]) -> Suite:
    """The suite ``name`` with ``defense`` in every grid, beside no defense where the suite has that.

    ``models`` are picked from the suite, or take the place of what it has; without any it is the suite's own.
    """
    if not parse_chain(defense):
        raise ConfigError("the defense is none; name the one that you enter")
    suite = load_suite(name, {"model": list(models) or None})
    grids = [
        grid.model_copy(update={"defense": [*(["none"] if "none" in grid.defense else []), defense]})
        for grid in suite.grid
    ]
    return suite.model_copy(update={"grid": grids})


def untried(cells: Sequence[Cell]) -> list[str]:
    """The attacks that the defenses of ``cells`` say know them, and that ``cells`` lack: each bars them from a rank."""
    named = dict.fromkeys(name for cell in cells for part in cell.defense for name in part.knows)
    return [name for name in named if not any(cell.attack.is_called(name) for cell in cells)]


class Met(NamedTuple):
    """An attack that a defense has to meet, or has met."""

    dataset: str
    model: str
    defense: str
    attack: str
    norm: str
    eps: float
    queries: int
    n: int
    seed: int
    numbers: tuple[str, bool]  # precision, and whether inputs have 8 bit

    def __str__(self) -> str:
        return (
            f"{self.model} | {self.defense} | {self.attack} | eps {self.eps:.4g}, {self.queries:,} queries, n {self.n}"
        )


def required(name: str, defense: str, models: Sequence[str]) -> set[Met] | None:
    """What an entry of the suite ``name`` has to have met; ``None`` of a suite that is not Parry's own."""
    if name not in suite_names():
        return None
    return set(asked(entry_suite(name, defense, models)))


def asked(suite: Suite) -> list[Met]:
    """Everything that ``suite`` asks to be met, in its order."""
    return [
        _comparable(Met(grid.dataset, model, chain, attacks.shortest(attack), grid.norm, grid.eps, grid.queries, grid.n,
                        seed, (grid.numerics, grid.quantise)))
        for grid in suite.grid
        for model in grid.model
        for chain in grid.defense
        for attack in grid.attack
        for seed in grid.seed
    ]  # fmt: skip


def met(cell: Cell) -> Met:
    """What a cell has met."""
    threat = cell.threat
    return _comparable(
        Met(cell.dataset.spec, cell.model.spec, cell.defense_name, cell.attack.spec, threat.norm, threat.eps,
            threat.query_budget or 0, len(cell.ids), cell.seed, (cell.numerics, cell.quantise))
    )  # fmt: skip


def _comparable(stated: Met) -> Met:
    """A learner and a certifier have no ball and no queries of their own."""
    apart = declared(attacks, stated.attack, "access", "") in ("training-data", "certificate")
    return stated._replace(norm="", eps=0.0, queries=0) if apart else stated
