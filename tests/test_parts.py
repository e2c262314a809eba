"""A run in parts, and the parts as one folder."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from bench.errors import ConfigError, StoreError
from bench.measure.pipeline import Pipeline
from bench.results.merge import merge
from bench.results.store import Store
from bench.run.part import Part
from bench.run.runner import run
from tests.runs import Quiet
from tests.test_runner import grid


def run_part(folder, tasks, part, networks):
    store, pipeline = Store(folder).open(), Pipeline(networks, torch.device("cpu"), 64)
    outcome = run(tasks, store, pipeline, 8, 64, Quiet(), True, Part.parse(part))
    return store, (outcome.ran, outcome.kept, outcome.failed)


@pytest.fixture(scope="module")
def tasks():
    return grid(attack=["noise", "square"], defense=["none"], n=20, queries=5, model=["cnn(width=4)"])


@pytest.fixture(scope="module")
def done(tasks, tmp_path_factory):
    """Six units in two cells: all in ``whole``, and dealt to four parts, of which the last two have one cell each."""
    folder = tmp_path_factory.mktemp("parts")
    parts = {"whole": "1/1", "1": "1/4", "2": "2/4", "3": "3/4", "4": "4/4"}
    return folder, {name: run_part(folder / name, tasks, part, folder / "networks")[1] for name, part in parts.items()}


def test_units_are_dealt_like_cards(done):
    folder, outcomes = done
    assert outcomes == {"whole": (2, 0, 0), "1": (2, 0, 0), "2": (2, 0, 0), "3": (1, 0, 0), "4": (1, 0, 0)}
    found = [sorted(path.stem for path in (folder / name).rglob("0*-0*.json")) for name in "1234"]
    first, second, third = "000000-000008", "000008-000016", "000016-000020"
    assert found == [sorted([first, second]), sorted([second, third]), [third], [first]]


def test_parts_merged_are_the_whole(tmp_path, done, tasks):
    folder, _ = done
    assert merge([folder / name for name in "1234"], tmp_path) == 6
    for task in tasks:
        a, b = Store(folder / "whole").row(task.cell), Store(tmp_path).row(task.cell)
        assert b.complete
        pd.testing.assert_frame_equal(a.records, b.records)
        assert b.figures.keys() == a.figures.keys()
    files = list((folder / "whole").rglob("*.parquet"))
    assert sum(path.name.endswith(".examples.parquet") for path in files) == len(files) // 2 == 6
    for path in files:
        assert (tmp_path / path.relative_to(folder / "whole")).read_bytes() == path.read_bytes()
    assert merge([folder / "1"], tmp_path) == 0  # again


def test_the_same_part_again_runs_nothing(done, tasks):
    folder, _ = done
    assert run_part(folder / "1", tasks, "1/4", folder / "networks")[1] == (0, 2, 0)


@pytest.mark.parametrize("text", ["", "3", "3/", "/3", "0/3", "4/3", "-1/3", "1.0/3", "1/3/5", "²/3", "a/b", "1/0"])
def test_no_such_part(text):
    with pytest.raises(ConfigError, match="part"):
        Part.parse(text)


def test_a_contradiction_is_refused_before_anything_is_written(tmp_path, done, tasks):
    folder, _ = done
    row = Store(folder / "4").row(tasks[1].cell)
    Store(tmp_path / "b").open().save(row.shards[0], row.records.assign(first_hit=5, forwards=5))
    with pytest.raises(StoreError, match=r"nothing was merged: .*different results"):
        merge([folder / "1", folder / "4", tmp_path / "b"], tmp_path / "all")
    assert not list((tmp_path / "all").rglob("*.json"))
    assert merge([folder / "4"], tmp_path / "all") == 1
    with pytest.raises(StoreError, match="nothing was merged"):
        merge([tmp_path / "b"], tmp_path / "all")  # against what is there


def test_a_damaged_file_is_refused_before_anything_is_written(tmp_path, done, tasks):
    folder, _ = done
    row = Store(folder / "4").row(tasks[1].cell)
    Store(tmp_path / "a").open().save(row.shards[0], row.records)
    next((tmp_path / "a").rglob("*.parquet")).write_bytes(b"cut")
    with pytest.raises(StoreError, match=r"nothing was merged: .*altered or cut short"):
        merge([folder / "1", tmp_path / "a"], tmp_path / "all")
    assert not list((tmp_path / "all").rglob("*.json"))
    with pytest.raises(StoreError, match="no results folder"):
        merge([tmp_path / "none"], tmp_path / "all")


def test_failed_shards_stay_behind(tmp_path, done, tasks):
    (shard,) = Store(done[0] / "4").row(tasks[1].cell).shards
    Store(tmp_path / "b").open().fail(replace(shard, error="lost"))
    assert merge([tmp_path / "b"], tmp_path / "all") == 0
