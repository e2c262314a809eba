"""Who may import whom."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import bench
from bench.catalogue import keep

ROOT = Path(__file__).parents[1]
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
           for file in (ROOT / "bench").rglob("*.py")}  # fmt: skip
SLOW = (
    "torchvision", "robustbench", "timm", "torchattacks", "sklearn", "pyautoattack", "matplotlib", "plotly", "itables",
    "openvino", "ray",
)  # fmt: skip


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_the_package_meets_components_through_the_registry_alone():
    files = list((ROOT / "bench").rglob("*.py"))
    assert ROOT / "bench" / "cli" / "run.py" in files
    offenders = {file.name for file in files if imports(file) & {"attacks", "defenses", "tests"}}
    assert offenders == set()


LAYERS = (  # each imports from its own and from those above it here, never from those below
    ("errors",),
    ("system",),
    (
        "cuda_graphs", "dataset", "engine", "losses", "metrics", "norms", "numerics", "precision", "ranges", "replay",
        "rng", "rules", "scratch", "service", "spec", "threat",
    ),
    ("oracle",),
    ("ascent", "catalogue", "declarations", "protection", "protocols", "registry", "training"),
    ("data", "models"),
    ("plan",),
    ("measure",),
    ("check",),
    ("results",),
    ("report", "tracks"),
    ("release", "site"),
    ("run",),
    ("entries",),
    ("cli",),
)


def edges(file: Path) -> set[str]:
    """The modules of ``bench`` that ``file`` imports when it runs, wherever in it."""
    found = set()
    for node in running(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "bench":
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inside}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "bench"}
    return found


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of ``tree`` but for what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from running(node)


def rooms(file: Path) -> set[str]:
    return {module.split(".")[1] for module in edges(file) if module != "bench"}


def test_data_flow_one_way_through_the_rooms():
    floor = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    homes = {module: module.split(".")[1] for module in MODULES if module != "bench"}
    assert set(homes.values()) == set(floor)
    seen = {(module, home, room) for module, home in homes.items() for room in rooms(MODULES[module])}
    upward = {(module, room) for module, home, room in seen if floor[room] > floor[home]}
    assert upward == set()


def test_no_two_modules_import_each_other():
    TopologicalSorter({module: edges(file) for module, file in MODULES.items()}).prepare()  # a CycleError names them


def test_components_are_written_in_what_the_package_says():
    said = set(re.findall(r"^ {4}bench\.([a-z]+) ", bench.__doc__, re.MULTILINE))
    files = [*(ROOT / "attacks").rglob("*.py"), *(ROOT / "defenses").rglob("*.py")]
    assert {room for file in files for room in rooms(file)} <= said


def test_the_command_line_starts_without_libraries_that_it_may_not_need():
    code = f"""
import sys
from bench.registry import attacks, load_plugins
import bench.cli
load_plugins()
assert "square" in attacks.names()
print(sorted(set({SLOW}) & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_what_touches_no_network_imports_none():
    """Help, lists, completion of every command's arguments and the tables of a board; none of it by a clock."""
    keep()  # as the first command does
    board = str(ROOT / "leaderboards" / "data-digits")
    code = f"""
import os, sys
from bench.cli import COMMANDS, app
def bench(*arguments):
    try:
        app(list(arguments), prog_name="bench", standalone_mode=False)
    except SystemExit:
        pass
def seen(library):
    return library in sys.modules
bench("--help")
assert not seen("numpy"), "help"
for kind in ([], ["attacks"], ["attacks", "square"], ["defenses"], ["models"], ["datasets"], ["suites"]):
    bench("ls", *kind)
assert not seen("numpy"), "ls"
for command in COMMANDS:
    bench(command, "--help")
os.environ |= {{"_BENCH_COMPLETE": "complete_bash", "COMP_WORDS": "bench run --qu", "COMP_CWORD": "2"}}
bench()
del os.environ["_BENCH_COMPLETE"]
bench("leaderboard", {board!r})
bench("leaderboard", {board!r}, "--format", "csv")
print(sorted({{"torch", "pandas", "scipy.stats", "attacks"}} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.splitlines()[-1] == "[]"
