"""Threats: radii in both spellings, and the ones that nobody can mean."""

import math
from typing import get_args

import pytest

from bench.errors import ConfigError
from bench.threat import Access, Threat, format_eps, parse_eps


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("0.5", 0.5), (0.5, 0.5), (3, 3.0), ("1 / 4", 0.25), ("1e-3", 1e-3)]
)
def test_a_radius_is_a_number_or_a_fraction(text, value):
    assert parse_eps(text) == value


@pytest.mark.parametrize("text", ["", "eight", "8/0", "8/", "1/2/3", None, [1]])
def test_what_is_neither_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="8/255"):
        parse_eps(text)


@pytest.mark.parametrize("level", [1, 4, 8, 16, 255])
def test_whole_grey_levels_are_written_as_such_and_read_back(level):
    assert format_eps(level / 255, "linf") == f"{level}/255"
    assert parse_eps(format_eps(level / 255, "linf")) == level / 255


def test_other_radii_are_plain_numbers():
    assert format_eps(0.1, "linf") == "0.1"
    assert format_eps(0.0, "linf") == "0"
    assert format_eps(8 / 255, "l2") == "0.0313725"
    assert str(Threat("l2", 0.5, "scores", 100)) == "l2 0.5"
    assert str(Threat("linf", 8 / 255, "scores", 100)) == "linf 8/255"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("linf", 8.0, "scores", 1), "linf eps is 8, above the pixel range; write 8/255 for levels"),
        (("linf", -0.1, "scores", 1), "a radius is zero or more"),
        (("l2", math.nan, "scores", 1), "a radius is zero or more"),
        (("l3", 0.1, "scores", 1), "use one of l0, l1, l2, linf"),
        (("linf", 0.1, "score", 1), "use one of scores, labels, gradients, training-data"),
        (("linf", 0.1, "scores", 0), "allow at least one query"),
    ],
)
def test_a_threat_that_cannot_be_meant_is_refused(arguments, complaint):
    with pytest.raises(ConfigError) as refusal:
        Threat(*arguments)
    assert complaint in str(refusal.value)


def test_large_radii_make_sense_in_other_norms():
    assert Threat("l2", 3.0, "scores", 1).eps == 3
    assert Threat("l0", 5, "training-data").query_budget is None


@pytest.mark.parametrize("access", get_args(Access))
def test_a_threat_asks_or_proves_or_learns(access):
    threat = Threat("l2", 0.5, access)
    assert threat.asks == (access in ("scores", "labels", "gradients"))
    assert threat.proves == (access == "certificate")
