"""What many results take to read: the tables and the site of a folder with many defenses under many attacks.

    python benchmarks/boards.py --entries 500 --attacks 10

Rows are made up, each of ``--n`` samples, with every column that a run writes. Each command is a process of its own, as
users start them; seconds are of the clock and of the processor, which differ where others share the machine, and where
the work is on several processors.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from bench.oracle import NEVER
from bench.plan.cell import Cell, Component
from bench.results.shards import Shard
from bench.results.store import Store
from bench.threat import Threat

BUDGET = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=500)
    parser.add_argument("--attacks", type=int, default=10)
    parser.add_argument("--n", type=int, default=200, help="samples of a row")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        began = time.perf_counter()
        fill(root / "rows", options.entries, options.attacks, options.n)
        print(f"{options.entries} entries x {options.attacks} attacks x {options.n} samples, "
              f"made in {time.perf_counter() - began:.0f} s")  # fmt: skip
        board, site = ["leaderboard", str(root / "rows")], ["site", str(root / "rows"), "--out", str(root / "site")]
        named = {"version": ["version"], "leaderboard": board, "leaderboard, remembered": board, "site": site}
        for name, command in named.items():
            clock, processor = timed(command)
            print(f"bench {name}: {clock:.1f} s, of the processor {processor:.1f} s", flush=True)
        size = sum(file.stat().st_size for file in (root / "site").rglob("*") if file.is_file())
        print(f"site: {size / 1e6:.0f} MB")


def fill(folder: Path, entries: int, attacks: int, n: int) -> None:
    """Rows of defenses that are better one after the other, and one without any defense."""
    store, rng = Store(folder).open(), np.random.default_rng(0)
    threat = Threat("linf", 8 / 255, "scores", BUDGET)
    for entry in range(entries):
        chain = (Component(f"rnd(sigma={entry / 1e4:g})", stage="output"),) if entry else ()
        for attack in range(attacks):
            met = Component(f"square(p_init={attack / 100 + 0.1:g})")
            cell = Cell(Component("digits"), Component("cnn"), chain, met, threat, ids=tuple(range(n)), seed=0)
            store.save(Shard(cell, 0, n, provenance={"hardware": "made up"}), records(n, entry / entries, rng))


def records(n: int, standing: float, rng: np.random.Generator) -> pd.DataFrame:
    """Of ``n`` samples about a share ``standing`` stands."""
    fell = rng.random(n) >= standing * 0.9
    hits = np.where(fell, rng.geometric(0.01, n).clip(1, BUDGET), NEVER)
    shares = {name: rng.random(n) for name in ("clean_confidence", "final_confidence", "probability_change")}
    both = [f"{when}_{name}" for when in ("clean", "final") for name in ("brier", "nll", "margin")]
    sizes = {name: rng.uniform(0, 0.03, n) for name in ("norm_linf", "norm_l2", "rmse")}
    none = dict.fromkeys(("ball_violation", "box_violation", "best_margin", "logit_change"), 0.0)
    same = dict.fromkeys(("seed", "y", "backwards", "clean_pred", "twin_pred"), 0)
    return pd.DataFrame({
        "sample_id": np.arange(n), "input_hash": "0" * 16, "attack_version": "1", "first_hit": hits, "invalid": False,
        "forwards": np.where(fell, hits, BUDGET), "final_pred": fell.astype(int), "clean_share": 1.0,
        "final_share": 1.0 - fell, "best_distance": np.nan, **same, **shares,
        **{name: 2 * rng.random(n) for name in both}, **sizes, **none,
    })  # fmt: skip


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds of the clock and of the processor that ``bench COMMAND`` takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "bench.cli", *command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
