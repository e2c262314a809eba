"""``bench run``: a grid run, its table printed; or planned and its cost told."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from bench.cli.console import DataDir, ModelDir, console, loader, path, say_stopped, say_whose_code
from bench.cli.console import devices as find_devices
from bench.cli.terminal_table import columns
from bench.entries.statement import entered_track
from bench.errors import ConfigError
from bench.plan.suite import load_suite
from bench.report.flags import write_flags
from bench.report.leaderboard import render
from bench.report.standings import tables
from bench.results.store import Store
from bench.rules import rules_of
from bench.run.part import WHOLE, Part
from bench.run.progress import Screen, duration
from bench.spec import Spec, parse_chain
from bench.system.interrupt import Stopped

if TYPE_CHECKING:
    import torch

    from bench.run.estimate import Estimate

CHOICE = "may be repeated. What the suite has is picked by its name; anything else takes the place of what it has."


def run(
    suite: Annotated[str | None, typer.Argument(help="A suite by name (see `bench ls suites`) or a TOML file.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set, as in `bench ls datasets`.")] = None,
    n: Annotated[int | None, typer.Option(help="Test images.")] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Model; {CHOICE}")] = None,
    defense: Annotated[list[str] | None, typer.Option(help=f"Chain such as 'pgd-at + rnd'; {CHOICE}")] = None,
    attack: Annotated[list[str] | None, typer.Option(help=f"Attack; {CHOICE}")] = None,
    norm: Annotated[str | None, typer.Option(help="linf, l2 or l1.")] = None,
    eps: Annotated[str | None, typer.Option(help="Radius on the pixel scale, such as 8/255.")] = None,
    queries: Annotated[int | None, typer.Option(help="Query budget of each sample.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed; may be repeated.")] = None,
    numerics: Annotated[str | None, typer.Option(help="Precision of the search: fast (default) or plain.")] = None,
    quantise: Annotated[bool | None, typer.Option("--quantise/--no-quantise", help="8-bit service.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many samples a cell; marks the rows.")] = None,
    out: Annotated[Path | None, typer.Option(parser=path, help="Results folder; runs/SUITE by default.")] = None,
    data_dir: DataDir = None,
    model_dir: ModelDir = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, …; a GPU where there is one. cuda:0,cuda:1: workers on each.")
    ] = None,
    executor: Annotated[
        str | None, typer.Option(help="Who does the work: local (this process), processes, ray.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a running Ray cluster, host:port; without it Ray is started here.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes: one for each idle core or each device by default.")
    ] = None,
    unit_timeout: Annotated[
        float | None, typer.Option(min=0, help="Seconds after which a shard or a training that hangs has failed.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images in one forward; 256 on a CPU, 1024 on a GPU.")
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(min=1, help="Samples stored at once, the cost of a kill; 100, 1000 on GPUs, 4000 on one GPU."),
    ] = None,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="Serve all output defenses from a process of their own, not only files.")
    ] = False,
    examples: Annotated[
        bool, typer.Option("--examples", help="Keep the final examples of attacks beside their records.")
    ] = False,
    max_cost: Annotated[
        float | None, typer.Option(min=0, help="What questions to services may cost, by the price that they declare.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="K/N: only the K-th of N parts, for job arrays; bench merge joins folders.")
    ] = None,
    worst_only: Annotated[
        bool, typer.Option("--worst-only", help="Run an attack only on what those before it have left, as ranks need.")
    ] = False,
    until: Annotated[
        str | None, typer.Option(help="Stop cells early: width=POINTS, of a 95 % interval, or ranked.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost, run nothing.")] = False,
) -> None:
    """Run a grid of models, defenses and attacks, and print its table.

    The same command again runs only what is missing or has failed.
    """
    from bench.measure.pipeline import Pipeline
    from bench.plan.tasks import expand
    from bench.release.contact_sheet import write_sheets
    from bench.run.choice import choose
    from bench.run.estimate import estimate
    from bench.run.executor import Local
    from bench.run.runner import run as run_tasks
    from bench.run.until import parse as parse_until
    from bench.service import Spent
    from bench.system.threads import TRAINING, use_spare_threads

    overrides = {
        "dataset": dataset, "n": n, "model": model, "defense": defense, "attack": attack, "norm": norm, "eps": eps,
        "queries": queries, "seed": seed, "numerics": numerics, "quantise": quantise,
    }  # fmt: skip
    plan, share = load_suite(suite, overrides), Part.parse(part) if part else WHOLE
    if worst_only and part:
        raise ConfigError("--part with --worst-only; the attacks on a network wait for each other, so leave one out")
    if until and (part or worst_only):
        raise ConfigError(f"--until with {'--part' if part else '--worst-only'}; cells wait for what others come to, "
                          "so leave one out")
    rule = parse_until(until) if until else None
    devices = find_devices(device)
    where = devices[0]
    who = choose(executor, devices, workers, unit_timeout, address)
    threads = use_spare_threads()
    batch_size = batch_size or (1024 if where.type == "cuda" else 256)
    # A GPU waits for the steps of an attack, which cost the same for many samples; several of them divide a cell.
    usual = 4000 if isinstance(who, Local) and rule is None else 1000
    shard_size = shard_size or (usual if where.type == "cuda" else 100)
    out = out or Path("runs") / plan.name
    alone = [Spec.parse(name) for grid in plan.grid for name in (grid.dataset, *grid.model, *grid.attack)]
    say_whose_code([*alone, *(spec for grid in plan.grid for chain in grid.defense for spec in parse_chain(chain))])
    tasks = expand(plan, loader(data_dir, model_dir), limit)
    if plan.board and (found := entered_track(task.cell for task in tasks)) != plan.board.track:
        raise ConfigError(f"{plan.label} is a board of the track {plan.board.track}, and its cells are of {found}")
    if rule:
        rule.check([task.cell for task in tasks])
    store = Store(out.resolve())
    if dry_run:
        _print_plan(plan.label, estimate(tasks, store, where, batch_size), where)
        return
    store.open()
    if not isinstance(who, Local):
        console.print(f"{who}, in trainings {TRAINING}", style="dim")
    elif where.type == "cpu":
        console.print(f"threads: {threads}, in trainings {TRAINING}", style="dim")
    most = math.inf if max_cost is None else max_cost
    pipeline = Pipeline(store.root / "networks", where, batch_size, isolate=isolate, max_cost=most)
    try:
        pipeline.try_services(tasks)
        with Screen(console, (task.cell for task in tasks)) as screen:
            outcome = run_tasks(
                tasks, store, pipeline, shard_size, batch_size, screen, examples, share, who, unit_timeout, worst_only,
                rule,
            )
    except Stopped as stop:
        why, how = (f": {stop}", "a larger --max-cost") if isinstance(stop, Spent) else ("", "the same command")
        say_stopped(f"stopped{why}; finished shards are kept in {out}, {how} resumes")
        raise typer.Exit(stop.exit_code) from None
    rows = [row for row in (store.row(task.cell) for task in tasks) if row.shards]
    shown = tables(rows, plan.budgets)
    console.print(Text(f"\n{render(shown, 'md', details=False)}"), soft_wrap=True)
    stored, _ = store.rows()  # flags are of the folder, whatever part of it has run now
    write_flags(store.root / "flags.json", [flag for table in tables(stored) for flag in table.flags])
    write_sheets(tasks, pipeline, store.root / "sheets")
    console.print(
        f"{f'part {share}: ' if part else ''}{outcome.ran} cells run, {outcome.kept} were done before, "
        f"{outcome.failed} failed; rows in {out}; "
        "`bench leaderboard` prints every figure of theirs",
        soft_wrap=True,
    )
    for journal in pipeline.journals:
        console.print(
            f"{journal.questions:,} questions asked in all, {journal.spent:.6g} spent; journal in {journal.path}",
            soft_wrap=True,
        )
    if outcome.failed:
        raise typer.Exit(1)


def _print_plan(name: str, plans: "list[Estimate]", device: "torch.device") -> None:
    for setting in dict.fromkeys(plan.task.cell.setting for plan in plans):
        lines = [
            (
                plan.task.cell.defense_name, plan.task.cell.attack.spec, str(plan.samples), f"{plan.queries:,}",
                *_times(plan),
            )
            for plan in plans if plan.task.cell.setting == setting
        ]  # fmt: skip
        names = ("defense", "attack", "samples", "queries ≤", "training ≈", "time ≤")
        table = columns(names, lines, console.width, title=setting)
        console.print(table)
        console.print()
    cells = f"{len(plans)} {'cell' if len(plans) == 1 else 'cells'}"
    queries, seconds = sum(plan.queries for plan in plans), sum(plan.seconds or 0.0 for plan in plans)
    untimed = sum(plan.training is None for plan in plans)
    trainings = sum(plan.training or 0.0 for plan in plans)
    told = [f"{queries:,} queries at most, {duration(seconds)} at most on {device.type}"]
    told += [f"about {duration(trainings)} for trainings, of which a few images were timed"] if trainings else []
    told += [f"{untimed} {'training' if untimed == 1 else 'trainings'} that cannot be timed"] if untimed else []
    told += ["services aside"] if any(plan.task.service for plan in plans) else []
    unknown = any(plan.seconds is None and not plan.task.service for plan in plans)
    told += ["output defenses that are yet to be trained aside"] if unknown else []
    told += ["what attacks do on networks of their own aside"] if any(_on_their_own(plan) for plan in plans) else []
    told += ["data defenses aside"] if any(plan.task.chain.data and plan.samples for plan in plans) else []
    console.print(f"{name}: {cells}, {', '.join(told)}; nothing was run", soft_wrap=True)
    if price := sum(plan.queries * plan.task.service.price for plan in plans if plan.task.service):
        console.print(
            f"the queries to services cost {price:,.6g} at most; judging and probing come on top", soft_wrap=True
        )


def _on_their_own(plan: "Estimate") -> bool:
    """Whether the attack works on other networks than the one that it asks, or trains some, while it attacks."""
    attack = plan.task.attack
    surrogate = rules_of(attack).surrogate and not hasattr(attack, "fit")
    return bool(plan.samples) and (surrogate or getattr(attack, "whole_set", False))


def _times(plan: "Estimate") -> tuple[str, str]:
    """Of the training that the cell is the first to need, and of its queries."""
    training = "not timed" if plan.training is None else duration(plan.training) if plan.training else ""
    if not plan.samples:
        return training, "done"
    return training, "not timed" if plan.seconds is None else duration(plan.seconds) if plan.queries else ""
