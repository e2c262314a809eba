"""Pictures as files: what is drawn, that the same figures give the same bytes, and that texts stay texts."""

import math
from dataclasses import replace

import pytest

from bench.oracle import NEVER
from bench.report.plots import draw
from bench.report.portrait import portrait
from bench.report.standings import tables
from tests.rows import learner, reached, row

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


class TestOverTheRadius:
    """Of minimum-norm attacks, one run gives accuracy at every radius from its own on."""

    def curve(self, found):
        (table,) = tables([found])
        return portrait(table.rows, table.lines).graphs[-1].curves[0]

    def test_who_is_beaten_further_out_stands(self):
        found = self.curve(reached([0, NEVER, NEVER, NEVER], [0.0, 0.1, 0.3, math.nan], eps=0.0))
        stand = dict(zip(found.at.round(3).tolist(), found.share.tolist(), strict=True))
        assert (stand[0.0], stand[0.3]) == (0.75, 0.25)
        assert found.share[(found.at > 0.101) & (found.at < 0.299)].tolist() == [0.5] * 31

    def test_it_begins_at_the_radius_of_the_run_where_searches_end(self):
        found = self.curve(reached([5, 7, NEVER, NEVER], [0.03, 0.09, 0.4, 0.2], eps=0.1))
        assert (found.at[0], found.share[0], found.share[-1]) == (0.1, 0.5, 0.0)

    def test_it_is_drawn_beside_that_over_queries(self, tmp_path):
        drawn = pictures([reached([5, NEVER], [0.03, 0.4], eps=0.1, defense="rnd")], tmp_path)
        assert {"x-queries.svg", "x-radius.svg"} <= set(drawn)
        assert b">radius (linf, pixel scale)<" in drawn["x-radius.svg"]

    def test_attacks_that_seek_no_distance_have_none(self, tmp_path):
        assert "x-radius.svg" not in pictures(served(), tmp_path)


@pytest.mark.parametrize("name", [MISCHIEF, "_hidden", "\x1b[2J", "half\ud800"])
def test_texts_of_others_are_drawn_as_they_are(tmp_path, name):
    text = pictures([row([1, NEVER], "rnd", name)], tmp_path, title=name)["x-attacks.svg"].decode()
    assert "<script>" not in text
    assert "\x1b" not in text
