"""An entry written from what a run has stored: whole, or not at all."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.entries.about import About
from bench.entries.folder import CODE, ENTRY, NETWORKS, ROWS, contents, hashed
from bench.entries.statement import sealed, statement
from bench.errors import ConfigError, StoreError
from bench.measure.pipeline import Pipeline
from bench.plan.pin import code_files
from bench.plan.suite import Suite
from bench.plan.tasks import Task
from bench.results.store import Row, Store, place
from bench.spec import Spec
from bench.system.claims import Held, claim
from bench.system.files import slug
from bench.system.user_code import local_files


def check_place(out: Path) -> None:
    """Whether an entry can be written as ``out``.

    Raises:
        ConfigError: something is there.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already; remove it, or choose another --out")


def assemble(
    tasks: Sequence[Task], store: Store, pipeline: Pipeline, out: Path, about: About, suite: Suite,
    specs: Iterable[Spec],
) -> list[Row]:  # fmt: skip
    """Write the entry of ``tasks``, all of which ``store`` holds, as the folder ``out``; ``specs`` may name code.

    Returns:
        Its rows.

    Raises:
        ConfigError: another run has written it meanwhile, or is about to.
        StoreError: the disk is full.
    """
    try:
        with claim(out.with_name(f".{out.name}.lock")):
            check_place(out)
            return _assemble(tasks, store, pipeline, out, about, suite, specs)
    except Held:
        raise ConfigError(f"another run is writing {out}; wait for it, or choose another --out") from None


def _assemble(
    tasks: Sequence[Task], store: Store, pipeline: Pipeline, out: Path, about: About, suite: Suite,
    specs: Iterable[Spec],
) -> list[Row]:  # fmt: skip
    beside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        for folder in dict.fromkeys(place(task.cell) for task in tasks):
            shutil.copytree(store.root / folder, beside / ROWS / folder, ignore=shutil.ignore_patterns("*.failed.json"))
        for path in {path for task in tasks for path in pipeline.made_for(task)}:
            _copy(path, beside / NETWORKS / path.name)
        for file in {file for spec in specs for file in code_files(spec)}:
            for local in local_files(file):
                _copy(local, beside / CODE / local.relative_to(file.parent.resolve()))
            _copy(file, beside / CODE / file.name)
        rows, _ = Store(beside / ROWS).rows()
        sizes = contents(beside)
        files = {name: {"bytes": sizes[name], "sha256": digest} for name, digest in hashed(beside, sizes).items()}
        said = statement(rows, about, suite.name, suite.label, suite.budgets)
        (beside / ENTRY).write_bytes(sealed({**said, "files": files}))
        beside.rename(out)
    except OSError as error:
        raise StoreError(f"cannot write {out}: {error.strerror or error}; free some space and submit again") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return rows


def default_place(about: About) -> Path:
    """Where the entry goes where nobody says."""
    return Path("entries") / (slug(about.name) or "entry")


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, to)
