"""The command line: arguments in, a grid run, tables out."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table

import bench
from bench.compare import Style, duels, render_duels
from bench.contact_sheet import write_sheets
from bench.errors import BenchError, ConfigError, StoreError
from bench.estimate import Estimate, estimate
from bench.flags import write_flags
from bench.grid import Loader, Task, expand
from bench.leaderboard import Format, render
from bench.match import match, render_matches
from bench.pipeline import Pipeline
from bench.progress import Screen, Steps, duration
from bench.protect import protect as protect_images
from bench.protect import report
from bench.published import load_published, result_folders
from bench.registry import REQUIRED, Registry, attacks, datasets, defenses, load_plugins, models, parameters
from bench.runner import run as run_tasks
from bench.standings import tables
from bench.store import Row, Store
from bench.suite import load_suite, suite_names

app = typer.Typer(
    help="Parry: robustness evaluation for models, data and services that defend themselves.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
)  # fmt: skip
# What users write may look like markup or, as in "file.py:x:", like an emoji.
console = Console(markup=False, emoji=False, highlight=False)
errors = Console(markup=False, emoji=False, highlight=False, stderr=True)

Kind = Literal["attacks", "defenses", "models", "datasets", "suites"]


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2, never a traceback."""
    try:
        load_plugins()
        app()
    except BenchError as error:
        _complain(error)
        sys.exit(2)


@app.command()
def run(
    suite: Annotated[str | None, typer.Argument(help="A suite by name (see `bench ls suites`) or a TOML file.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set, as in `bench ls datasets`.")] = None,
    n: Annotated[int | None, typer.Option(help="Test images.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Model; may be repeated.")] = None,
    defense: Annotated[list[str] | None, typer.Option(help="Chain such as 'pgd-at + rnd'; may be repeated.")] = None,
    attack: Annotated[list[str] | None, typer.Option(help="Attack; may be repeated.")] = None,
    norm: Annotated[str | None, typer.Option(help="linf or l2.")] = None,
    eps: Annotated[str | None, typer.Option(help="Radius on the pixel scale, such as 8/255.")] = None,
    queries: Annotated[int | None, typer.Option(help="Query budget of each sample.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed; may be repeated.")] = None,
    numerics: Annotated[str | None, typer.Option(help="fast (default) or plain numbers for the search.")] = None,
    quantise: Annotated[bool | None, typer.Option("--quantise/--no-quantise", help="8-bit service.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many samples a cell; marks the rows.")] = None,
    out: Annotated[Path | None, typer.Option(help="Results folder; runs/SUITE by default.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(envvar="BENCH_DATA_DIR", help="Folder that holds the data sets.")
    ] = None,
    model_dir: Annotated[
        Path | None, typer.Option(envvar="BENCH_MODEL_DIR", help="Folder that holds weights; beside the data folder.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; a GPU where there is one.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images in one forward; 256 on a CPU, 1024 on a GPU.")
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="Samples stored at once, the cost of a kill; 100, or 1000 on a GPU.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost, run nothing.")] = False,
) -> None:
    """Run a grid of models, defenses and attacks, and print its table.

    The same command again runs only what is missing or has failed.
    """
    overrides = {
        "dataset": dataset, "n": n, "model": model, "defense": defense, "attack": attack, "norm": norm, "eps": eps,
        "queries": queries, "seed": seed, "numerics": numerics, "quantise": quantise,
    }  # fmt: skip
    plan = load_suite(suite, overrides)
    where = _device(device)
    batch_size = batch_size or (1024 if where.type == "cuda" else 256)
    shard_size = shard_size or (1000 if where.type == "cuda" else 100)
    if model_dir is None and data_dir is not None:
        model_dir = data_dir.resolve().parent / "models"
    _say_whose_code(tasks := expand(plan, Loader(data_dir, model_dir), limit))
    store = Store(out or Path("runs") / plan.name)
    if dry_run:
        _print_plan(plan.name, estimate(tasks, store, where, batch_size), where)
        return
    store.open()
    pipeline = Pipeline(store.root / "networks", where, batch_size)
    try:
        with Screen(console, len(tasks)) as screen:
            outcome = run_tasks(tasks, store, pipeline, shard_size, batch_size, screen)
    except KeyboardInterrupt:
        errors.print(f"stopped; finished shards are kept in {store.root}, the same command goes on", soft_wrap=True)
        raise typer.Exit(130) from None
    rows = [store.row(task.cell) for task in tasks]
    shown = tables(rows, plan.budgets)
    write_flags(store.root / "flags.json", [flag for table in shown for flag in table.flags])
    console.print(f"\n{render(shown, 'md', details=False)}", soft_wrap=True)
    write_sheets(tasks, pipeline, store.root / "sheets")
    console.print(
        f"{outcome.ran} cells run, {outcome.kept} were done before, {outcome.failed} failed; rows in {store.root}; "
        "`bench leaderboard` prints every figure of theirs",
        soft_wrap=True,
    )
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
def leaderboard(
    folder: Annotated[Path, typer.Argument(help="A results folder.")],
    style: Annotated[str, typer.Option("--format", help="md, csv, latex or json.")] = "md",
    budget: Annotated[
        list[int] | None, typer.Option(min=1, help="Query budget to show; may be repeated; 100 and 1000 by default.")
    ] = None,
) -> None:
    """Print the tables of the rows in a folder."""
    if style not in get_args(Format):
        raise ConfigError(f"format is {style!r}; use one of {', '.join(get_args(Format))}")
    rows, damaged = Store(folder).rows()
    if not rows and not damaged:
        raise ConfigError(f"{folder} holds no rows; run a suite with --out {folder} first")
    print(render(tables(rows, budget or (100, 1000)), style))  # type: ignore[arg-type]
    for error in damaged:
        _complain(error)
    if damaged:
        raise typer.Exit(2)


@app.command()
def compare(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Results folders; all of leaderboards/ with --published.")
    ] = None,
    published: Annotated[bool, typer.Option("--published", help="Hold the rows against published figures.")] = False,
    defense: Annotated[
        list[str] | None, typer.Option(help="Twice: compare these two chains on the same samples.")
    ] = None,
    budget: Annotated[
        list[int] | None, typer.Option(min=1, help="With --defense, query budgets; 100, 1000 and the largest.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="With --published, list what has not run, too.")] = False,
    figures: Annotated[
        Path | None, typer.Option(help="Folder of published figures; leaderboards/published of the checkout.")
    ] = None,
    style: Annotated[str, typer.Option("--format", help="md, csv or json.")] = "md",
) -> None:
    """Compare rows with published figures, or two defenses with each other."""
    if style not in get_args(Style):
        raise ConfigError(f"format is {style!r}; use one of {', '.join(get_args(Style))}")
    if published == bool(defense):
        raise ConfigError(f"{'both' if published else 'neither'} of --published and --defense; give one of the two")
    if published and budget:
        raise ConfigError("--budget with --published; leave it out, published figures have budgets of their own")
    if defense and len(defense) != 2:
        raise ConfigError(f"--defense is given {len(defense)} time(s); give it twice, once for each chain")
    if defense and not folders:
        raise ConfigError("no results folder; name one, as in bench compare FOLDER --defense A --defense B")
    known = load_published(figures) if published else None
    rows: list[Row] = []
    damaged: list[StoreError] = []
    for folder in folders or result_folders():
        stored, broken = Store(folder).rows()
        if not stored and not broken:
            raise ConfigError(f"{folder} holds no rows; run a suite with --out {folder} first")
        rows += stored
        damaged += broken
    if defense:
        print(render_duels(duels(rows, defense[0], defense[1], budget), style))  # type: ignore[arg-type]
    elif known:
        print(render_matches(match(known, rows), known, style, everything))  # type: ignore[arg-type]
    for error in damaged:
        _complain(error)
    if damaged:
        raise typer.Exit(2)


@app.command()
def protect(
    defense: Annotated[str, typer.Option(help="A defense of the data stage, as in `bench ls defenses`.")],
    source: Annotated[
        Path, typer.Option("--in", help="Class folders of images, an .npz file, or a Parquet file or folder.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the protected set, its manifest and a contact sheet.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of a random defense.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; a GPU where there is one.")] = None,
) -> None:
    """Protect your own training images with a data defense, in the layout they have.

    The same command again goes on where it was stopped.
    """
    where = _device(device)
    if ".py:" in defense:
        errors.print(f"running code from {defense.split('.py:')[0]}.py", style="yellow", soft_wrap=True)
    started = time.monotonic()
    try:
        with Steps(console) as steps:
            done = protect_images(defense, source, out, seed, where, steps)
    except KeyboardInterrupt:
        errors.print(f"stopped; what is done is kept in {out}, the same command goes on", soft_wrap=True)
        raise typer.Exit(130) from None
    for line in report(done, out):
        console.print(line, soft_wrap=True)
    console.print(f"took {duration(time.monotonic() - started)}", style="dim")


@app.command()
def ls(
    kind: Annotated[str, typer.Argument(help="attacks, defenses, models, datasets or suites.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List what can be named in a suite."""
    if kind not in get_args(Kind):
        raise ConfigError(f"cannot list {kind!r}; use one of {', '.join(get_args(Kind))}")
    if kind == "suites":
        entries: list[dict[str, Any]] = [{"name": name, "title": title} for name, title in suite_names().items()]
    else:
        registries: dict[str, Registry[Any]] = {
            "attacks": attacks, "defenses": defenses, "models": models, "datasets": datasets,
        }  # fmt: skip
        entries = [_entry(registries[kind], name) for name in registries[kind].names()]
    if as_json:
        print(json.dumps(entries, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in entries[0]:
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for entry in entries:
        table.add_row(*(_cell(value) for value in entry.values()))
    console.print(table)


@app.command()
def version() -> None:
    """Print the version."""
    print(f"parry-bench {bench.__version__}, torch {torch.__version__}")


def _complain(error: BenchError) -> None:
    errors.print(f"error: {' '.join(str(error).splitlines())}", style="red", soft_wrap=True)


def _entry(registry: Registry[Any], name: str) -> dict[str, Any]:
    """What a component says of itself."""
    factory = registry.factory(name)
    family = name.endswith(":")
    takes = list((parameters(factory) or {}).items())[family:]  # a family's first argument follows the colon
    entry: dict[str, Any] = {"name": name}
    if registry is defenses:
        entry |= {"stage": factory.stage, "random": getattr(factory, "random", False)}  # type: ignore[attr-defined]
    if registry is attacks:
        norms = getattr(factory, "norms", ())
        entry |= {
            "access": "depends" if family else _declared(getattr(factory, "access", None)),
            "norms": [] if isinstance(norms, property) else sorted(norms),
        }
    about = (factory.__doc__ or "").splitlines()[0] if family and not hasattr(factory, "paper") else ""
    return {**entry, "parameters": dict(takes), "paper": about or _declared(getattr(factory, "paper", ""))}


def _declared(value: Any) -> str:
    """A class attribute; families decide only once they are named in full."""
    return "depends" if isinstance(value, property) else value or ""


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(key if item is REQUIRED else f"{key}={_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError):
        raise ConfigError(f"device {name!r} is not there; use cpu, or cuda where a GPU is installed") from None
    return device


def _print_plan(name: str, plans: list[Estimate], device: torch.device) -> None:
    for setting in dict.fromkeys(plan.task.cell.setting for plan in plans):
        table = Table(box=None, pad_edge=False, header_style="bold", title=setting, title_justify="left")
        for column in ("defense", "attack"):
            table.add_column(column, overflow="fold")
        for column in ("samples", "queries ≤", "time ≤"):
            table.add_column(column, justify="right", no_wrap=True)
        for plan in plans:
            cell = plan.task.cell
            if cell.setting == setting:
                time = _time(plan) if plan.samples else "done"
                table.add_row(cell.defense_name, cell.attack.spec, str(plan.samples), f"{plan.queries:,}", time)
        console.print(table)
        console.print()
    cells = f"{len(plans)} {'cell' if len(plans) == 1 else 'cells'}"
    queries, seconds = sum(plan.queries for plan in plans), sum(plan.seconds for plan in plans)
    console.print(
        f"{name}: {cells}, {queries:,} queries at most, {duration(seconds)} at most on {device.type}, "
        "training aside; nothing was run",
        soft_wrap=True,
    )


def _time(plan: Estimate) -> str:
    if plan.task.learns:
        return "training"
    return ("training + " if plan.task.trains else "") + duration(plan.seconds)


def _say_whose_code(tasks: list[Task]) -> None:
    """Tell the user which files of theirs this run executes."""
    cells = [task.cell for task in tasks]
    components = [part for cell in cells for part in (cell.dataset, cell.model, cell.attack, *cell.defense)]
    files = sorted({part.spec.split(".py:")[0] + ".py" for part in components if ".py:" in part.spec})
    for file in files:
        errors.print(f"running code from {file}", style="yellow", soft_wrap=True)


if __name__ == "__main__":
    main()
