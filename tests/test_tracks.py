"""Tracks: each kind of access has one, and nothing else asks what an attack sees to tell them apart."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import pytest

import bench.tracks
from bench.plan.cell import Cell
from bench.report.standings import tables
from bench.threat import Access, Threat
from bench.tracks import TRACKS, track_of
from bench.tracks.query import Query
from tests.rows import learner, row

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("access", get_args(Access))
def test_every_access_belongs_to_one_track(access):
    assert sum(access in track.accesses for track in TRACKS) == 1


def test_cells_know_their_track():
    assert track_of(row([1]).cell).name == "query"
    assert track_of(learner(1, 2).cell).name == "data"


def test_reports_and_runs_ask_the_track():
    files = [file for room in ("report", "run", "cli", "results") for file in (ROOT / "bench" / room).rglob("*.py")]
    asking = [file.name for file in files if re.search(r"training-data|\.learns\b", file.read_text())]
    assert asking == []


@dataclass(frozen=True)
class Gradients(Query):
    name: str = "gradients"
    accesses: frozenset[Access] = frozenset({"gradients"})

    def title(self, cell: Cell) -> str:
        return f"{super().title(cell)} · gradients"


def test_a_third_track_is_a_few_lines(monkeypatch):
    first, *rest = TRACKS
    asked = replace(first, accesses=first.accesses - {"gradients"})
    monkeypatch.setattr(bench.tracks, "TRACKS", (asked, Gradients(), *rest))
    monkeypatch.setattr("bench.report.settings.TRACKS", bench.tracks.TRACKS)
    seen = Threat("linf", 8 / 255, "gradients", 100)
    found = tables([learner(1, 4), row([5, 7], attack="pgd", threat=seen), row([5, 9])])
    assert [table.title for table in found] == [
        "digits · cnn · linf 8/255", "digits · cnn · linf 8/255 · gradients", "digits · cnn · released training data",
    ]  # fmt: skip
