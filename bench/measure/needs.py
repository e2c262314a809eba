"""What has to be made before a cell can be measured, and what cells share of it: released images, trained networks, and
what attacks and output defenses are fitted to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bench.measure.keys import defense_key, fit_key, recipe_key, release_key
from bench.measure.pipeline import Pipeline, Progress
from bench.plan.tasks import Task
from bench.protocols import FittedAttack, FittedDefense


@dataclass(frozen=True)
class Need:
    """The released images of ``task``, its trained network or the fit of its output defense or of its attack.

    Cells of one ``key`` share it. ``after`` are the keys of what it is made of.
    """

    key: str
    task: Task
    what: Literal["release", "network", "defense", "fit"]
    after: frozenset[str] = frozenset()

    def make(self, pipeline: Pipeline, progress: Progress) -> None:
        """Make it, if it is not kept yet.

        Raises:
            Held: another process is at it.
        """
        makers: dict[str, Callable[[Task, Progress], object]] = {
            "release": pipeline.released, "network": pipeline.train, "defense": pipeline.fitted_defense,
            "fit": pipeline.fitted,
        }  # fmt: skip
        makers[self.what](self.task, progress)


def needs(task: Task) -> list[Need]:
    """All that ``task`` needs, in the order in which it can be made: of its sources, its own, then of what is fitted.
    """
    found = [need for owner in (*task.sources, task) for need in _of_network(owner)]
    networks = frozenset(need.key for need in found)
    if isinstance(task.chain.output, FittedDefense):
        found.append(Need(defense_key(task), task, "defense", after=networks))
    if isinstance(task.attack, FittedAttack):
        found.append(Need(fit_key(task), task, "fit", after=networks))
    return found


def _of_network(task: Task) -> list[Need]:
    """What has to be made before the network of ``task`` can be attacked."""
    found = []
    if task.chain.data is not None:
        found.append(Need(release_key(task.cell), task, "release"))
    if task.trains and task.attack.access != "training-data":  # a learner trains a network of its own
        made_of = frozenset(need.key for need in found)
        found.append(Need(recipe_key(task), task, "network", after=made_of))
    return found
