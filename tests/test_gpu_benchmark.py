"""The GPU benchmark runs every step to its end on a CPU, and what it leaves can be brought home."""

import importlib.util
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


def test_a_step_that_fails_says_why_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    gpu = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, gpu)
    spec.loader.exec_module(gpu)
    monkeypatch.setattr(gpu, "limit", lambda here: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", "--work", str(tmp_path), "--steps", "1,3"])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert "ZeroDivisionError" in said
    assert "there are no weights; step 2 makes them" in said


@pytest.mark.slow
def test_every_step_ends_and_a_second_call_goes_on(tmp_path):
    first = smoke(tmp_path, "--out", str(tmp_path / "out"), "--minutes", "60")
    assert "no time" not in first
    assert all(f"\n{number}. " in first for number in (1, 2, 3, 4, 5, 6))
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
