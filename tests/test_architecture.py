"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW = ("torchvision", "robustbench", "timm", "torchattacks", "sklearn", "pyautoattack")


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
