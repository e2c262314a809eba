"""The query track, run as a user runs it: what each defense holds against, and what brings it down."""

import json

import numpy as np
import pytest

from bench.cli.run import run
from bench.report.flags import flags
from bench.report.outcomes import clean, column, robust
from bench.report.stats import mcnemar
from bench.results.store import Store

pytestmark = pytest.mark.slow

N = 40  # of the suite's 200 images


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of the suite by defense and attack, those in the largest ball apart."""
    folder = tmp_path_factory.mktemp("query-digits")
    run("query-digits", limit=N, out=folder, device="cpu")
    stored, damaged = Store(folder).rows()
    assert not damaged
    by_name = {}
    for row in stored:
        cell = row.cell
        by_name[cell.threat.eps == 0.5, cell.defense_name, cell.attack.spec.partition("(")[0]] = row
    return by_name, folder


def left(rows, defense, attack, queries=300):
    """Who is left (N,) after so many queries."""
    return robust(rows[0][False, defense, attack], queries).right


def less(few, many):
    """Whether ``few`` holds significantly less than ``many``: exact and paired, at 1 %."""
    return few.mean() < many.mean() and mcnemar(few, many) < 0.01


def fired(rows, defense):
    wanted = [row for (large, name, _), row in rows[0].items() if not large and name in ("none", defense)]
    return {flag.flag for flag in flags(wanted) if flag.defense == defense}


def test_every_cell_is_whole_and_no_sample_has_a_query_more(rows):
    assert len(rows[0]) == 7 * 11 + 4
    for row in rows[0].values():
        assert row.complete
        assert not row.errors
        assert (column(row, "forwards") <= row.cell.threat.query_budget).all()
        hit = column(row, "first_hit")
        assert (column(row, "forwards")[hit > 0] == hit[hit > 0]).all(), "a sample that fell is asked no more"


def test_plain_square_brings_down_what_is_undefended_and_not_aaa(rows):
    assert left(rows, "none", "square").mean() < 0.5
    for defense in ("aaa-linear", "aaa-linear(offset=secret)", "aaa-sine"):
        assert less(left(rows, "none", "square"), left(rows, defense, "square"))
        assert (clean(rows[0][False, defense, "square"]).right == clean(rows[0][False, "none", "square"]).right).all()


def test_knowing_the_interval_undoes_aaa_and_a_secret_offset_hides_it(rows):
    undone = left(rows, "aaa-linear", "decode-square")
    assert less(undone, left(rows, "aaa-linear", "square"))
    assert less(undone, left(rows, "aaa-linear(offset=secret)", "decode-square"))
    assert mcnemar(undone, left(rows, "none", "square")) > 0.01, "little of the defense is left"


def test_turning_round_needs_no_secret(rows):
    for defense in ("aaa-linear", "aaa-linear(offset=secret)"):
        assert less(left(rows, defense, "bi-square"), left(rows, defense, "square"))


def test_labels_and_transferred_examples_do_not_see_aaa_at_all(rows):
    for attack in ("rays", "transfer", "hop-skip-jump"):
        theirs, ours = left(rows, "none", attack), left(rows, "aaa-linear", attack)
        assert mcnemar(theirs, ours) > 0.05
        assert (theirs == ours).mean() > 0.9


def test_random_noise_is_no_attack(rows):
    for defense in ("none", "aaa-linear"):
        assert left(rows, defense, "noise").mean() > 0.85


def test_averaging_finds_examples_that_hold(rows):
    plain, averaged = (rows[0][False, "rnd(sigma=0.05)", attack] for attack in ("square", "eot-square"))
    still_right = [column(row, "final_share")[column(row, "first_hit") > 0].mean() for row in (averaged, plain)]
    assert still_right[0] < still_right[1], "what the mean of five draws misclassifies is misclassified more often"


def test_nothing_survives_half_of_the_range(rows):
    assert robust(rows[0][True, "none", "square"], 300).value < 0.05
    assert robust(rows[0][True, "aaa-linear", "decode-square"], 300).value < 0.05


def test_the_flags_tell_the_story(rows):
    assert fired(rows, "none") == set()
    assert {"trend-reversal", "other-tactic-wins", "confuses-queries"} <= fired(rows, "aaa-linear")
    assert "trend-reversal" not in fired(rows, "rnd(sigma=0.05)")
    assert "random-outputs" in fired(rows, "rnd(sigma=0.05)")
    assert "repeated-margins" in fired(rows, "rounding")
    written = json.loads((rows[1] / "flags.json").read_text())
    assert {entry["defense"] for entry in written} >= {"aaa-linear", "rnd(sigma=0.05)"}
    assert np.all([entry["evidence"] for entry in written])
