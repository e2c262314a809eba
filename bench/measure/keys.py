"""What the work that cells share is called, finished or not: hashes of all that decides it."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from bench.plan.cell import Cell, Component
from bench.registry import attacks

if TYPE_CHECKING:
    from bench.plan.tasks import Task


def data_defense(cell: Cell) -> Component | None:
    """The defense of ``cell`` that releases training images, if there is one."""
    return next((component for component in cell.defense if component.stage == "data"), None)


def _images(cell: Cell) -> str:
    """What decides the images that ``cell`` trains on: their hash, and what that does not tell, how they are augmented.

    The latter goes without saying where a source that comes with Parry always gives the same.
    """
    source = cell.dataset
    told = {name: source.params[name] for name in ("flip", "shift") if source.params.get(name)}
    if not isinstance(source.version, int):  # a user's file, whose code says it
        told["version"] = source.version
    return f"{cell.data_hash} {json.dumps(told, sort_keys=True)}" if told else cell.data_hash


def release_key(cell: Cell) -> str:
    """A hash of all that decides the protected training images of ``cell``, which has a data defense."""
    defense = data_defense(cell)
    assert defense is not None
    recipe = {"data": _images(cell), "defense": asdict(defense), "seed": cell.seed}
    return _digest(recipe)


def learner_key(task: "Task") -> str:
    """The name of the unfinished work of a learner, and with a number behind it of a shard of an attack."""
    return task.cell.key[:32]


def recipe_key(task: "Task") -> str:
    """A hash of all that decides the weights of the network of ``task``."""
    cell = task.cell
    early = [defense for defense in cell.defense if defense.stage != "output"]
    recipe: dict[str, Any] = {
        "data": _images(cell),
        "model": asdict(cell.model),
        "weights": cell.weights_hash,
        "defenses": [asdict(defense) for defense in early],
        "learner": getattr(attacks.create("standard"), "version", 1),
        "seed": cell.seed if not task.architecture.trained else 0,
    }
    return _digest(recipe)


def fit_key(task: "Task") -> str:
    """A hash of all that decides what the attack of ``task``, which is fitted, comes to on other images.

    Whose network that is on, the attacked one or a source, makes no difference.
    """
    cell, attack = task.cell, task.cell.attack
    told = {name: value for name, value in attack.params.items() if name != "from"}
    return _digest({
        "attack": (attack.name, attack.version, told or attack.spec), "norm": cell.threat.norm,
        "eps": cell.threat.eps, "data": _images(cell), "seed": cell.seed,
        "networks": [recipe_key(owner) for owner in task.sources or (task,)],
    })  # fmt: skip


def defense_key(task: "Task") -> str:
    """A hash of all that decides what the output defense of ``task``, which is trained, has learned."""
    defense = next(part for part in task.cell.defense if part.stage == "output")
    unseen = getattr(task.chain.output, "serving", ())
    told = {name: value for name, value in defense.params.items() if name not in unseen}
    output = (defense.name, defense.version, told or defense.spec)
    return _digest({"output": output, "seed": task.cell.seed, "network": recipe_key(task)})


def _digest(recipe: Mapping[str, Any]) -> str:
    return sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:32]
