"""The catalogues of figures and signs: values by hand, and everything that is made of them."""

import json
import math
from pathlib import Path

import pytest

from bench.oracle import NEVER
from bench.report.escape import in_latex
from bench.report.figures import BY_NAME, FIGURES, figures
from bench.report.figures_page import as_markdown
from bench.report.leaderboard import render
from bench.report.marks import MARKS, UNRANKED, legend, signs
from bench.report.standings import tables
from tests.rows import reached, row

ROOT = Path(__file__).parents[1]


class TestMedianDistance:
    def test_it_is_of_all_that_were_attacked(self):
        found = reached([0, NEVER, NEVER, NEVER], [0.0, 0.5, 0.2, 0.3])  # the first was wrong when clean
        assert figures(found)["median_distance"] == 0.3

    def test_what_fell_is_known_to_be_inside_the_ball_and_no_more(self):
        found = reached([5, 7, NEVER], [0.03, 0.09, 0.4])
        assert figures(found)["median_distance"] == 0.1
        assert "≤ 0.1000" in render(tables([found]), "md")

    def test_without_a_ball_no_search_ends_and_distances_are_what_was_found(self):
        found = reached([NEVER, NEVER, NEVER], [0.03, 0.09, 0.4], eps=0.0)
        assert figures(found)["median_distance"] == 0.09
        assert "| 0.0900" in render(tables([found]), "md")

    def test_where_fewer_than_half_were_beaten_at_any_distance_it_is_infinite(self):
        found = reached([NEVER, NEVER, NEVER], [0.4, math.nan, math.nan])
        assert figures(found)["median_distance"] == math.inf
        assert "| none " in render(tables([found]), "md")
        assert json.loads(render(tables([found]), "json"))[0]["median_distance"] is None

    def test_other_attacks_have_none_and_no_column_for_it(self):
        found = reached([5, NEVER], [math.nan, math.nan])
        assert "median_distance" not in figures(found)
        assert "distance" not in render(tables([found]), "md")


def test_every_figure_is_one_entry_with_all_that_is_said_of_it():
    assert len(BY_NAME) == len(FIGURES)
    for figure in FIGURES:
        assert all((figure.label, figure.unit, figure.needs, figure.sentence))
        assert figure.after in ("", *BY_NAME)


def test_a_row_without_what_a_figure_needs_has_none():
    assert figures(row([])) == {}
    assert "ece" not in figures(row([5, NEVER]))


def test_every_sign_is_one_entry():
    assert len({mark.sign for mark in MARKS}) == len({mark.name for mark in MARKS}) == len(MARKS)
    assert {"limited", "older"} <= UNRANKED
    assert UNRANKED.isdisjoint({"random", "control", "cut"})
    assert signs({"random", "limited"}) == "†~"
    assert legend({"older"}) == ["∘ made with an older version of a component; never ranked"]


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: mark.name)
def test_latex_can_print_every_sign(mark):
    assert in_latex(mark.sign).isascii()


def test_the_page_of_figures_is_made_of_the_catalogues():
    written = (ROOT / "docs" / "figures.md").read_text()
    assert written == as_markdown(), "run python -m bench.report.figures_page > docs/figures.md"
