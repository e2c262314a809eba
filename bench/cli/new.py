"""``bench new``: a working template of a defense, an attack or a model, and its test."""

import keyword
import re
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from string import Template
from typing import Annotated, Literal, get_args

import typer

from bench.catalogue import listed
from bench.cli.console import console, path
from bench.declarations import Stage
from bench.errors import ConfigError
from bench.registry import Registry, attacks, defenses, models
from bench.spec import Spec

Kind = Literal["defense", "attack", "model"]
REGISTRIES: dict[str, Registry[object]] = {"defense": defenses, "attack": attacks, "model": models}  # type: ignore[dict-item]
NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*")
LONGEST = 100  # characters of a name, as of an entry; names of files have an end, too

# A first run of what each template makes; the suite has the data, the network and the budget.
RUNS = {
    "output": "bench run quick --defense none --defense {} --attack square",
    "training": "bench run quick --defense none --defense {} --attack square",
    "data": "bench run quick --defense none --defense {} --attack standard",
    "attack": "bench run quick --defense none --attack square --attack {}",
    "model": "bench run quick --defense none --model cnn --model {} --attack square",
}  # fmt: skip

TRIALS = {"output": "query", "training": "white-box", "data": "data"}  # tracks, with suites on digits for a trial


def new(
    kind: Annotated[str, typer.Argument(help="defense, attack or model.")],
    name: Annotated[str, typer.Argument(help="What it is to be called, such as my-defense.")],
    stage: Annotated[str | None, typer.Option(help="Of a defense: output, training or data.")] = None,
    out: Annotated[Path | None, typer.Option(parser=path, help="Folder; the current one by default.")] = None,
    package: Annotated[
        bool, typer.Option("--package", help="A folder of its own that pip installs, so that the name is known.")
    ] = False,
) -> None:
    """Write a small working defense, attack or model to start from, and a test for it."""
    template = _template(kind, stage)
    module, title = _names(kind, name)
    folder = (out or Path()) / (name if package else "")
    _hides_nothing(module, folder)
    files = {f"{module}.py": template, f"test_{module}.py": f"test_{template}"}
    if package:
        files["pyproject.toml"] = "package"
    _write(folder, {file: _text(each, name, module, title) for file, each in files.items()})
    file = folder / f"{module}.py"
    where = str(file) if folder.is_absolute() else f"./{file.as_posix()}"
    spec = name if package else str(Spec(f"{where}:{title}", {}))
    console.print(f"wrote {', '.join(str(folder / each) for each in files)}; next:", soft_wrap=True)
    shown, test = _in_shell(spec), quote(str(folder / f"test_{module}.py"))
    steps = [f"bench check {shown}", RUNS[template].format(shown), f"python -m pytest {test}"]
    if track := TRIALS.get(template):
        steps.append(f"bench submit {shown} --track {track} --suite {track}-digits --name {title} --authors YOU")
    if package:
        steps.insert(0, f"pip install --editable {quote(str(folder))}")
    for step in steps:
        console.print(f"  {step}", soft_wrap=True, style="cyan")


def _in_shell(spec: str) -> str:
    return f'"{spec}"' if "'" in spec and not re.search(r'["$`\\!]', spec) else quote(spec)


def _template(kind: str, stage: str | None) -> str:
    if kind not in get_args(Kind):
        raise ConfigError(f"cannot write a new {kind!r}; use one of {', '.join(get_args(Kind))}")
    stages = get_args(Stage)[::-1]
    if kind != "defense":
        if stage is not None:
            raise ConfigError(f"--stage says where a defense acts; leave it out for {kind}s")
        return kind
    if stage is None or stage not in stages:
        came = "no --stage" if stage is None else f"stage is {stage!r}"
        raise ConfigError(f"{came}; a defense acts at one of {', '.join(stages)}, as in --stage output")
    return stage


def _names(kind: str, name: str) -> tuple[str, str]:
    """The module and the class for ``name``.

    Raises:
        ConfigError: it cannot be one, or is taken.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"name is {name!r}; use letters, digits and single hyphens, as in my-{kind}")
    if len(name) > LONGEST:
        raise ConfigError(f"name has {len(name)} characters; use at most {LONGEST}")
    if name in listed(REGISTRIES[kind]):
        article = "an" if kind == "attack" else "a"
        raise ConfigError(f"{article} {kind} is named {name!r} already; choose another name, as in my-{name}")
    module = name.lower().replace("-", "_")
    title = "".join(word[0].upper() + word[1:] for word in re.split("[-_]", name))
    if keyword.iskeyword(module) or keyword.iskeyword(title) or name == "none":
        raise ConfigError(f"name is {name!r}, which means something else; choose another, as in my-{name}")
    return module, title


def _hides_nothing(module: str, folder: Path) -> None:
    """Raise a ConfigError where a file of this name in ``folder`` would be imported in the place of another module."""
    found = find_spec(module)
    if found is not None and found.origin and Path(found.origin).resolve().parent != folder.resolve():
        raise ConfigError(f"{module}.py would hide a module that others import; choose another name, as in my-{module}")


def _text(template: str, name: str, module: str, title: str) -> str:
    text = (resources.files("bench") / "templates" / f"{template}.txt").read_text(encoding="utf-8")
    return Template(text).substitute(name=name, module=module, Class=title)


def _write(folder: Path, texts: dict[str, str]) -> None:
    """Write new files.

    Raises:
        ConfigError: one is there already, and nothing is written; or the folder takes none.
    """
    there = [str(folder / name) for name in texts if (folder / name).exists()]
    if there:
        raise ConfigError(f"{', '.join(there)} is there already; choose another name or another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
