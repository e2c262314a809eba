"""``bench submit``: a defense run through the suite of its track, and written as an entry that others can check."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from bench.cli.console import DataDir, Device, ModelDir, console, loader, path, say_stopped, say_whose_code
from bench.cli.console import device as find_device
from bench.entries.about import read_about
from bench.entries.folder import ENTRY, contents
from bench.entries.plan import DEFAULTS, entry_suite, untried
from bench.entries.statement import entered_track
from bench.errors import ConfigError, did_you_mean
from bench.report.standings import tables
from bench.results.examples import SUFFIX
from bench.results.store import Store
from bench.run.progress import Screen
from bench.spec import Spec, parse_chain
from bench.system.interrupt import Stopped
from bench.system.user_code import named_file

NEXT = """
Next, in words: look at the figures with

    bench leaderboard {out}

and at what others will look at with

    bench validate {out}
{offer}"""

OFFER = """
Then put the folder, as it is, under entries/ of a copy of Parry, on a branch of its own, and offer it:

    git switch --create entry-{name}
    git add entries/{name}
    git commit --message "Enter {name}"
    git push --set-upstream origin entry-{name}

and open a pull request from that branch. Until somebody else has run bench verify, it stands as self-reported."""


TRIAL = """
It has met few samples, as --limit says: it is never ranked, and is not for offering. Run the same command without
--limit, and with another --out, for an entry that is; what has run is gone on with."""


def submit(
    defense: Annotated[str, typer.Argument(help="Your defense, path/to/file.py:Name, or a chain.")],
    track: Annotated[str, typer.Option(help="query, white-box, data or certificate.")],
    model: Annotated[list[str] | None, typer.Option(help="Model; may be repeated; those of the suite.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="Suite of the track; that on CIFAR-10. For a trial: query-digits.")
    ] = None,
    about: Annotated[
        Path | None, typer.Option(parser=path, help="TOML file with name, authors, paper, link, summary.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the entry is called.")] = None,
    authors: Annotated[list[str] | None, typer.Option(help="An author; may be repeated.")] = None,
    paper: Annotated[str | None, typer.Option(help="Its paper.")] = None,
    link: Annotated[str | None, typer.Option(help="Where to read more.")] = None,
    summary: Annotated[str | None, typer.Option(help="A sentence about it.")] = None,
    out: Annotated[Path | None, typer.Option(parser=path, help="Folder of the entry; entries/NAME.")] = None,
    work: Annotated[
        Path | None, typer.Option(parser=path, help="Results folder to run in and resume from; runs/submit-NAME.")
    ] = None,
    checks: Annotated[bool, typer.Option("--check/--no-check", help="Begin with bench check of your code.")] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many samples a cell; never ranked.")] = None,
    data_dir: DataDir = None,
    model_dir: ModelDir = None,
    device: Device = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images in one forward; 256, or 1024 on a GPU.")] = None,
) -> None:
    """Run your defense through the suite of a track, adaptive attacks and all, and write an entry of what came of it.

    The same command again goes on where it was stopped. Only code that you name runs.
    """
    from bench.entries.assemble import assemble, check_place, default_place
    from bench.measure.pipeline import Pipeline
    from bench.plan.tasks import expand
    from bench.run.runner import run as run_tasks
    from bench.system.threads import use_spare_threads

    flags = {"name": name, "authors": authors, "paper": paper, "link": link, "summary": summary}
    told = read_about(about, flags)
    if track not in DEFAULTS:
        raise ConfigError(f"track is {track!r}; {did_you_mean(track, DEFAULTS)}")
    suite = suite or DEFAULTS[track]
    plan = entry_suite(suite, defense, model or [])
    out = out or default_place(told)
    check_place(out)
    where, _ = find_device(device), use_spare_threads()
    batch_size = batch_size or (1024 if where.type == "cuda" else 256)
    specs = [*parse_chain(defense), *(Spec.parse(name) for grid in plan.grid for name in (*grid.model, *grid.attack))]
    say_whose_code(specs)
    tasks = expand(plan, loader(data_dir, model_dir), limit)
    if (found := entered_track(task.cell for task in tasks)) != track:
        raise ConfigError(f"the suite {suite} is of the track {found}, not {track}; change --suite or --track")
    if checks:
        _check(parse_chain(defense))
    for attack in untried([task.cell for task in tasks]) if track == "query" else ():
        console.print(
            f"{defense} says that {attack} knows it, which {suite} does not have: the entry will not be ranked",
            style="yellow", soft_wrap=True,
        )  # fmt: skip
    store = Store((work or Path("runs") / f"submit-{out.name}").resolve()).open()
    pipeline = Pipeline(store.root / "networks", where, batch_size)
    try:
        with Screen(console, (task.cell for task in tasks)) as screen:
            outcome = run_tasks(tasks, store, pipeline, 1000, batch_size, screen, examples=True)
    except Stopped as stop:
        say_stopped(f"stopped; finished cells are kept in {store.root}, the same command goes on")
        raise typer.Exit(stop.exit_code) from None
    if outcome.failed:
        console.print(
            f"{outcome.failed} cells failed, so this is no entry; tracebacks are in {store.root}", style="red"
        )
        raise typer.Exit(1)
    rows = assemble(tasks, store, pipeline, out, told, plan, specs)
    boards = tables(rows, plan.budgets)
    fired = [(table.title, flag) for table in boards for flag in table.flags if flag.defense != "none"]
    sizes = contents(out)
    proof = sum(size for name, size in sizes.items() if name.endswith(SUFFIX))
    console.print(f"{out / ENTRY} is written: {len(rows)} cells, {sum(sizes.values()) / 1e6:.2f} MB, of which "
                  f"{proof / 1e6:.2f} MB are final examples", soft_wrap=True)  # fmt: skip
    for title, flag in fired:
        on = f" ({title})" if len(boards) > 1 else ""
        console.print(f"red flag {flag.flag}{on}: {flag.evidence}", style="yellow", soft_wrap=True)
    console.print(f"red flags: {len(fired)}; each is a reason to look, none a verdict", soft_wrap=True)
    for line in last_words(out, trial=limit is not None).splitlines():
        console.print(line, soft_wrap=True)


def last_words(out: Path, trial: bool) -> str:
    """What to do with the entry ``out``; a ``trial`` has met few samples, and nobody ranks it."""
    return NEXT.format(out=out, offer=TRIAL if trial else OFFER.format(name=out.name))


def _check(chain: Iterable[Spec]) -> None:
    """Try what is the user's own in ``chain`` before anything slow; rules that are broken end the command."""
    from bench.check import check

    own = [spec for spec in chain if named_file(spec.name)]
    broken = [(spec, verdict) for spec in own for verdict in check(spec, processes=False) if verdict.failed]
    for spec, verdict in broken:
        console.print(f"{spec}: {verdict.rule}: {verdict.saw}; fix: {verdict.fix}", style="red", soft_wrap=True)
    if broken:
        console.print("nothing was run; bench check tells more", soft_wrap=True)
        raise typer.Exit(1)
