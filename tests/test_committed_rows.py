"""The committed rows are whole, and the committed tables are made of them and of nothing else."""

import json
from dataclasses import astuple
from pathlib import Path

import pytest

from bench.report.leaderboard import render
from bench.report.outcomes import is_control
from bench.report.standings import tables
from bench.results.store import Row, Store, place
from bench.rules import NEVER

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path for path in (ROOT / "leaderboards").iterdir() if path.is_dir() and path.name != "published")
BUDGETS = (100, 1000)  # that bench leaderboard shows unless told otherwise


def passed_by(row: Row) -> set[int]:
    """The samples that its attack did not meet, since others had beaten them."""
    return set(row.cell.ids) - set(row.measured["sample_id"].tolist())


def fallen(rows: list[Row], row: Row) -> set[int]:
    """The samples that an attack has beaten on the model of ``row``, controls aside."""
    others = [each for each in rows if each.cell.setting == row.cell.setting and not is_control(each)]
    beaten = [each.measured for each in others if each.cell.defense_label == row.cell.defense_label]
    return {int(sample) for found in beaten for sample in found["sample_id"][found["first_hit"] != NEVER]}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
class TestCommittedRows:
    def test_every_row_is_complete_and_untouched(self, folder):
        rows, damaged = Store(folder).rows()
        assert not damaged
        assert rows
        for row in rows:
            assert row.complete or (row.partial and passed_by(row) <= fallen(rows, row))
            assert not row.errors
            assert not row.cell.limited
            assert len(row.cell.ids) >= 200
            assert all(not shard.provenance["commit"].endswith("-dirty") for shard in row.shards)

    def test_the_table_is_made_of_the_rows(self, folder):
        rows, _ = Store(folder).rows()
        table = render(tables(rows, BUDGETS), "md")
        assert (folder / "README.md").read_text().partition("<!-- tables -->\n")[2] == table + "\n"

    def test_every_row_lies_where_its_cell_says(self, folder):
        """Its key is that of what it says it is, computed anew, and a run finds it there."""
        store = Store(folder)
        for row in store.rows()[0]:
            assert [path.parent for path in folder.rglob(f"*{row.cell.key[:8]}/{row.shards[0].stem}.json")] == [
                folder / place(row.cell)
            ]
            missing = {row.cell.ids[position] for position in store.missing(row.cell)}
            assert missing == (passed_by(row) if row.partial else set())

    def test_the_stored_flags_are_those_of_the_rows(self, folder):
        rows, _ = Store(folder).rows()
        computed = {astuple(flag) for table in tables(rows) for flag in table.flags}
        stored = {tuple(flag.values()) for flag in json.loads((folder / "flags.json").read_text())}
        assert stored == computed


@pytest.mark.parametrize("name", ["query-cifar10", "data-cifar10-small"])
def test_the_findings_show_it_at_a_glance(name):
    table = (ROOT / "leaderboards" / name / "README.md").read_text()
    glance = table.partition("At a glance")[2].partition("\n\n")[2].partition("\n\n")[0]
    assert glance.startswith(("| defense", "| attack"))
    assert glance in (ROOT / "docs" / "findings.md").read_text()
