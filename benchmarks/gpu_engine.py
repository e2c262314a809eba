"""What answers for the search network on a GPU: a step of the GPU benchmark."""

import math
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from gpu_setting import SQUARE, Here, batch, ceiling, seconds, tasks, wait
from quiet import Quiet
from torch import Tensor, nn

from bench import numerics
from bench.cuda_graphs import CudaGraphs
from bench.dataset import Dataset
from bench.measure import search
from bench.measure.attacked import attack_served
from bench.measure.pipeline import Pipeline
from bench.models.weights import save_parts
from bench.plan.tasks import Task
from bench.results.store import Store
from bench.run.executor import Executor, Local
from bench.run.processes import Processes
from bench.run.runner import run

COMMITTED = Path("leaderboards/query-cifar10-preact-resnet18/weights")  # of the first network


def engine(here: Here) -> None:
    """The search network by torch's own forward and by CUDA graphs: alone, in whole runs, and in several processes."""
    scale, where = here.scale, here.device
    if where.type != "cuda":
        here.log.say("  no GPU: what is of CUDA graphs is skipped")
    model = known(here)
    (task,) = tasks(here, model, "none", SQUARE, scale.whole)
    first = task.build().to(where)
    forwards(here, {scale.networks[0]: first} | {"resnet20": here.network("resnet20", task.data)})
    whole_runs(here, task)
    beside(here, model)
    shared(here, model)
    if where.type == "cuda":
        compiled(here, first, task.data)


def known(here: Here) -> str:
    """The first network with what step 2 has trained, or the committed weights, or some that nobody has trained."""
    scale, models = here.scale, here.log.models
    models.mkdir(parents=True, exist_ok=True)
    if not here.trained:
        committed = sorted(COMMITTED.glob(f"{Path(scale.weights).stem}-*"))
        for file in committed:
            shutil.copy(file, models / file.name)
        if not committed:
            here.log.say("  there are no weights of step 2: the network of this step is untrained")
            state = here.network(scale.networks[0], here.data()).cpu().state_dict()
            save_parts(state, models / "untrained.safetensors", scale.part)
            return f"{scale.networks[0]}(weights=untrained.safetensors)"
    return f"{scale.networks[0]}(weights={scale.weights})"


def forwards(here: Here, networks: dict[str, nn.Module]) -> None:
    """Times of one forward, and how far the logits lie apart."""
    data, scale = here.data(), here.scale
    specimens = data.specimens(numerics.SPECIMENS).to(here.device)
    for name, network in networks.items():
        eager, began = numerics.fast(network, specimens), time.perf_counter()
        graphs = numerics.fast(network, specimens, engine=CudaGraphs()) if here.device.type == "cuda" else None
        if graphs:
            took = time.perf_counter() - began
            here.log.keep(f"6 engine {name}", graphs.facts, f"{name}: {graphs.facts}, converted in {took:.2f} s")
        for count in scale.answers:
            x, figures = here.images(data, count).pixels(), {}
            with torch.no_grad():
                for mode, module in {"eager": eager.module, "graphs": graphs and graphs.module}.items():
                    if module is not None:
                        figures[mode] = seconds(partial(module, x), here.device, scale.timed)
                gap = float((graphs.module(x) - eager.module(x)).abs().max()) if graphs else math.nan
            shown = (f"{mode} {1e3 * each:.3f} ms, {count / each:,.0f} images/s" for mode, each in figures.items())
            ratio = f"; {figures['eager'] / figures['graphs']:.2f} x, logits differ by {gap:.2g}" if graphs else ""
            here.log.keep(f"6 forward {name} batch {count}", {**figures, "gap": gap},
                          f"{name} batch {count}: {', '.join(shown)}{ratio}")  # fmt: skip


def floor(here: Here) -> float:
    """The most images per second that were seen of the first network, by whatever engine, or NaN."""
    name = f"6 forward {here.scale.networks[0]} batch "
    paces = [int(key.removeprefix(name)) / figures[mode] for key, figures in here.log.figures.items()
             if key.startswith(name) for mode in ("eager", "graphs") if mode in figures]  # fmt: skip
    return max([*paces, *filter(math.isfinite, [ceiling(here)])], default=math.nan)


def whole_runs(here: Here, task: Task) -> None:
    """Square to its end, tail included, judging too, without what is converted or probed.

    In each mode all images at once; in the last one batch by batch, too, each with a tail of its own.
    """
    ways = [(mode, 1) for mode in modes(here)]
    paces = {}
    for mode, cuts in [*ways, (ways[-1][0], here.scale.cuts)]:
        figures, name = attacked(here, task, mode, cuts), mode if cuts == 1 else f"{mode} in {cuts} batches"
        paces[cuts] = figures["queries"] / figures["seconds"]
        of = paces[cuts] / floor(here)
        here.log.keep(
            f"6 whole run {name}", {**figures, "share": of},
            f"whole run, {name}: {figures['n']} images, {task.cell.threat.query_budget} queries, "
            f"@{task.cell.threat.query_budget} {figures['robust']:.1%}; {figures['queries']:,} queries in "
            f"{figures['seconds']:.2f} s, {of:.1%} of the limit, {1e3 * figures['step']:.2f} ms a step, "
            f"{figures['images']:.0f} images a forward",
        )  # fmt: skip
    here.log.say(f"  all at once is {paces[1] / paces[here.scale.cuts]:.2f} x as fast as batch by batch")


def beside(here: Here, model: str) -> None:
    """Ours and torchattacks' on the same images; with fewer queries, as the foreign one takes long to the end."""
    paces, n = {}, here.scale.whole
    for name, mode in [*((SQUARE, mode) for mode in modes(here)), ("torchattacks:Square", "eager")]:
        try:
            (task,) = tasks(here, model, "none", name, n, queries=here.scale.beside)
        except Exception as error:
            here.log.say(f"  {name}: not here ({(str(error).splitlines() or [''])[0][:160]})")
            continue
        figures = attacked(here, task, mode)
        paces[f"{name}, {mode}"] = pace = figures["queries"] / figures["seconds"]
        here.log.keep(
            f"6 beside {name} {mode}", figures,
            f"{name}, {mode}: {n} images, {here.scale.beside} queries, @{here.scale.beside} {figures['robust']:.1%}; "
            f"{figures['queries']:,} queries in {figures['seconds']:.2f} s, {pace:,.0f} a second",
        )  # fmt: skip
    foreign = paces.get("torchattacks:Square, eager")
    for name, pace in paces.items() if foreign else ():
        here.log.say(f"  {name}: {pace / foreign:.2f} x torchattacks")


def shared(here: Here, model: str) -> None:
    """As many cells as workers, one after the other in this process and at once in as many on one device."""
    scale, spent = here.scale, {}
    cells = tasks(here, model, "none", SQUARE, scale.whole, queries=scale.shared, seed=list(range(scale.workers)))
    ways: dict[str, Executor] = {"one process": Local()}
    ways[f"{scale.workers} processes"] = Processes([here.device] * scale.workers)
    for how, executor in ways.items():
        if here.left() < 0:
            here.log.say(f"  {how}: left out, no time")
            continue
        folder, told = here.log.work / "shared" / how.replace(" ", "-"), Quiet()
        shutil.rmtree(folder, ignore_errors=True)
        store, began = Store(folder).open(), time.perf_counter()
        pipeline = Pipeline(folder / "networks", here.device, batch(here))
        run(cells, store, pipeline, scale.whole, batch(here), told, executor=executor)
        ended, rows = time.perf_counter(), [store.row(task.cell) for task in cells]
        if errors := [error for row in rows for error in row.errors]:
            here.log.say(f"  {how}: failed: {errors[-1].strip().splitlines()[-1][:160]}")
            continue
        spent[how] = ended - (told.begun or began)
        hits = hash(tuple(tuple(row.records["first_hit"]) for row in rows))
        here.log.keep(
            f"6 shared {how}", {"seconds": spent[how], "with_start": ended - began},
            f"{len(cells)} cells of {scale.whole} images and {scale.shared} queries, {how}: {spent[how]:.2f} s from "
            f"the first unit, {ended - began:.2f} s with their start; first hits {hits:x}",
        )  # fmt: skip
    if len(spent) == 2:
        alone, together = spent.values()
        here.log.say(f"  {scale.workers} processes are {alone / together:.2f} times as fast as one")


def compiled(here: Here, network: nn.Module, data: Dataset) -> None:
    """The network by torch.compile, which compiles for each size of a batch anew."""
    if here.left() < 45:
        here.log.say("  torch.compile: left out, no time")
        return
    specimens, count = data.specimens(numerics.SPECIMENS).to(here.device), 64
    module = torch.compile(numerics.fast(network, specimens).module, mode="reduce-overhead")
    x, began = here.images(data, count).pixels(), time.perf_counter()
    with torch.no_grad():
        module(x)
        wait(here.device)
        took = time.perf_counter() - began
        each = seconds(lambda: module(x), here.device, here.scale.timed)
    here.log.keep("6 compiled", {"seconds": each, "compile": took},
                  f"torch.compile batch {count}: {1e3 * each:.3f} ms, compiled in {took:.1f} s")  # fmt: skip


def modes(here: Here) -> list[str]:
    """What may answer for the search network."""
    return ["eager", "graphs"] if here.device.type == "cuda" else ["eager"]


class Counting(nn.Module):
    """``network``, and how often it was called."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.network(x)
        return logits


def attacked(here: Here, task: Task, mode: str, cuts: int = 1) -> dict[str, Any]:
    """What came of the attack of ``task``, on all samples at once or in so many ``cuts`` one after the other, and the
    seconds that it took once all was made."""
    ids = list(task.cell.ids)
    size = math.ceil(len(ids) / cuts)
    most = math.inf if mode == "eager" else search.WORTH
    with patch.object(search, "WORTH", most), torch.no_grad():
        pipeline = Pipeline(here.log.work / "networks", here.device, batch(here))
        with pipeline.serving(task) as target:
            says = target.numbers["engine"]
            if (mode == "graphs") != says.startswith("CUDA"):
                here.log.say(f"  {mode}: the engine is {says}")
            searched = Counting(target.searched.module)
            target = replace(target, searched=replace(target.searched, module=searched))
            wait(here.device)
            began = time.perf_counter()
            parts = [attack_served(task, target, ids[at : at + size], here.device) for at in range(0, len(ids), size)]
            wait(here.device)
            spent = time.perf_counter() - began
    records, budget = pd.concat(parts, ignore_index=True), task.cell.threat.query_budget
    queries, steps = int(records["forwards"].sum()), sum(int(part["forwards"].max()) for part in parts)
    return {"n": len(records), "robust": float((records["first_hit"] < 0).mean()), "queries": queries,
            "seconds": spent, "step": spent / max(steps, 1), "images": queries / max(searched.calls, 1),
            "budget": budget}  # fmt: skip
