"""Pictures as files: what is drawn, that the same figures give the same bytes, and that texts stay texts."""

from dataclasses import replace

import pytest

from bench.oracle import NEVER
from bench.report.plots import draw
from bench.report.portrait import portrait
from bench.report.standings import tables
from tests.rows import learner, row

MISCHIEF = "rnd(x=$\\frac{</text><script>1</script>)"


def pictures(rows, folder, styles=("svg",), title="rnd"):
    (table,) = tables(rows)
    found = portrait(table.rows, table.lines)
    return {path.name: path.read_bytes() for path in draw(found, title, "robust accuracy", folder / "x", styles)}


def served():
    hits = [1, 5, 20, 80, NEVER, NEVER]
    rows = [row(hits, "rnd", "square"), row([3, *hits[1:]], "rnd", "rays")]
    told = {"clean_pred": 0, "clean_confidence": 0.9, "final_confidence": 0.7}
    return [replace(each, columns=each.records.assign(**told)) for each in rows]


def test_every_picture_comes_in_every_format_and_the_same_twice(tmp_path):
    first = pictures(served(), tmp_path / "a", ("svg", "png", "pdf"))
    assert sorted(first) == [f"x-{name}.{style}" for name in ("attacks", "calibration", "queries")
                             for style in ("pdf", "png", "svg")]  # fmt: skip
    starts = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}
    assert all(content.startswith(starts[name[-3:]]) for name, content in first.items())
    assert pictures(served(), tmp_path / "b", ("svg", "png", "pdf")) == first


def test_the_svg_says_what_is_drawn(tmp_path):
    text = pictures(served(), tmp_path)["x-queries.svg"].decode()
    assert all(f">{word}<" in text for word in ("worst of 2", "rays", "square", "queries of each image", "rnd"))


def test_a_learner_has_bars_alone(tmp_path):
    assert list(pictures([learner(2, 10, "ops"), learner(3, 10, "ops", "cutout")], tmp_path)) == ["x-attacks.svg"]


@pytest.mark.parametrize("name", [MISCHIEF, "_hidden", "\x1b[2J", "half\ud800"])
def test_texts_of_others_are_drawn_as_they_are(tmp_path, name):
    text = pictures([row([1, NEVER], "rnd", name)], tmp_path, title=name)["x-attacks.svg"].decode()
    assert "<script>" not in text
    assert "\x1b" not in text
