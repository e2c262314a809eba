"""Cells whose learner trains on released data, measured."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bench.measure.learned import learn_released
from bench.measure.measured import Measured
from bench.plan.tasks import Task
from bench.system.process_state import seed_globals
from bench.tracks.track import Progress, Tools


@contextmanager
def measure(task: Task, positions: Sequence[int], tools: Tools, progress: Progress) -> Iterator[Measured]:
    """The test samples of a learner at ``positions``, as :class:`bench.tracks.track.Track` says."""
    ids = [task.cell.ids[position] for position in positions]
    released = tools.pipeline.released(task, progress.epochs)
    seed_globals(task.cell.seed)
    with tools.pipeline.learning(task, progress.epochs) as job:
        measured = learn_released(task, released, ids, job, task.build)
        tools.pipeline.check_data(task)
        yield measured  # unfinished work is kept until this is stored
