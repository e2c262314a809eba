"""What it costs to hand out units, and what a second process gains.

    python benchmarks/scale.py
    python benchmarks/scale.py --data-dir DATA

First, the scheduler alone: 1,000 units of one sample each, whose workers answer at once with what was measured before.
The time of the processor and of the clock for each, all in all, and without what the store takes to write and read
them, and the memory of this process meanwhile. Then as many units of a cell by real workers, in processes and, where it
is installed, in Ray: what a unit costs all processes together, and their memory. With data, Square by one process, by
two, and by two workers of Ray on the same shards, in turns: the ratios of their times. To begin costs processes what a
command of its own would pay in the first round alone; later ones are forked from what that has loaded.
"""

import argparse
import importlib.util
import os
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
from bench.run.executor import Done, Executor, Listener, Pool
from bench.run.on_ray import OnRay
from bench.run.processes import Processes
from bench.run.runner import run
from bench.run.units import Unit
from bench.run.worker import Finished
from bench.tracks import Tools

CPU = torch.device("cpu")
CELLS, SAMPLES = 4, 250  # units of one sample
AIM = 2.0                # milliseconds for each
ROUNDS = 3
EARLY, LATE = 50, 250    # units after which clock, processor and memory are looked at
UNITS, WARM = 16, 4      # of Square; once so many have ended, all workers are at work
TICK = os.sysconf("SC_CLK_TCK")


def family() -> list[int]:
    """This process and all that it has begun, and these."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except OSError:  # it has ended
            continue
    found = [os.getpid()]
    for pid in found:
        found += parents.get(pid, [])
    return found


def processor() -> float:
    """The seconds of the processor that the family has taken, with those that have ended."""
    ticks = 0
    for pid in family():
        try:
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        except OSError:
            continue
    return ticks / TICK


def memory() -> float:
    """The MiB of the family; what several share is counted once, in parts."""
    pages = 0
    for pid in family():
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        pages += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return pages / 1024


class Noting(Quiet):
    """Notes clock and processor when the first unit begins and after so many have ended, and memory then, too."""

    def __init__(self, looks: Sequence[int] = ()) -> None:
        self.ended, self.looks, self.seen = 0, looks, dict.fromkeys(looks, (0.0, 0.0, 0.0))
        self.first = (0.0, 0.0)

    def start(self, task: Task, unit: Unit) -> None:
        if self.begun is None:
            self.first = time.perf_counter(), processor()
        super().start(task, unit)

    def end(self, unit: Unit, samples: int) -> None:
        self.ended += 1
        if self.ended in self.looks:
            self.seen[self.ended] = memory(), time.perf_counter(), processor()


def crews(processes: Sequence[int]) -> dict[str, Executor]:
    """Workers in so many processes, and two in Ray where that is installed."""
    found: dict[str, Executor] = {f"processes x {many}": Processes([CPU] * many) for many in processes}
    if importlib.util.find_spec("ray"):
        found["ray x 2"] = OnRay(None, 2, "cpu")
    return found


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
        rounds, notes = [], Noting([EARLY, len(answers)])
        for number in range(ROUNDS):
            store = Timed(folder / f"again-{number}")
            store.open()
            processor, clock = time.process_time(), time.perf_counter()
            run(tasks, store, pipeline, 1, 256, Quiet(), executor=Instant(answers))
            spent = time.process_time() - processor, time.perf_counter() - clock
            rounds.append((*spent, spent[0] - store.processor, spent[1] - store.clock))
        run(tasks, Store(folder / "noted").open(), pipeline, 1, 256, notes, executor=Instant(answers))
    print(f"{len(answers):,} units, milliseconds for each, medians of {len(rounds)} runs")
    for place, name in enumerate(("all, processor", "all, clock", "without the store, processor", "without, clock")):
        value = 1000 * statistics.median(each[place] for each in rounds) / len(answers)
        aimed = f" (aim: {AIM:g})" if place == 2 else ""
        print(f"  {name:30} {value:.2f}{aimed}")
    (early, *_), (late, *_) = notes.seen.values()
    print(f"  memory after {EARLY} units {early:.0f} MiB, after {len(answers):,} {late:.0f} MiB")


def workers() -> None:
    """What a unit costs all processes together that computes next to nothing."""
    print(f"{LATE} units of one sample by real workers, milliseconds for each of the last {LATE - EARLY}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "network.py").write_text(NETWORK)
        suite = {
            "dataset": "digits", "model": f"{folder}/network.py:network", "n": LATE, "eps": 0.1, "queries": 3,
            "attack": "noise",
        }  # fmt: skip
        tasks = expand(load_suite(None, suite), Loader(None, None))
        for name, executor in crews([2]).items():
            store, notes = Store(folder / name).open(), Noting([EARLY, LATE])
            run(tasks, store, Pipeline(folder / "networks", CPU, 256), 1, 256, notes, executor=executor)
            assert store.row(tasks[0].cell).complete
            early, late = notes.seen.values()
            clock, spent = (1000 * (late[place] - early[place]) / (LATE - EARLY) for place in (1, 2))
            print(f"  {name:14} {clock:.1f} by the clock, {spent:.1f} by the processor; memory of all "
                  f"after {EARLY} units {early[0]:.0f} MiB, after {LATE} {late[0]:.0f} MiB")  # fmt: skip


def cut(row: Row) -> Iterator[tuple[Unit, Finished]]:
    """The samples of a row as units of their own."""
    (shard,) = row.shards
    facts = {"seconds": 0.0, "figures": shard.figures, "provenance": shard.provenance}
    for number in range(len(row.records)):
        table = row.records.iloc[number : number + 1].to_parquet(index=False)
        yield Unit(row.cell.key, number, number + 1), Finished(facts, table)


def pace(options: argparse.Namespace) -> None:
    """Square by one process, by two, and by Ray."""
    data_dir = options.data_dir.resolve()
    suite = {
        "dataset": "cifar10", "model": options.model, "n": options.images, "attack": "square",
        "queries": options.queries, "eps": 0.0,  # nobody falls, so that all shards cost the same
    }  # fmt: skip
    tasks = expand(load_suite(None, suite), Loader(data_dir, data_dir.parent / "models"))
    crew = crews([1, 2])
    spent: dict[str, list[tuple[float, ...]]] = {name: [] for name in crew}
    print(f"square, {options.images} images in {UNITS} units, {options.queries} queries each, one thread a worker, in "
          f"turns; the units are the last {UNITS - WARM}")  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        for number in range(options.repeats):
            for name in list(crew)[:: 1 if number % 2 == 0 else -1]:  # nobody always after the same
                folder, told = Path(place, f"{number}-{name}"), Noting([WARM, UNITS])
                store, began = Store(folder).open(), (time.perf_counter(), processor())
                pipeline = Pipeline(folder / "networks", CPU, 256)
                run(tasks, store, pipeline, options.images // UNITS, 256, told, executor=crew[name])
                assert store.row(tasks[0].cell).complete
                (_, *warm), (_, *last) = told.seen.values()
                units = [end - at for at, end in zip(warm, last, strict=True)]
                starts = [first - at for at, first in zip(began, told.first, strict=True)]
                spent[name].append((*units, *starts, time.perf_counter() - began[0]))
                show(f"round {number + 1}, load {os.getloadavg()[0]:.1f}: {name}", spent[name][-1])
    print(f"medians of {options.repeats} runs each")
    for name, runs in spent.items():
        show(name, [statistics.median(each) for each in zip(*runs, strict=True)])
    alone, both = spent["processes x 1"], spent["processes x 2"]
    print(f"two processes are {ratio(alone, both, 0):.2f} times as fast as one, start and end included "
          f"{ratio(alone, both, 4):.2f}")  # fmt: skip
    if "ray x 2" in spent:
        ray = spent["ray x 2"]
        print(f"two workers of Ray take {ratio(ray, both, 0):.3f} of the time of two processes, start and end included "
              f"{ratio(ray, both, 4):.3f}; of the processor {ratio(ray, both, 1):.3f}")  # fmt: skip


def show(what: str, seconds: Sequence[float]) -> None:
    """Print what a run took."""
    clock, cpu, start, start_cpu, whole = seconds
    print(f"  {what:38} units {clock:.1f} s, of the processor {cpu:.1f}; to the first unit {start:.1f} s, "
          f"of the processor {start_cpu:.1f}; all {whole:.1f} s", flush=True)  # fmt: skip


def ratio(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]], place: int) -> float:
    """The median over the rounds of how much more one took."""
    return statistics.median(a[place] / b[place] for a, b in zip(one, other, strict=True))


def main() -> None:
    load_plugins()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="with CIFAR-10: Square by one process, by two and by Ray, too")
    parser.add_argument("--model", default="resnet20(weights=cifar10_resnet20.safetensors)")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    scheduler()
    workers()
    if options.data_dir:
        pace(options)


if __name__ == "__main__":
    main()
