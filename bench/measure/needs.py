"""What has to be made before a cell can be measured: released images and trained networks, which cells share."""

from dataclasses import dataclass

from bench.measure.keys import recipe_key, release_key
from bench.measure.pipeline import Pipeline, Progress
from bench.plan.tasks import Task


@dataclass(frozen=True)
class Need:
    """The released images (``release``) or the trained network of ``task``, which cells of the same ``key`` share.

    ``after`` are the keys of what it is made of.
    """

    key: str
    task: Task
    release: bool
    after: frozenset[str] = frozenset()

    def make(self, pipeline: Pipeline, progress: Progress) -> None:
        """Make it, if it is not kept yet.

        Raises:
            Held: another process is at it.
        """
        (pipeline.released if self.release else pipeline.train)(self.task, progress)


def needs(task: Task) -> list[Need]:
    """All that ``task`` needs, in the order in which it can be made: of its sources, then its own."""
    found = [need for source in task.sources for need in needs(source)]
    made_of: frozenset[str] = frozenset()
    if task.chain.data is not None:
        found.append(Need(release_key(task.cell), task, release=True))
        made_of = frozenset({found[-1].key})
    if task.trains and task.attack.access != "training-data":  # a learner trains a network of its own
        found.append(Need(recipe_key(task), task, release=False, after=made_of))
    return found
