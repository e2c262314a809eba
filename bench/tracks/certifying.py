"""Cells whose certifier proves something of a network, measured."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pandas as pd

from bench.measure.certified import certify
from bench.measure.measured import Measured
from bench.plan.tasks import Task
from bench.system.process_state import seed_globals
from bench.tracks.track import Progress, Tools

AT_ONCE = 8  # images, whose draws fill batches and whose end is told


@contextmanager
def measure(task: Task, positions: Sequence[int], tools: Tools, progress: Progress) -> Iterator[Measured]:
    """The samples of a cell at ``positions``, certified; see :class:`bench.tracks.track.Track`."""
    tools.pipeline.train(task, progress.epochs)
    seed_globals(task.cell.seed)
    ids = [task.cell.ids[position] for position in positions]
    tables: list[pd.DataFrame] = []
    with tools.pipeline.bare(task) as network:
        for first in range(0, len(ids), AT_ONCE):
            tables.append(certify(task, network, ids[first : first + AT_ONCE], tools.pipeline.device))
            progress.queries(min(first + AT_ONCE, len(ids)), 0)
    training = tools.pipeline.curves(task) if positions[0] == 0 else ()
    yield Measured(pd.concat(tables, ignore_index=True), numerics=network.numbers, training=training)
