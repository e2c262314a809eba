"""The data track, run as a user runs it, on a few cells: noise protects nothing, a shortcut does."""

import pytest
from PIL import Image

from bench.cli.run import run
from bench.report import outcomes
from bench.report.standings import tables
from bench.report.stats import mcnemar
from bench.results.store import Store

DEFENSES = ["none", "data-noise(eps=32/255)", "ops(pixels=8)"]
LEARNERS = ["standard(epochs=10)", "jpeg(epochs=10)"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of the suite."""
    folder = tmp_path_factory.mktemp("data-digits")
    run("data-digits", defense=DEFENSES, attack=LEARNERS, out=folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    """The rows by defense and learner."""
    stored, damaged = Store(folder).rows()
    assert not damaged
    return {(row.cell.defense_name, row.cell.attack.spec): row for row in stored}


def test_noise_protects_nothing_and_a_shortcut_does(rows):
    for learner in LEARNERS:
        clean, noise, ops = (outcomes.tested(rows[name, learner]) for name in DEFENSES)
        assert clean.value > 0.9
        assert noise.value > clean.value - 0.05
        assert ops.value < 0.5
        assert mcnemar(ops.right, noise.right) < 1e-6


def test_every_row_says_how_far_the_learner_got_and_what_was_changed(rows):
    for (defense, _), row in rows.items():
        assert row.figures["peak_test_accuracy"] >= row.figures["last_test_accuracy"]
        assert row.figures["last_test_accuracy"] == pytest.approx(outcomes.tested(row).value, abs=1e-6)
        assert (row.figures["linf_max"] > 0) == (defense != "none")
        assert row.figures["changed_pixels_max"] <= (8 if defense == "ops(pixels=8)" else 64)


def test_there_is_a_picture_of_every_released_set(folder):
    noise, ops = sorted((folder / "sheets").iterdir())
    assert noise.name.startswith("digits-data-noise-eps-32-255-")
    assert ops.name.startswith("digits-ops-pixels-8-")
    for file in (noise, ops):
        with Image.open(file) as sheet:
            assert min(sheet.size) > 500


def test_the_best_learner_ranks_a_protection(rows):
    (table,) = tables(rows.values())
    best = [line for line in table.lines if line.attack.startswith("best of 2")]
    assert best[0].defense == "ops(pixels=8)"
    assert [line.rank for line in best] == [1, 2, 2]
    assert all("clean" in line.extra for line in best)
