"""Every registered component against the same truths; a new file in ``attacks/`` or ``defenses/`` is met here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.check import RULES, Subject, subject
from bench.check.attack import in_norm
from bench.check.common import says_what_it_is
from bench.check.verdict import Remark
from bench.registry import attacks, defenses
from bench.spec import Spec
from bench.system.process_state import undisturbed
from tests.registered import EXAMPLES, FOREIGN

SMALL_MODELS = ["cnn", "resnet20", "resnet20-at", "small-vgg", "small-vgg-standard"]  # the others take long to make


def subjects() -> dict[str, Subject]:
    """Every component by name, an attack once for each of its norms."""
    names = [name for registry in (attacks, defenses) for name in registry.names() if not name.endswith(":")]
    found = {name: subject(Spec.parse(EXAMPLES.get(name, name))) for name in [*names, *FOREIGN, *SMALL_MODELS]}
    attacking = {f"{name}-{norm}": in_norm(each, norm) for name, each in found.items() for norm in each.norms}
    return {**attacking, **{name: each for name, each in found.items() if each.kind != "attack"}}


SUBJECTS = subjects()
ASKED = [
    pytest.param(each, rule, id=f"{name}-{label.replace(' ', '-')}")
    for name, each in SUBJECTS.items() for label, rule in RULES[each.kind].items()
]  # fmt: skip


@pytest.mark.parametrize(("component", "rule"), ASKED)
def test_every_component_keeps_every_rule(component, rule):
    with undisturbed():
        saw = rule(component)
    if isinstance(saw, Remark):
        pytest.skip(saw)


def test_no_stage_and_no_kind_of_attack_is_left_out():
    kinds = [each.kind for each in SUBJECTS.values()]
    assert set(kinds) == set(RULES) - {"service"}  # which only users have; test_service.py asks its rules
    assert len(defenses.names()) == sum(kind.endswith("defense") for kind in kinds)


@pytest.mark.parametrize("component", SUBJECTS.values(), ids=SUBJECTS)
def test_every_component_says_what_it_is(component):
    says_what_it_is(component)


TOY_ATTACK = '''
from dataclasses import dataclass
from typing import ClassVar
from bench.registry import attacks

@attacks("toy-attack")
@dataclass(frozen=True)
class Toy:
    """Ask once."""
    access: ClassVar = "scores"
    norms: ClassVar = frozenset({"linf"})
    version: ClassVar = 1
    paper: ClassVar = "nobody"

    def __call__(self, oracle, x, y, threat, rng):
        x_adv = (x + threat.eps * (rng.uniform(*x.shape[1:]).to(x) * 2 - 1)).clamp(0, 1)
        oracle.scores(x_adv)
        return x_adv
'''
TOY_DEFENSE = '''
from dataclasses import dataclass
from typing import ClassVar
from torch import nn
from bench.registry import defenses

@defenses("toy-defense")
@dataclass(frozen=True)
class Toy:
    """Double the logits."""
    stage: ClassVar = "output"
    random: ClassVar = False
    outside: ClassVar = True
    knows: ClassVar = ("square",)
    version: ClassVar = 1
    paper: ClassVar = "nobody"

    def __call__(self, model, calibration, seed):
        return Doubled(model).eval()

class Doubled(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return 2 * self.model(x)
'''


def test_a_new_file_is_all_that_a_component_takes(tmp_path):
    """Drop one file into each package: it is registered, and this very suite tests it."""
    here = Path(__file__).parents[1]
    for package in ("attacks", "defenses", "tests"):
        shutil.copytree(here / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "attacks" / "toy.py").write_text(TOY_ATTACK)
    (tmp_path / "defenses" / "toy.py").write_text(TOY_DEFENSE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_conformance.py", "-ktoy-"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(here)])}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    asked = sum(len(RULES[kind]) + 1 for kind in ("attack", "output defense"))
    assert f"{asked} passed" in result.stdout, result.stdout + result.stderr
