"""What the command line says on terminals that cannot show everything, and where nothing can be written."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from bench import catalogue, registry
from bench.cli import main
from bench.cli.ls import _paragraphs
from bench.cli.terminal_table import _widths
from bench.registry import attacks, defenses, load_plugins
from tests.test_cli import ROOT, bench, complaint
from tests.test_reading import cell, store_rows


def printed(encoding: str, *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command whose streams are in ``encoding``."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        for stream in (out, err):
            stream.flush()
    said = [stream.buffer.getvalue().decode(encoding) for stream in (out, err)]  # type: ignore[attr-defined]
    return code, *said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limited") / "rows"
    store_rows(folder, [cell(limited=True), cell(defense="rnd", limited=True)])
    return folder


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_terminal_gets_the_table_with_marks_that_it_can_show(encoding, folder):
    code, out, err = printed(encoding, "leaderboard", folder)
    assert (code, err) == (0, "")
    mark = {"ascii": "+", "latin-1": "+"}.get(encoding, "†")
    assert f"| square {mark} " in out
    assert f"{mark} run with --limit" in out


def test_a_message_with_half_a_character_is_told(folder):
    code, out, err = printed("utf-8", "leaderboard", "no\udcffwhere")
    assert (code, out) == (2, "")
    assert err == "error: no results folder no\\udcffwhere; run a suite with --out no\\udcffwhere first\n"


def test_a_full_disk_behind_the_output_is_one_line(folder):
    with pytest.MonkeyPatch.context() as patch, Path("/dev/full").open("w") as full:
        err = io.StringIO()
        patch.setattr(sys, "argv", ["bench", "leaderboard", str(folder)])
        patch.setattr(sys, "stdout", full)
        patch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 1
    assert err.getvalue() == (
        "error: cannot write the output: No space left on device; free some space or write it elsewhere\n"
    )


def test_who_reads_the_first_line_alone_hears_no_complaint(folder):
    command = [sys.executable, "-m", "bench.cli", "leaderboard", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.close()  # before it can have printed anything
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() != 0


@pytest.mark.parametrize(
    ("arguments", "naming", "remedy"),
    [
        (["run", "quick", "--out", ""], "'--out': the path is empty", "see bench run --help"),
        (["run", "quick", "--data-dir", " "], "the path is empty", "name a file or folder"),
        (["leaderboard", ""], "the path is empty", "name a file or folder"),
        (["run", "quick", "--limit", "0"], "'--limit'", "see bench run --help"),
        (["run", "quick", "--seeds", "1"], "No such option: --seeds", "--seed"),
        (["run", "quick", "--n", "many"], "'--n'", "see bench run --help"),
        (["lederboard"], "No such command 'lederboard'", "see bench --help"),
        (["leaderboard"], "Missing argument", "see bench leaderboard --help"),
        (["run", "a", "b"], "unexpected extra argument", "see bench run --help"),
        (["ls", "attacks", "sqare"], "no attack is named 'sqare'", "did you mean 'square'?"),
        (["ls", "suites", "qick"], "no suite is named 'qick'", "suites: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_usage_error_is_one_line_like_every_mistake(arguments, naming, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = complaint(bench(*arguments))
    assert naming in line
    assert remedy in line


def test_the_version_is_told_either_way():
    assert bench("--version").out == bench("version").out != ""


def test_without_a_command_the_help_is_shown():
    ended = bench()
    assert ended.code == 0
    assert "leaderboard" in ended.out


def test_ls_alone_lists_the_kinds():
    kinds = [entry["kind"] for entry in json.loads(bench("ls", "--json").out)]
    assert kinds == ["attacks", "defenses", "models", "datasets", "suites"]
    assert "bench ls KIND NAME" in bench("ls").out


NAMED = [
    ("attacks", "square", "p_init", "--attack 'square(loss="),
    ("attacks", "torchattacks:", "", "--attack 'torchattacks:NAME'"),
    ("attacks", "standard", "epochs", "--attack 'standard"),
    ("defenses", "ops", "", "--defense 'ops"),
    ("models", "cnn", "width", "--model 'cnn(width=32)'"),
    ("datasets", "npz", "path", "--dataset 'npz(path=...)'"),
]


@pytest.mark.parametrize(("kind", "name", "parameter", "example"), NAMED, ids=lambda text: text)
def test_ls_tells_of_one_name(kind, name, parameter, example):
    ended = bench("ls", kind, name)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[0] == name
    assert parameter in ended.out
    assert example in ended.out
    assert "``" not in ended.out
    assert ":class:" not in ended.out
    told = json.loads(bench("ls", kind, name, "--json").out)
    assert told["name"] == name
    assert example in told["example"]


def test_a_docstring_is_broken_at_the_width_of_the_terminal():
    about = "First\nline.\n\nArgs:\n    a: one\n        thing.\n    b: other.\n\n- x\n- y"
    found = [(0, "First line."), (0, ""), (0, "Args:"), (4, "a: one thing."), (4, "b: other."), (0, "")]
    assert _paragraphs(about) == [*found, (0, "- x"), (0, "- y")]


def test_a_file_of_ones_own_cannot_take_a_name_of_ours(tmp_path):
    (tmp_path / "take.py").write_text(str(BROKEN["takes_our_name"]))
    arguments = ["--dataset", "digits", "--n", 2, "--model", "cnn", "--attack", f"{tmp_path / 'take.py'}:Square"]
    ended = bench("run", *arguments, "--out", tmp_path / "out")
    assert ended.code == 2
    assert f"two attacks are named 'square'; rename the one in {tmp_path / 'take.py'}" in ended.err
    assert attacks.factory("square").__module__ == "attacks.square"


def test_ls_shows_a_suite_as_it_is_written():
    assert bench("ls", "suites", "quick").out == (ROOT / "bench" / "suites" / "quick.toml").read_text()


BROKEN = {
    "raises": "raise RuntimeError('no luck')",
    "exits": "import sys; sys.exit(3)",
    "takes_our_name": "from bench.registry import attacks\n@attacks('square')\nclass Square: access = 'scores'",
    "shadows_a_family": "from bench.registry import attacks\n@attacks('torchattacks:PGD')\nclass P: access = 'scores'",
    "lacks_its_stage": "from bench.registry import defenses\n@defenses('mute')\nclass Mute: pass",
    "is_half_there": "from bench.registry import defenses\n@defenses('early')\nclass E: stage = 'output'\nraise Error",
    "is_not_there": None,
}
WORKS = """
from bench.registry import defenses

@defenses("theirs")
class Theirs:
    stage, random, version, paper = "output", False, 1, "ours"
"""


@pytest.fixture
def plugged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that announces plug-ins by their code, beside those that are there."""
    ours, before = registry.plugins(), [each.snapshot() for each in (attacks, defenses)]

    def plug(codes: dict[str, str | None]) -> None:
        for name, code in codes.items():
            if code is not None:
                (tmp_path / f"plugged_{name}.py").write_text(code)
        theirs = [EntryPoint(name, f"plugged_{name}", registry.GROUP) for name in codes]
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(registry, "plugins", lambda: (*theirs, *ours))
        forget()

    def forget() -> None:
        for known in (load_plugins, registry.code_hash, catalogue._remembered):
            known.cache_clear()

    yield plug
    for each, names in zip((attacks, defenses), before, strict=True):
        each.restore(names)
    for name in [name for name in sys.modules if name.startswith("plugged_")]:
        del sys.modules[name]
    monkeypatch.undo()
    forget()
    load_plugins()


@pytest.mark.parametrize("command", [["ls", "defenses"], ["version"], ["leaderboard", "FOLDER"]], ids=" ".join)
def test_broken_plugins_are_named_once_and_left_out(command, plugged, folder):
    plugged(BROKEN | {"works": WORKS})
    ended = bench(*[str(folder) if part == "FOLDER" else part for part in command])
    assert ended.code == 0
    warnings = ended.err.splitlines()
    assert len(warnings) == len(BROKEN)
    for name, line in zip(BROKEN, warnings, strict=True):
        assert line.startswith(f"warning: plug-in {name} (plugged_{name}) does not load and is left out: ")
    assert "two attacks are named 'square'; rename the one in" in ended.err
    assert {"theirs", "early", "mute"} & set(defenses.names()) == {"theirs"}
    assert attacks.factory("square").__module__ == "attacks.square"


@pytest.mark.parametrize("kind", ["attacks", "defenses", "models", "datasets", "suites"])
def test_lists_break_no_word_at_80_columns(kind, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = bench("ls", kind)
    entries = json.loads(bench("ls", kind, "--json").out)
    words = {word for entry in entries for key, value in entry.items() if key != "parameters" for word in said(value)}
    assert set(shown.out.split()) >= words
    assert max(map(len, shown.out.splitlines())) <= 80


def said(value: Any) -> list[str]:
    """The words of a value in a list."""
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    return ", ".join(value).split() if isinstance(value, list) else str(value).split()


@pytest.mark.parametrize(
    ("room", "short", "widths"),
    [
        (22, (), [2, 7, 9]),  # all in one line
        (18, (), [2, 6, 6]),  # what is left is shared
        (12, (), [2, 3, 3]),  # no word is broken
        (11, (), None),
        (18, ("c",), [2, 3, 9]),
        (17, ("c",), [2, 5, 6]),
    ],
)
def test_columns_share_the_room(room, short, widths):
    assert _widths(("a", "b", "c"), [("xx", "aaa bbb", "a bbb ccc")], room, short) == widths
