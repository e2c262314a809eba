"""Tracks: each kind of access has one, and nothing else asks what an attack sees to tell them apart."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest

import bench.tracks
from bench.entries.plan import DEFAULTS
from bench.plan.cell import Cell
from bench.plan.suite import TrackName, load_suite
from bench.plan.tasks import Loader, expand
from bench.report.leaderboard import render
from bench.report.marks import UNRANKED, marks_of
from bench.report.standings import tables
from bench.results.store import Row
from bench.threat import Access, Threat
from bench.tracks import TRACKS, track_of
from bench.tracks.query import Query
from tests.rows import learner, row

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("access", get_args(Access))
def test_every_access_belongs_to_one_track(access):
    assert sum(access in track.accesses for track in TRACKS) == 1


def test_suites_and_entries_name_every_track():
    assert get_args(TrackName) == tuple(track.name for track in TRACKS)
    assert set(DEFAULTS) == set(get_args(TrackName))


def test_cells_know_their_track():
    assert track_of(row([1]).cell).name == "query"
    assert track_of(learner(1, 2).cell).name == "data"


def test_reports_and_runs_ask_the_track():
    files = [file for room in ("report", "run", "cli", "results") for file in (ROOT / "bench" / room).rglob("*.py")]
    asking = [file.name for file in files if re.search(r"training-data|\.learns\b", file.read_text())]
    assert asking == []


@dataclass(frozen=True)
class Labels(Query):
    name: str = "labels"
    accesses: frozenset[Access] = frozenset({"labels"})

    def title(self, cell: Cell) -> str:
        return f"{super().title(cell)} · labels"


def test_a_third_track_is_a_few_lines(monkeypatch):
    asked = replace(TRACKS[0], accesses=frozenset({"scores"}))
    monkeypatch.setattr(bench.tracks, "TRACKS", (asked, Labels(), TRACKS[-1]))
    monkeypatch.setattr("bench.report.settings.TRACKS", bench.tracks.TRACKS)
    seen = Threat("linf", 8 / 255, "labels", 100)
    found = tables([learner(1, 4), row([5, 7], attack="rays", threat=seen), row([5, 9])])
    assert [table.title for table in found] == [
        "digits · cnn · linf 8/255", "digits · cnn · linf 8/255 · labels", "digits · cnn · released training data",
    ]  # fmt: skip


def test_whoever_has_gradients_can_ask_for_scores_too():
    """A white-box worst case without the query attacks would credit a defense for what hides gradients alone."""
    seen = Threat("linf", 8 / 255, "gradients", 40)
    asked, white_box = tables([row([5, 9, -1, 0]), row([-1, 3, 7, 0], attack="pgd", threat=seen)])
    assert [line.attack for line in asked.lines] == ["square"]
    assert [line.attack for line in white_box.lines] == ["worst of 2", "pgd", "square"]
    assert [list(line.shares) for line in white_box.lines] == [["clean", "robust", "final"]] * 3
    assert white_box.lines[0].shares["robust"].right.tolist() == [False] * 4
    assert white_box.lines[1].shares["robust"].right.tolist() == [True, False, False, False]


def test_queries_alone_make_no_white_box_table():
    assert [table.title for table in tables([row([5, 9])])] == ["digits · cnn · linf 8/255"]


def test_at_a_glance_a_white_box_table_names_attacks_alone():
    seen = Threat("linf", 8 / 255, "gradients", 40)
    rows = [row([5, -1], defense, attack, threat=seen) for defense in ("none", "pgd-at") for attack in ("pgd", "apgd")]
    glance = render(tables(rows), "md").partition("At a glance")[2].partition("\n\n")[2].partition("\n\n")[0]
    assert re.findall(r"worst|a?pgd(?!-)", glance) == ["worst", "apgd", "pgd"]
    assert "robust" not in glance


def test_an_attack_that_was_cut_short_is_marked_and_never_ranked():
    """A white-box table has no budgets: AutoAttack with 1,000 queries, two of its members unrun, stood there whole."""
    found = {}
    for queries in (1000, 8000):
        grid = {"dataset": "digits", "model": "cnn", "attack": ["autoattack", "square"], "n": 4, "queries": queries}
        seen, asked = (task.cell for task in expand(load_suite(None, grid), Loader(None, None)))
        found[queries] = [marks_of(Row(cell, records(4), ())) for cell in (seen, asked)]
    assert found == {1000: [{"curtailed"}, set()], 8000: [set(), set()]}
    assert "curtailed" in UNRANKED


def records(n: int) -> pd.DataFrame:
    return pd.DataFrame({"sample_id": range(n), "y": 0, "first_hit": -1, "final_pred": 0, "invalid": False})
