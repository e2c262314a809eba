"""``bench new``: what it writes works, takes no name from others, and overwrites nothing."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bench.cli.new import LONGEST, RUNS, _text
from bench.entries.plan import entry_suite
from bench.entries.statement import entered_track
from bench.plan.tasks import Loader, expand
from bench.registry import GROUP, attacks, defenses, models
from bench.spec import Spec
from tests.test_cli import bench, complaint
from tests.test_docs import blocks

KINDS = {"output": "defense", "training": "defense", "data": "defense", "attack": "attack", "model": "model"}


@pytest.fixture(autouse=True)
def own_registries():
    """What templates register is theirs for a test alone."""
    before = [registry.snapshot() for registry in (attacks, defenses, models)]
    yield
    for registry, names in zip((attacks, defenses, models), before, strict=True):
        registry.restore(names)


def new(template: str, name: str, *arguments: object) -> list[str]:
    """Write a template and return the commands that come next."""
    kind = KINDS[template]
    stage = ("--stage", template) if kind == "defense" else ()
    ended = bench("new", kind, name, *stage, *arguments)
    assert ended.code == 0, ended.err
    return [line.strip() for line in ended.out.splitlines()[1:]]


@pytest.mark.parametrize("template", KINDS)
def test_a_template_runs_as_it_says(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check, run, test, *submit = new(template, "my-own")
    assert check == "bench check ./my_own.py:MyOwn"
    assert run == RUNS[template].format("./my_own.py:MyOwn")
    assert test == "python -m pytest test_my_own.py"
    assert len(submit) == (KINDS[template] == "defense")
    assert Path("my_own.py").is_file()
    planned = bench(*run.split()[1:], "--dry-run")
    assert planned.code == 0, planned.err
    assert "my_own" in planned.out


@pytest.mark.parametrize("template", [name for name, kind in KINDS.items() if kind == "defense"])
def test_the_last_command_submits_it_to_a_suite_that_takes_it(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = new(template, "my-own")[-1].split()
    told = dict(zip(words[3::2], words[4::2], strict=True))
    assert [*words[:3], told["--name"]] == ["bench", "submit", "./my_own.py:MyOwn", "MyOwn"]
    tasks = expand(entry_suite(told["--suite"], words[2], []), Loader(None, None), 2)
    assert entered_track(task.cell for task in tasks) == told["--track"]


@pytest.mark.parametrize("template", KINDS)
def test_the_test_of_a_template_asks_for_its_own_file(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new(template, "my-own")
    tree = ast.parse(Path("test_my_own.py").read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(names) == 2
    space = {"__file__": str(tmp_path / "test_my_own.py")}
    exec(compile(tree, "test_my_own.py", "exec"), space)
    assert Spec.parse(space["COMPONENT"]).name == f"{tmp_path}/my_own.py:MyOwn"
    if template != "attack":
        space[names[1]]()  # the first asks in another process


def test_pages_teach_what_templates_are():
    shown = {"output": ("docs/defense.md", "rounded", "Rounded"), "attack": ("docs/attack.md", "corners", "Corners")}
    for template, (page, name, title) in shown.items():
        (block,) = blocks(page, "python")
        told = _text(template, name, name, title).replace(f"{title}Model", "Rounding")
        assert ast.dump(ast.parse(told)) == ast.dump(ast.parse(block))


def test_a_package_announces_its_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, check, *_ = new("output", "my-own", "--package")
    assert first == "pip install --editable my-own"
    assert check == "bench check my-own"
    project = tomllib.loads(Path("my-own/pyproject.toml").read_text())["project"]
    assert project["entry-points"][GROUP] == {"my_own": "my_own"}
    assert (tmp_path / "my-own" / "my_own.py").is_file()


def test_a_folder_that_needs_quotes_gets_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check, *_ = new("data", "my-own", "--out", "a (b)")
    assert check == "bench check \"'./a (b)/my_own.py:MyOwn'\""


def test_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("test_my_own.py").write_text("mine")
    said = complaint(bench("new", "attack", "my-own"))
    assert "test_my_own.py is there already" in said
    assert Path("test_my_own.py").read_text() == "mine"
    assert not Path("my_own.py").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (("thing", "my-own"), "use one of defense, attack, model"),
    (("defense", "my-own"), "--stage output"),
    (("defense", "my-own", "--stage", "input"), "output, training, data"),
    (("attack", "my-own", "--stage", "output"), "leave it out"),
    (("attack", "a b"), "use letters"),
    (("attack", "../a"), "use letters"),
    (("attack", "a\x1b[2J"), "use letters"),
    (("attack", "square"), "an attack is named 'square' already"),
    (("attack", "x" * 300), f"name has 300 characters; use at most {LONGEST}"),
    (("attack", "torch"), "would hide a module"),
    (("attack", "class"), "choose another"),
    (("attack", "my-own", "--out", "file"), "cannot write to file"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert words in complaint(bench("new", *arguments))
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


@pytest.mark.slow
@pytest.mark.parametrize("template", KINDS)
def test_the_test_of_a_template_passes(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new(template, "my-own")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_own.py"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "2 passed" in run.stdout, run.stdout + run.stderr
