"""What a worker does with a unit: it measures a shard, or makes what shards need, and gives what came of it away."""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.errors import ConfigError, StoreError
from bench.measure.inspection import Inspector
from bench.measure.measured import Measured
from bench.measure.needs import needs
from bench.measure.pipeline import Pipeline
from bench.plan.tasks import Task
from bench.results.examples import write_examples
from bench.results.provenance import provenance
from bench.run.units import Unit
from bench.system.claims import Held
from bench.system.interrupt import Stopped
from bench.system.parcel import pack
from bench.system.process_state import undisturbed
from bench.system.shared_code import SharedCode, shared_code
from bench.tracks import Tools, track_of

Hear = Callable[[int, int, str], None]  # so much is done, of so much, of what


class Finished(NamedTuple):
    """A shard that somebody else writes: the ``facts`` of it (fields of a :class:`bench.results.shards.Shard`) as plain
    values, its records as Parquet, its examples as a file holds them. A failed one has its error among the facts."""

    facts: Mapping[str, Any]
    records: bytes = b""
    examples: bytes | None = None


@dataclass(frozen=True)
class Setup:
    """All that workers in other processes are told once; they measure as the one that has it would."""

    tasks: Sequence[Task]
    networks: Path
    batch_size: int
    isolate: bool
    examples: bool

    @classmethod
    def of(cls, tasks: Sequence[Task], tools: Tools) -> "Setup":
        """What workers have to know to work on ``tasks`` as with ``tools``."""
        pipeline = tools.pipeline
        return cls(list(tasks), pipeline.folder, tools.batch_size, pipeline.isolate, tools.examples)

    def worker(self, device: torch.device, networks: Path | None = None) -> "Worker":
        """One that computes on ``device``, with ``networks`` as the folder of these where ours may not be there."""
        pipeline = Pipeline(networks or self.networks, device, self.batch_size, isolate=self.isolate)
        return Worker(self.tasks, Tools(pipeline, Inspector(device), self.batch_size, self.examples))

    def packed(self) -> bytes:
        """As bytes for :func:`bench.system.parcel.unpack`.

        Raises:
            ConfigError: a component cannot be sent to another process, or is a service.
        """
        for task in self.tasks:
            if task.service:
                raise ConfigError(f"{task.cell}: all of a service is asked at one desk; use --executor local")
        try:
            return pack(self)
        except Exception as error:  # pickling runs components' own code, which may raise anything
            raise ConfigError(
                f"{self._unfit()} cannot be sent to another process ({type(error).__name__}: {error}); let its "
                "components be what can be pickled, or use --executor local"
            ) from error

    def _unfit(self) -> str:
        for task in self.tasks:
            try:
                pack(task)
            except Exception:
                return str(task.cell)
        return "the run"


class Worker:
    """Holds what is slow to make for the next unit: data, network, what a model has shown."""

    def __init__(self, tasks: Sequence[Task], tools: Tools) -> None:
        self._tasks, self._tools = {task.cell.key: task for task in tasks}, tools

    def work(self, unit: Unit, keep: Callable[[Finished], None], hear: Hear) -> None:
        """Give what came of ``unit`` to ``keep``, which has it safe when it returns; unfinished work is dropped then.

        Of what is made, nothing comes but an error; it lies in the folder of the networks.

        Raises:
            Held: another process makes what it needs.
            StoreError, Stopped: nobody can go on.
        """
        task, began = self._tasks[unit.cell], time.perf_counter()
        try:
            with undisturbed(), shared_code() if task.cell.of_files else nullcontext() as code:
                if unit.makes:
                    need = next(need for need in needs(task) if need.key == unit.makes)
                    told = _steps if need.what == "defense" else _epochs
                    need.make(self._tools.pipeline, partial(told, hear))
                    _check(code, task)
                    return
                track = track_of(task.cell)
                each = task.cell.threat.query_budget or track.queries(task, 1) or 0
                count = _Count(hear, each, len(unit.positions))
                with track.measure(task, unit.positions, self._tools, count) as measured:
                    _check(code, task)
                    keep(self._finished(task, unit, measured, began))
        except (Held, Stopped, StoreError):
            raise
        except BaseException:  # whatever a component raises becomes a failed row, never a lost grid
            keep(Finished({**self._made(began), "error": traceback.format_exc()}))

    def _finished(self, task: Task, unit: Unit, measured: Measured, began: float) -> Finished:
        ids = [task.cell.ids[position] for position in unit.positions]
        records = measured.records.to_parquet(index=False)
        examples = None if measured.examples is None else write_examples(ids, measured.examples)
        facts = self._made(began, numerics=dict(measured.numerics), defense=_place(measured))
        facts |= {"figures": measured.figures, "findings": measured.findings, "training": measured.training}
        return Finished(facts, records, examples)

    def _made(self, began: float, **more: Any) -> dict[str, Any]:
        made = {**provenance(self._tools.pipeline.device), **{name: fact for name, fact in more.items() if fact}}
        return {"seconds": time.perf_counter() - began, "provenance": made}


@dataclass(frozen=True)
class _Count:
    """Tells how far a shard is, whose ``samples`` may cost ``budget`` queries each."""

    hear: Hear
    budget: int
    samples: int

    def epochs(self, done: int, total: int) -> None:
        _epochs(self.hear, done, total)

    def queries(self, first: int, settled: int) -> None:
        """``settled`` queries of the batch that starts at sample ``first`` of the shard."""
        self.hear(first * self.budget + settled, self.samples * self.budget, "queries settled")


def _check(code: SharedCode | None, task: Task) -> None:
    if code is not None:
        code.check(str(task.cell))


def _epochs(hear: Hear, done: int, total: int) -> None:
    hear(done, total, "epochs")


def _steps(hear: Hear, done: int, total: int) -> None:
    hear(done, total, "steps")


def _place(measured: Measured) -> str:
    """Where the output defense acted, in words; "" where there is none."""
    return {True: "in a process of its own", False: "in the process of the referee", None: ""}[measured.isolated]
