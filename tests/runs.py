"""Runs as processes that can be killed: ``python -m tests.runs kill FOLDER KILLS SEED`` and ``... share FOLDER RUNS``.

The processes are forks of this one, which has loaded everything and computed nothing, so that each starts at once. Says
what came of it as JSON.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from bench import scratch
from bench.measure.pipeline import Pipeline
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, expand
from bench.registry import load_plugins
from bench.results.store import Store
from bench.run import runner

SUITE = {"dataset": "digits", "n": 24, "eps": 0.15, "queries": 20, "model": ["cnn(width=4)"], "seed": [0]}
SERVED = {"attack": ["square"], "defense": ["ops + pgd-at(epochs=1, steps=1) + rnd(sigma=0.1)"]}
LEARNT = {"attack": ["standard(epochs=2)"], "defense": ["tap(epochs=1, steps=2, network=cnn(width=4))"]}


class Quiet:
    """A reporter that says nothing."""

    def plan(self, samples):
        pass

    def start(self, task, unit):
        pass

    def work(self, unit, done, total, what):
        pass

    def end(self, unit, samples):
        pass

    def finish(self, task, row, seconds):
        pass

    def wait(self, cells):
        pass


class Counting(Store):
    """Notes every shard that it is given in ``saved``, one letter for each."""

    def keep(self, shard, table, examples=None):
        super().keep(shard, table, examples)
        with (self.root.parent / "saved").open("a") as file:
            file.write("x")


def begin(tasks, folder):
    """A process that runs ``tasks`` in ``folder``."""
    if (child := os.fork()) != 0:
        return child
    code = 1
    try:
        store = Counting(folder).open()
        outcome = runner.run(tasks, store, Pipeline(folder / "networks", torch.device("cpu"), 256), 8, 256, Quiet())
        code = 3 if outcome.failed else 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def end(child):
    """Wait for a process; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(tasks, folder):
    """What has to be equal after every run: records and networks byte by byte, and what was measured once."""
    store = Store(folder)
    files = {
        str(path.relative_to(folder)): path.read_bytes().hex()
        for pattern in ("*/*/*/*.parquet", "networks/*.safetensors") for path in folder.glob(pattern)
    }  # fmt: skip
    rows = [store.row(task.cell) for task in tasks]
    figures = [{name: value for name, value in row.figures.items() if name != "cost"} for row in rows]
    return files, figures, [row.complete for row in rows]


def left_over(folder):
    """Files that only an unfinished run may have."""
    hidden = [path for path in folder.rglob(".*") if not path.name.startswith(".writable")]
    return [str(path.relative_to(folder)) for path in (*hidden, *folder.glob("networks/unfinished"))]


def kill(tasks, folder, kills, seed):
    """Kill runs at random moments and let others go on, until ``kills`` were killed and the last has ended."""
    moments = random.Random(seed)
    started = time.monotonic()
    assert end(begin(tasks, folder / "whole")) == 0
    duration = time.monotonic() - started
    whole = contents(tasks, folder / "whole")
    done, finished, different, left = 0, 0, 0, []
    while done < kills or finished == 0:
        place = folder / f"killed-{finished}"
        code = None
        while code != 0:
            child = begin(tasks, place)
            if done < kills:
                time.sleep(moments.uniform(0, duration / 2))
                os.kill(child, signal.SIGKILL)
            code = end(child)
            assert code in (0, -signal.SIGKILL), code
            done += code != 0
        finished += 1
        different += contents(tasks, place) != whole
        left += left_over(place)
    return {"killed": done, "finished": finished, "different": different, "left": left, "complete": all(whole[2])}


def share(tasks, folder, runs):
    """Several runs on one folder at the same time, one of which is killed; then what was done how often."""
    assert end(begin(tasks, folder / "alone" / "out")) == 0
    children = [begin(tasks, folder / "together" / "out") for _ in range(runs)]
    codes = [end(child) for child in children]
    alone, together = (contents(tasks, folder / name / "out") for name in ("alone", "together"))
    saved = [(folder / name / "saved").read_text() for name in ("alone", "together")]
    return {
        "codes": codes, "same": alone == together, "shards": len(saved[0]), "saved": len(saved[1]),
        "left": left_over(folder / "together" / "out"),
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    scratch.PAUSE, runner.PAUSE = 0.0, 0.05
    load_plugins()
    loader = Loader(None, None)
    cells = [task for more in (SERVED, LEARNT) for task in expand(load_suite(None, SUITE | more), loader)]
    what, where, *numbers = sys.argv[1:]
    print(json.dumps({"kill": kill, "share": share}[what](cells, Path(where), *map(int, numbers))))
