"""Who listens to a run whose time is taken."""

import time

from bench.plan.tasks import Task
from bench.results.store import Row
from bench.run.units import Unit


class Quiet:
    """Tells nobody how a run goes; notes when its first unit began."""

    begun: float | None = None

    def plan(self, samples: int) -> None: ...
    def start(self, task: Task, unit: Unit) -> None:
        self.begun = self.begun or time.perf_counter()

    def work(self, unit: Unit, done: int, total: int, what: str) -> None: ...
    def end(self, unit: Unit, samples: int) -> None: ...
    def finish(self, task: Task, row: Row, seconds: float) -> None: ...
    def wait(self, cells: int) -> None: ...
