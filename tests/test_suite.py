"""Suite files: what they mean, and what a wrong one says."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from bench.entries.plan import asked
from bench.errors import ConfigError
from bench.plan.suite import load_suite, suite_names
from bench.spec import Spec

GRID = """
[[grid]]
dataset = "digits"
model = "cnn"
attack = ["square", "pgd"]
n = 20
"""


def load(tmp_path: Path, text: str, **overrides: Any):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    return load_suite(str(file), overrides)


def refusal(tmp_path: Path, text: str, **overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **overrides)
    assert "mine.toml" in str(caught.value) or "eps" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_of_ours_loads_and_has_a_title(name):
    assert load_suite(name, {}).name == name
    assert suite_names()[name]


def test_a_file_is_a_suite_named_after_it(tmp_path):
    suite = load(tmp_path, "budgets = [5]\n" + GRID)
    (grid,) = suite.grid
    assert suite.name == "mine"
    assert suite.budgets == [5]
    assert (grid.model, grid.defense, grid.attack, grid.seed) == (["cnn"], ["none"], ["square", "pgd"], [0])
    assert grid.eps == 8 / 255


def test_keys_at_the_top_are_defaults_of_every_grid(tmp_path):
    text = 'dataset = "digits"\nmodel = "cnn"\nattack = "square"\nn = 5\n[[grid]]\n[[grid]]\nn = 7\n'
    assert [grid.n for grid in load(tmp_path, text).grid] == [5, 7]


def test_overrides_replace_keys_in_every_grid_and_none_replaces_nothing(tmp_path):
    suite = load(tmp_path, GRID + GRID.replace("20", "30"), attack=["pgd"], eps="4/255", n=None)
    assert [grid.attack for grid in suite.grid] == [["pgd"], ["pgd"]]
    assert [grid.eps for grid in suite.grid] == [4 / 255, 4 / 255]
    assert [grid.n for grid in suite.grid] == [20, 30]


def test_from_makes_each_attack_on_each_network_in_turn(tmp_path):
    attacks = 'attack = ["mi-fgsm(momentum=0, steps=5)", "di-fgsm"]\n'
    text = f'dataset = "digits"\nn = 5\n{attacks}[[grid]]\nmodel = "cnn"\nfrom = ["a(weights=w.pt)", "b"]\n'
    text += '[[grid]]\nmodel = "b"\nfrom = "cnn"\n[[grid]]\nmodel = "c"\n'
    first, second, third = load(tmp_path, text).grid
    assert [Spec.parse(attack) for attack in first.attack] == [
        Spec("mi-fgsm", {"momentum": 0, "steps": 5, "from": "a(weights=w.pt)"}),
        Spec("di-fgsm", {"from": "a(weights=w.pt)"}),
        Spec("mi-fgsm", {"momentum": 0, "steps": 5, "from": "b"}),
        Spec("di-fgsm", {"from": "b"}),
    ]
    assert second.attack == ["mi-fgsm(momentum=0, steps=5, from=cnn)", "di-fgsm(from=cnn)"]
    assert third.attack == ["mi-fgsm(momentum=0, steps=5)", "di-fgsm"]
    picked = load(tmp_path, text, attack=["di-fgsm"]).grid
    assert [grid.attack for grid in picked] == [[first.attack[1], first.attack[3]], [second.attack[1]], ["di-fgsm"]]


@pytest.mark.parametrize(("eps", "value"), [("'8/255'", 8 / 255), ("0.1", 0.1), ("'0.1'", 0.1), ("0", 0.0)])
def test_a_radius_may_be_a_number_or_a_fraction(tmp_path, eps, value):
    assert load(tmp_path, f"{GRID}eps = {eps}\n").grid[0].eps == value


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (GRID + "atack = 1\n", "grid 1, atack: unknown key; did you mean 'attack'?"),
        (GRID + GRID + "banana = 1\n", "grid 2, banana: unknown key; known: dataset, n,"),
        ("bugdets = [1]\n" + GRID, "bugdets: unknown key; did you mean 'budgets'?"),
        (GRID.replace("attack", "atack"), "did you mean 'attack'?"),
        (GRID.replace('dataset = "digits"', ""), "grid 1, dataset is missing"),
        (GRID.replace("[[grid]]", "[grid]"), "'grid' is a table; write [[grid]], with two brackets"),
        ("grid = [1]", "write [[grid]]"),
        ("grid = []", "grid is []"),
        ("grid = 1 = 2", "is not TOML"),
        (GRID.replace("20", "0"), "grid 1, n is 0"),
        (GRID.replace("20", "'many'"), "grid 1, n is 'many'"),
        (GRID + "from = []\n", "grid 1, from is []; name one model"),
        (GRID + GRID + "from = [1]\n", "grid 2, from is [1]; name one model"),
        (GRID.replace("attack", "# attack") + "from = 'cnn'\n", "grid 1 has a from and no attack; add"),
        (GRID.replace("pgd", "uap(from=b)") + "from = 'cnn'\n", "grid 1 has a from, and so has uap(from=b); keep one"),
        (GRID.replace('"pgd"', "3") + "from = 'cnn'\n", "grid 1, attack is 3"),
        (GRID + "norm = 'l3'\n", "grid 1, norm is 'l3'"),
        (GRID + "eps = 'eight'\n", "eps is 'eight'; write a number or a fraction"),
        (GRID + "eps = inf\n", "finite"),
        (GRID + "queries = 0\n", "queries is 0"),
        (GRID + "queries = true\n", "queries is True"),
        (GRID + f"queries = {10**25}\n", "less than or equal to 1000000000"),
        (GRID.replace("20", "true"), "grid 1, n is True; a number is expected"),
        (GRID + "seed = true\n", "seed is True"),
        (GRID + "deep = " + "[" * 5000 + "]" * 5000, "nests too deeply"),
        (GRID + "seed = [0, -1]\n", "seed is -1"),
        (GRID.replace('"cnn"', "[]"), "model is []"),
        ('board = {track = "quiz", version = 1}\n' + GRID, "board, track is 'quiz'"),
        ('board = {track = "query", version = 0}\n' + GRID, "board, version is 0"),
    ],
)
def test_a_wrong_file_says_where_and_what(tmp_path, text, complaint):
    assert complaint in refusal(tmp_path, text)


BOARDS = {
    "certified-cifar10-small v1": "1856da64",
    "certified-digits v2": "f85a291b",
    "data-cifar10-small v1": "bd7075bd",
    "data-digits v2": "767ada00",
    "query-cifar10 v1": "8fe368a7",
    "query-digits v1": "2586bdd7",
    "query-imagenet v1": "0470f73e",
    "rivals-cifar10 v1": "c190b399",
    "universal-cifar10 v1": "1bdfe3ce",
    "white-box-cifar10-small v1": "dc5952c9",
    "white-box-cifar10 v1": "a7d9ac68",
    "white-box-digits v3": "8a31709f",
}


def test_what_a_board_fixes_changes_with_its_version_alone():
    """Whoever changes a suite that is a board raises its version, and writes both down here."""
    found = {}
    for name in suite_names():
        suite = load_suite(name, {})
        if suite.board:
            asked_of_all = sorted({repr(each._replace(defense="")) for each in asked(suite)})
            fixed = json.dumps([suite.board.track, suite.budgets, asked_of_all])
            found[suite.label] = sha256(fixed.encode()).hexdigest()[:8]
    assert found == BOARDS


def test_a_board_is_one_while_only_models_and_defenses_are_chosen():
    assert load_suite("query-digits", {"defense": ["rounding"], "model": ["cnn(width=2)"]}).label == "query-digits v1"
    for other in ({"queries": 10}, {"attack": ["square"]}, {"seed": [1]}, {"n": 10}):
        assert load_suite("query-digits", other).label == "query-digits"
    assert load_suite("quick", {}).label == "quick"


def test_a_file_that_is_not_text_is_not_toml(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"mine\.toml is not TOML"):
        load_suite(str(file), {})


def test_an_unknown_suite_offers_the_nearest():
    with pytest.raises(ConfigError, match="no suite or file is named 'qick'; did you mean 'quick'"):
        load_suite("qick", {})
    with pytest.raises(ConfigError, match=r"suites: .*quick"):
        load_suite("zzz", {})


def test_without_a_name_the_overrides_are_the_suite():
    with pytest.raises(ConfigError, match=r"^dataset is missing; name a suite that has it, or add it as --dataset$"):
        load_suite(None, {})
    suite = load_suite(None, {"dataset": "digits", "model": ["cnn"], "attack": ["square"], "n": 3})
    assert suite.grid[0].n == 3


def test_a_very_long_suite_is_refused_in_a_short_line():
    with pytest.raises(ConfigError, match="100,000 characters"):
        load_suite("a" * 100_000, {})


TWO_GRIDS = """
dataset = "digits"
model = "cnn(width=8)"
n = 20
[[grid]]
defense = ["none", "rnd(sigma=0.02)", "pgd-at(epochs=1) + rnd(sigma=0.1)"]
attack = ["square", "square(p_init=0.3)", "pgd"]
[[grid]]
defense = "ops"
attack = "standard"
"""


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"defense": ["rnd"]}, [["rnd(sigma=0.02)"]]),
        ({"defense": ["rnd( sigma=0.02 )"]}, [["rnd(sigma=0.02)"]]),
        ({"defense": ["none", "ops"]}, [["none"], ["ops"]]),
        ({"defense": ["pgd-at + rnd"]}, [["pgd-at(epochs=1) + rnd(sigma=0.1)"]]),
        ({"defense": ["rnd(sigma=0.5)"]}, [["rnd(sigma=0.5)"], ["rnd(sigma=0.5)"]]),
        ({"defense": ["mine.py:D"]}, [["mine.py:D"], ["mine.py:D"]]),
        ({"defense": ["rnd", "mine.py:D"]}, [["rnd(sigma=0.02)", "mine.py:D"]]),
        ({"defense": ["none", "ops", "mine.py:D"]}, [["none", "mine.py:D"], ["ops", "mine.py:D"]]),
        ({"attack": ["square"]}, [["square", "square(p_init=0.3)"]]),
        ({"attack": ["square(p_init=0.3)"]}, [["square(p_init=0.3)"]]),
        ({"attack": ["square(", "pgd"]}, [["pgd", "square("]]),
        ({"model": ["cnn"]}, [["cnn(width=8)"], ["cnn(width=8)"]]),
        ({"model": ["resnet20"]}, [["resnet20"], ["resnet20"]]),
    ],
)
def test_a_name_picks_what_a_suite_has_and_another_takes_its_place(given, found, tmp_path):
    (key,) = given
    assert [getattr(grid, key) for grid in load(tmp_path, TWO_GRIDS, **given).grid] == found
