"""Some lines of a table: figures, ranks and flags stay those of all rows."""

from dataclasses import replace

import pytest

from bench.errors import ConfigError
from bench.oracle import NEVER
from bench.report.leaderboard import records, render
from bench.report.selection import Selection
from bench.report.standings import Table, tables
from tests.rows import learner, row

TUNED, SECRET = "aaa-linear(temperature=tuned)", "aaa-linear(offset=secret)"
HITS = {"none": [1] * 12, TUNED: [NEVER] * 12, SECRET: [NEVER] * 11 + [5], "rnd": [3] * 12}


@pytest.fixture(scope="module")
def board() -> list[Table]:
    served = [row(hits, name, attack) for name, hits in HITS.items() for attack in ("square(p_init=0.1)", "nes")]
    return tables([*served, learner(3, 20), learner(9, 20, "tap"), learner(4, 20, "tap", "cutout")])


def shown(board: list[Table], **wanted: list[str]) -> list[tuple[str, str]]:
    return [(line.defense, line.attack) for table in Selection(**wanted).of(board) for line in table.lines]


def test_a_bare_name_means_all_its_variants_and_a_whole_one_itself(board):
    assert {name for name, _ in shown(board, defenses=["aaa-linear"])} == {TUNED, SECRET}
    assert {name for name, _ in shown(board, defenses=["aaa-linear( temperature = tuned )"])} == {TUNED}
    assert {name for _, name in shown(board, attacks=["square", "nes"])} == {"square(p_init=0.1)", "nes"}
    assert {name for name, _ in shown(board, tracks=["data"])} == {"none", "tap"}


def test_worst_and_best_are_the_lines_of_all_attacks_together(board):
    assert shown(board, attacks=["worst"], defenses=["rnd", "tap"]) == [("rnd", "worst of 2")]
    best = shown(board, attacks=["best"], tracks=["data"])
    assert [name for name, _ in best] == ["tap", "none"] or [name for name, _ in best] == ["none", "tap"]
    assert ("none", "standard") in best, "its only learner is its best"


def test_a_selection_changes_no_record(board):
    whole = records(board)
    for wanted in ({"defenses": ["rnd"]}, {"attacks": ["nes"]}, {"attacks": ["worst"], "defenses": ["none"]}):
        some = records(Selection(**wanted).of(board))
        assert 0 < len(some) < len(whole)
        assert all(record in whole for record in some)


def test_what_a_defense_does_to_its_scores_is_told_under_its_hardest_attack_though_that_is_not_shown(board):
    table, *_ = board
    lines = [replace(line, figures=line.figures | {"ece": 0.1}) for line in table.lines]
    hard = next(line for line in lines if (line.defense, line.attack) == (SECRET, "square(p_init=0.1)"))
    lines[lines.index(hard)] = replace(hard, shares=hard.shares | {"final": next(iter(lines[-1].shares.values()))})
    whole = [replace(table, lines=lines)]
    told = [line for line in render(whole, "md").splitlines() if line.startswith(f"| {SECRET}")]
    some = render(Selection(attacks=["nes"]).of(whole), "md")
    assert [line for line in some.splitlines() if line.startswith(f"| {SECRET}") and "10.0%" in line] == [
        line for line in told if "10.0%" in line
    ]


def test_a_selection_says_so_and_keeps_the_flags_of_its_defenses(board):
    (table,) = Selection(defenses=["rnd"]).of(board)
    assert "Shown: 3 of 12 lines; ranks, worst cases and flags are of all of them" in render([table], "md")
    assert {flag.defense for flag in table.flags} <= {"rnd"}
    assert Selection().of(board) == board


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"attacks": ["squar"]}, "no line of attack 'squar'; did you mean 'square'?"),
        ({"defenses": ["aaa-liner"]}, "no line of defense 'aaa-liner'; did you mean 'aaa-linear'?"),
        ({"tracks": ["white-box"]}, "no line of track 'white-box'; present: data, query"),
        ({"tracks": ["data"], "attacks": ["nes"]}, "no line has attack 'nes' and track 'data' together"),
        ({"defenses": ["aaa-linear("]}, "no line of defense 'aaa-linear('; did you mean 'aaa-linear'?"),
    ],
)
def test_a_name_that_fits_nothing_is_one_line_with_the_next_best(board, wanted, says):
    with pytest.raises(ConfigError) as error:
        Selection(**wanted).of(board)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
