"""All samples as one table."""

import io
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from bench.cli.records import records as command
from bench.errors import ConfigError
from bench.report.tidy_records import as_csv, tidy_records
from bench.results.store import Store

BOARD = Path(__file__).parents[1] / "leaderboards" / "white-box-cifar10-small"


@pytest.fixture(scope="module")
def rows():
    return Store(BOARD).rows()[0]


def test_every_sample_is_one_line_with_its_setting(rows):
    table = tidy_records(rows)
    assert len(table) == sum(len(row.records) for row in rows) == 500 * len(rows)
    for row in rows:
        lines = table[table["key"] == row.cell.key]
        assert set(lines["defense"]) == {row.cell.defense_name}
        assert set(lines["eps"]) == {row.cell.threat.eps}
        assert lines["first_hit"].tolist() == row.records["first_hit"].tolist()


@pytest.mark.parametrize("name", ["all.csv", "all.parquet", "all.PARQUET"])
def test_a_file_holds_the_same(name, rows, tmp_path):
    command(BOARD, None, tmp_path / name)
    read = pd.read_csv if name.endswith("csv") else pd.read_parquet
    there, here = read(tmp_path / name), tidy_records(rows)
    assert list(there) == list(here)
    for column in ("key", "attack", "sample_id", "first_hit", "invalid"):
        assert there[column].tolist() == here[column].tolist()
    assert there["final_margin"].tolist() == pytest.approx(here["final_margin"].tolist())


def test_no_text_is_a_formula(rows):
    row = rows[0]
    attack, dataset = replace(row.cell.attack, spec="=1+1"), replace(row.cell.dataset, spec="\x1b[2J")
    cell = replace(row.cell, attack=attack, dataset=dataset)
    text = as_csv(tidy_records([replace(row, cell=cell)]))
    assert "\x1b" not in text
    assert set(pd.read_csv(io.StringIO(text))["attack"]) == {"'=1+1"}


def test_rows_of_two_kinds_share_a_table(rows):
    row = rows[0]
    other = replace(rows[1], columns=rows[1].records.drop(columns="best_margin"))
    table = tidy_records([row, other])
    assert table["best_margin"].isna().sum() == len(other.records)


@pytest.mark.parametrize(("style", "out", "naming"), [("json", None, "json"), (None, "all.xls", "xls"),
                                                      ("parquet", None, "--out")])  # fmt: skip
def test_what_cannot_be_written_is_one_line(style, out, naming, tmp_path):
    with pytest.raises(ConfigError, match=naming):
        command(BOARD, style, tmp_path / out if out else None)


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="holds no rows"):
        command(tmp_path, None, None)
