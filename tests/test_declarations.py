"""What a component says of itself is looked at before anything runs, and what is wrong is one line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.oracle import Rules
from bench.registry import Registry, attacks, defenses
from bench.rules import rules_of
from tests.test_cli import bench

DEFENSE = 'class Mine:\n    stage = "{stage}"\n    {said}\n    def __call__(self, *given): return given[0]\n'
ATTACK = 'class Mine:\n    access = "{access}"\n    {said}\n    def __call__(self, *given): return given[1]\n'


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    before = attacks.snapshot(), defenses.snapshot()
    yield
    attacks.restore(before[0])
    defenses.restore(before[1])


def made(code: str, registry: Registry[Any], folder: Path) -> Any:
    """What ``code`` defines as a user's file and as a plug-in's class; both say the same of it."""
    file, names = folder / "mine.py", dict[str, Any]({"__name__": "plugin"})
    file.write_text("from bench.oracle import Rules\n" + code)
    exec(file.read_text(), names)
    told: list[str] = []
    for make in (lambda: registry("mine")(names["Mine"]), lambda: registry.create(f"{file}:Mine")):
        try:
            component = make()
        except BenchError as error:
            told.append(str(error))
    if told:
        assert len(told) == 2
        assert "\n" not in "".join(told)
        raise BenchError(told[0])
    return component


DEFENSES = {
    ("output", "pass"): "does not declare random; add random = False, or True where it is called with random numbers",
    ("output", "random = 'no'"): "declares random = 'no'; write random = False, or True",
    ("output", "random, statefull = False, True"): "declares statefull; did you mean 'stateful'?",
    ("output", "random, batch_dependent = False, 1"): "declares batch_dependent = 1; write batch_dependent = True or",
    ("output", "random, knows = False, 'square'"): """declares knows = 'square'; write knows = ("decode-square", """,
    ("output", "random, knows = False, ('square(',)"): "declares knows = ('square(',); write knows = (",
    ("data", "eps = 0.1"): 'does not declare norm; add norm = "linf" or',
    ("data", "norm = 'linf'"): "does not declare eps; add eps = 8 / 255, or the radius that it keeps to",
    ("data", "norm, eps = 'max', 0.1"): "declares norm = 'max'; write norm = ",
    ("data", "norm, eps = 'linf', '8/255'"): "declares eps = '8/255'; write eps = 8 / 255",
    ("data", "norm, eps = 'linf', float('nan')"): "declares eps = nan; write eps = 8 / 255",
    ("data", "norm, epsilon = 'linf', 0.1"): "does not declare eps",
    ("data", "norm, eps, needs_class = 'linf', 0.1, False"): "declares needs_class; did you mean 'needs_classes'?",
    ("trainig", "pass"): "declares stage = 'trainig'; write stage = ",
    ("training", "version = '2'"): "declares version = '2'; write version = 1",
}


@pytest.mark.parametrize(("stage", "said"), DEFENSES)
def test_a_defense_that_does_not_say_what_its_stage_needs_is_refused(stage, said, tmp_path):
    with pytest.raises(BenchError) as caught:
        made(DEFENSE.format(stage=stage, said=said), defenses, tmp_path)
    assert str(caught.value).startswith("defense 'mine' ")
    assert DEFENSES[stage, said].replace('"linf" or', "") in str(caught.value)


ATTACKS = {
    ("scores", "pass"): 'does not declare norms; add norms = frozenset({"linf"})',
    ("scores", "norms = 'linf'"): "declares norms = 'linf'; write norms = frozenset",
    ("scores", "norms = frozenset({'max'})"): "write norms = frozenset",
    ("score", "norms = frozenset({'linf'})"): "declares access = 'score'; write access = ",
    ("scores", "norms = frozenset({'linf'}); rules = 'minimal'"): "declares rules = 'minimal'; write rules = Rules(",
    ("scores", "norms = frozenset({'linf'}); minimal = True"): "minimal by itself; write rules = Rules(minimal=True)",
    ("labels", "norms = frozenset({'linf'}); surrogate = True"): "write rules = Rules(surrogate=True), with Rules from",
    ("scores", "norms = frozenset({'linf'}); rule = Rules()"): "declares rule; did you mean 'rules'?",
    ("scores", "norms = frozenset({'linf'}); batch_dependant = True"): "did you mean 'batch_dependent'?",
}


@pytest.mark.parametrize(("access", "said"), ATTACKS)
def test_an_attack_whose_rules_would_not_be_heard_is_refused(access, said, tmp_path):
    with pytest.raises(BenchError) as caught:
        made(ATTACK.format(access=access, said=said), attacks, tmp_path)
    assert str(caught.value).startswith("attack 'mine' ")
    assert ATTACKS[access, said] in str(caught.value)


def test_a_misspelt_rule_ends_the_import():
    with pytest.raises(TypeError, match="minimum"):
        Rules(minimum=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("said", [
    "norms = frozenset({'linf'}); rules = Rules(minimal=True)",
    "norms, norm = frozenset({'linf'}), 'linf'",  # its own affair
    "norms = {'l2'}\n    @property\n    def rules(self): return Rules(alone=True)",
])
def test_what_fits_is_taken(said, tmp_path):
    attack = made(ATTACK.format(access="scores", said=said), attacks, tmp_path)
    assert isinstance(rules_of(attack), Rules)


def test_a_learner_declares_no_norms(tmp_path):
    assert made(ATTACK.format(access="training-data", said="pass"), attacks, tmp_path).access == "training-data"


def test_the_command_line_says_it_before_anything_runs(tmp_path):
    (tmp_path / "mine.py").write_text(DEFENSE.format(stage="output", said="pass"))
    ended = bench("run", "--dataset", "digits", "--n", 2, "--queries", 2, "--model", "cnn(width=2)", "--attack",
                  "noise", "--defense", f"{tmp_path}/mine.py:Mine", "--out", tmp_path / "out")  # fmt: skip
    assert ended.code == 2
    assert "does not declare random; add random = False" in ended.err.splitlines()[-1]
