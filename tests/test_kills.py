"""A run that is killed at any moment loses nothing and changes nothing, and runs that share a folder share the work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def processes(*arguments):
    """What :mod:`tests.runs` says; it starts from a process of its own, since this one has computed already."""
    command = [sys.executable, "-m", "tests.runs", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_runs_that_are_killed_end_as_one_that_was_not(tmp_path, kills):
    told = processes("kill", tmp_path, kills, 0)
    assert told["killed"] == kills
    assert told["complete"]
    assert told["different"] == 0
    assert told["left"] == []


def test_four_runs_on_one_folder_do_every_shard_once(tmp_path):
    told = processes("share", tmp_path, 4)
    assert told["codes"] == [0, 0, 0, 0]
    assert told["same"]
    assert told["saved"] == told["shards"] == 4
    assert told["left"] == []
