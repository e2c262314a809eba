"""The GPU benchmark runs every step to its end on a CPU, and what it leaves can be brought home."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.results.store import Store

ROOT = Path(__file__).parents[1]


def smoke(folder: Path, *more: str) -> str:
    command = [sys.executable, "benchmarks/gpu.py", "--smoke", "--work", str(folder / "work"), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout


@pytest.mark.slow
def test_every_step_ends_and_a_second_call_goes_on(tmp_path):
    first = smoke(tmp_path, "--out", str(tmp_path / "out"), "--minutes", "60")
    assert "left out" not in first
    assert all(f"\n{number}. " in first for number in (1, 2, 3, 4, 5))
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert all(file.is_file() and file.stat().st_size < 16 * 2**20 for file in files)
    rows, damaged = Store(tmp_path / "work" / "rows").rows()
    assert not damaged
    assert len(rows) >= 8
    assert all(row.complete and not row.errors for row in rows)
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["2 training"]["accuracy"] > 0.5

    brought = smoke(tmp_path / "elsewhere", "--resume", str(tmp_path / "out"), "--minutes", "60", "--steps", "1,2,3")
    assert "done before" in brought
    assert "images/s" not in brought
