"""The pages say what is so: links lead somewhere, examples run, commands exist, figures and names are the code's."""

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from torch import nn

from bench.check.problem import digits
from bench.cli import app
from bench.measure.audit import TRAITS, audit
from bench.measure.finding import RARE
from bench.measure.gradients import gradient_findings
from bench.measure.witness import FLAG
from bench.models import resolve
from bench.oracle.served import ServedModel
from bench.plan.suite import load_suite
from bench.report.flags import THRESHOLDS
from bench.results.records import KNOWN
from bench.service import Desk
from bench.threat import Threat
from tests.test_cli import bench

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("leaderboards/**/README.md")]
BOARD = ROOT / "leaderboards" / "query-cifar10" / "README.md"
RED_FLAGS = (ROOT / "docs" / "red-flags.md").read_text()
ENTRIES = dict(re.findall(r"^### (.+)\n(RF-.+)$", RED_FLAGS, re.MULTILINE))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: str, language: str) -> list[str]:
    return [text for kind, text in FENCED.findall((ROOT / page).read_text()) if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = prose(page)
    inline = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in [link for link in inline if not link.startswith(("https://", "http://"))]:
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file(), target  # a folder is a page on a forge, and none on the site
        assert there.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(there), target


def on_the_site() -> set[Path]:
    """The files that docs/site.py takes into the site, read without the generator, which tests do not install."""
    tree = ast.parse((ROOT / "docs" / "site.py").read_text())
    named = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    return {file for pattern in ast.literal_eval(named["PAGES"]) for file in ROOT.glob(pattern)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_is_on_the_site(page):
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]
    assert {(page.parent / link).resolve() for link in links if link} <= on_the_site()


def test_the_examples_of_components_are_complete(tmp_path, capsys):
    (attack,), (defense,) = blocks("docs/attack.md", "python"), blocks("docs/defense.md", "python")
    (model,) = blocks("docs/own.md", "python")
    named = {"attack": ("Corners", attack), "defense": ("Rounded", defense), "model": ("build", model)}
    for kind, (_, text) in named.items():
        (tmp_path / f"my_{kind}.py").write_text(text + f"# {tmp_path}\n")
    arguments = [f"--{kind}={tmp_path}/my_{kind}.py:{name}" for kind, (name, _) in named.items()]
    ended = bench("run", "--dataset", "digits", "--n", "20", *arguments, "--queries", "20", "--eps", "0.1",
                  "--out", tmp_path / "out")  # fmt: skip
    assert ended.code == 0, ended.err
    assert "1 cells run" in ended.out
    (reading,) = blocks("docs/results.md", "python")
    exec(reading.replace("leaderboards/query-cifar10", str(tmp_path / "out")), {})
    assert "Corners" in capsys.readouterr().out


def test_the_example_of_a_service_answers(tmp_path):
    (text,) = blocks("docs/service.md", "python")
    (tmp_path / "victim.py").write_text(text)
    desk, test = Desk(resolve(f"{tmp_path}/victim.py:score").line(), 10), digits().test
    assert (desk.logits(test.pixels()).argmax(dim=1) == test.labels).float().mean() > 0.8


def test_the_example_suite_is_one(tmp_path):
    (text,) = blocks("docs/suites.md", "toml")
    (tmp_path / "suite.toml").write_text(text)
    (grid,) = load_suite(str(tmp_path / "suite.toml"), {}).grid
    assert grid.queries == 2500


COMMANDS = [
    line for page in PAGES for text in FENCED.findall(page.read_text()) if not text[0]
    for line in text[1].splitlines() if line.startswith("bench ")
]  # fmt: skip


@pytest.mark.parametrize("line", dict.fromkeys(COMMANDS))
def test_commands_have_the_options_that_pages_give_them(line):
    group = typer.main.get_command(app)
    name, *arguments = shlex.split(line, comments=True)[1:]
    context = group.make_context("bench", [], resilient_parsing=True)
    _, command, _ = group.resolve_command(context, [name])  # type: ignore[attr-defined]
    command.make_context(name, arguments, parent=context)  # a usage error names what is wrong


def rows_of(text: str) -> dict[str, dict[str, str]]:
    """A Markdown table by its first column and by its columns."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}


def test_the_readme_shows_the_board():
    excerpt = rows_of((ROOT / "README.md").read_text().partition("| To ")[0])
    board = BOARD.read_text().partition("At a glance")[2].partition("\n\n")[2].partition("\n\n")[0]
    whole = rows_of(board)
    assert len(excerpt) == 5
    for attack, shares in excerpt.items():
        assert shares == {name: whole[attack][name] for name in shares}
        assert len(shares) == 5


@pytest.mark.parametrize("page", sorted(ROOT.glob("leaderboards/*/sheets/README.md")), ids=lambda page: page.parts[-3])
def test_every_sheet_is_shown(page):
    assert set(re.findall(r"\]\((.+\.png)\)", page.read_text())) == {file.name for file in page.parent.glob("*.png")}


@pytest.mark.slow
def test_the_picture_is_drawn_from_the_rows():
    picture: dict = {"__name__": "picture", "__file__": str(ROOT / "docs" / "picture.py")}
    exec((ROOT / "docs" / "picture.py").read_text(), picture)
    assert (ROOT / "docs" / "queries.svg").read_text() == picture["draw"](picture["curves"](picture["BOARD"]))


def test_every_column_of_the_records_is_explained():
    records = (ROOT / "docs" / "results.md").read_text().partition("## Records")[2].partition("## Reading")[0]
    assert {name for name in KNOWN if f"`{name}`" not in records} == set()


class TestRedFlags:
    """Each has an entry with its rule, its number and its source, and the entry says what the code does."""

    def test_entries_are_the_flags_that_the_code_knows(self):
        undeclared = {f"undeclared-{trait}" for trait in TRAITS.values()}
        assert set(ENTRIES) == set(self.probed()) | set(THRESHOLDS) | undeclared

    def test_rows_fire_no_flag_without_a_threshold(self):
        source = (ROOT / "bench" / "report" / "flags.py").read_text()
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        named = {
            str(call.args[0].value) for call in calls
            if isinstance(call.func, ast.Name) and call.func.id in ("Sign", "_less")
            and isinstance(call.args[0], ast.Constant)
        }  # fmt: skip
        assert named == set(THRESHOLDS)

    def test_entries_have_the_thresholds_of_the_code(self):
        for flag, threshold in {**self.probed(), **THRESHOLDS}.items():
            number = re.search(r"fires (?:above|at or below) ([\d.]+\d|\d)", ENTRIES[flag])
            assert number, flag
            assert float(number[1]) == pytest.approx(threshold), flag

    def test_each_has_a_number_and_a_source(self):
        sources = {*re.findall(r"^\[(.+)\]: https://", RED_FLAGS, re.MULTILINE), "Parry"}
        for flag, entry in ENTRIES.items():
            assert re.match(r"RF-\d\d(, RF-\d\d)* · fires ", entry), flag
            cited = entry.rpartition("source: ")[2]
            assert set(re.findall(r"\[(.+?)\]", cited)) <= sources, flag
            assert "[" in cited or cited == "Parry", flag

    def test_numbers_in_the_code_are_on_the_page_and_the_reverse(self):
        files = [file for room in ("bench", "attacks", "defenses") for file in (ROOT / room).rglob("*.py")]
        code = "".join(file.read_text() for file in files)
        in_code, on_page = (set(re.findall(r"RF-\d\d", text)) for text in (code, RED_FLAGS))
        between = {f"RF-{number}" for number in range(12, 17)}  # which are not looked at
        assert in_code | between == on_page

    def probed(self) -> dict[str, float]:
        """The threshold of each flag that probing computes."""
        torch.manual_seed(0)
        served = ServedModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval())
        x, y = torch.rand(8, 1, 8, 8), torch.from_numpy(np.arange(8) % 3)
        findings = audit(served, served, x, y, Threat("linf", 0.1, "scores"), 0, ())
        findings += gradient_findings(served, served, x, y, Threat("linf", 0.1, "gradients"), 0)
        return {FLAG: RARE, **{finding.flag: finding.threshold for finding in findings}}
