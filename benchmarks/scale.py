"""What it costs to hand out units, and what a second process gains.

    python benchmarks/scale.py
    python benchmarks/scale.py --data-dir DATA

First, the scheduler alone: 1,000 units of one sample each, whose workers answer at once with what was measured before.
The time of the processor and of the clock for each, all in all, and without what the store takes to write and read
them. With data, Square by one process and by two on the same shards, in turns: the ratio of their times.
"""

import argparse
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from quiet import Quiet

from bench.measure.pipeline import Pipeline
from bench.plan.cell import Cell
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, Task, expand
from bench.registry import load_plugins
from bench.results.shards import Shard
from bench.results.store import Row, Store
from bench.run.executor import Done, Listener, Pool
from bench.run.processes import Processes
from bench.run.runner import run
from bench.run.units import Unit
from bench.run.worker import Finished
from bench.tracks import Tools

CPU = torch.device("cpu")
CELLS, SAMPLES = 4, 250  # units of one sample
AIM = 2.0                # milliseconds for each
ROUNDS = 3


class Instant:
    """Two workers that know every answer; an :class:`bench.run.executor.Executor`, and its pool."""

    def __init__(self, answers: Mapping[Unit, Finished]) -> None:
        self._answers = answers
        self._at: dict[int, Unit] = {}
        self._order: deque[int] = deque()

    @contextmanager
    def open(self, tasks: Sequence[Task], tools: Tools) -> Iterator[Pool]:
        yield self

    def free(self) -> Sequence[int]:
        return [seat for seat in (0, 1) if seat not in self._at]

    def hand(self, seat: int, unit: Unit) -> None:
        self._at[seat] = unit
        self._order.append(seat)

    def wait(self, seconds: float, hear: Listener) -> None:
        seat = self._order.popleft()
        hear(seat, self._answers[self._at.pop(seat)])
        hear(seat, Done())

    def end(self, seat: int) -> str:
        raise AssertionError("none of them hangs")


class Timed(Store):
    """A store that knows how long it wrote and read: by the processor and by the clock."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.processor = self.clock = 0.0

    @contextmanager
    def _timing(self) -> Iterator[None]:
        processor, clock = time.process_time(), time.perf_counter()
        yield
        self.processor += time.process_time() - processor
        self.clock += time.perf_counter() - clock

    def keep(self, shard: Shard, table: bytes, examples: bytes | None = None) -> None:
        with self._timing():
            super().keep(shard, table, examples)

    def row(self, cell: Cell) -> Row:
        with self._timing():
            return super().row(cell)


NETWORK = """
import torch

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""


def scheduler() -> None:
    """The cost of a unit that costs nothing."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "network.py").write_text(NETWORK)
        suite = {
            "dataset": "digits", "model": f"{folder}/network.py:network", "n": SAMPLES, "eps": 0.1, "queries": 3,
            "attack": "noise", "seed": list(range(CELLS)),
        }  # fmt: skip
        tasks = expand(load_suite(None, suite), Loader(None, None))
        pipeline = Pipeline(folder / "networks", CPU, 256)
        measured = Store(folder / "measured").open()
        run(tasks, measured, pipeline, SAMPLES, 256, Quiet())
        answers = {unit: answer for task in tasks for unit, answer in cut(measured.row(task.cell))}
        rounds = []
        for number in range(ROUNDS):
            store = Timed(folder / f"again-{number}")
            store.open()
            processor, clock = time.process_time(), time.perf_counter()
            run(tasks, store, pipeline, 1, 256, Quiet(), executor=Instant(answers))
            spent = time.process_time() - processor, time.perf_counter() - clock
            rounds.append((*spent, spent[0] - store.processor, spent[1] - store.clock))
    print(f"{len(answers):,} units, milliseconds for each, medians of {len(rounds)} runs")
    for place, name in enumerate(("all, processor", "all, clock", "without the store, processor", "without, clock")):
        value = 1000 * statistics.median(each[place] for each in rounds) / len(answers)
        aimed = f" (aim: {AIM:g})" if place == 2 else ""
        print(f"  {name:30} {value:.2f}{aimed}")


def cut(row: Row) -> Iterator[tuple[Unit, Finished]]:
    """The samples of a row as units of their own."""
    (shard,) = row.shards
    facts = {"seconds": 0.0, "figures": shard.figures, "provenance": shard.provenance}
    for number in range(len(row.records)):
        table = row.records.iloc[number : number + 1].to_parquet(index=False)
        yield Unit(row.cell.key, number, number + 1), Finished(facts, table)


def pace(options: argparse.Namespace) -> None:
    """Square by one process and by two."""
    data_dir = options.data_dir.resolve()
    suite = {
        "dataset": "cifar10", "model": options.model, "n": options.images, "attack": "square",
        "queries": options.queries, "eps": 0.0,  # nobody falls, so that all shards cost the same
    }  # fmt: skip
    tasks = expand(load_suite(None, suite), Loader(data_dir, data_dir.parent / "models"))
    times: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as place:
        for number in range(options.repeats):
            for workers in times:
                folder, told = Path(place, f"{number}-{workers}"), Quiet()
                store, began = Store(folder).open(), time.perf_counter()
                pipeline = Pipeline(folder / "networks", CPU, 256)
                run(tasks, store, pipeline, options.images // 8, 256, told, executor=Processes([CPU] * workers))
                ended = time.perf_counter()
                assert store.row(tasks[0].cell).complete
                assert told.begun
                times[workers].append((ended - told.begun, ended - began))
    ratios = [[one[place] / two[place] for one, two in zip(times[1], times[2], strict=True)] for place in (0, 1)]
    first, whole = (statistics.median(each) for each in ratios)
    print(f"square, {options.images} images in 8 units, {options.queries} queries each, one thread a process: two "
          f"processes are {first:.2f} times as fast as one, start-up included {whole:.2f}")  # fmt: skip


def main() -> None:
    load_plugins()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="with CIFAR-10: Square by one process and by two, too")
    parser.add_argument("--model", default="resnet20(weights=cifar10_resnet20.safetensors)")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    scheduler()
    if options.data_dir:
        pace(options)


if __name__ == "__main__":
    main()
