"""What a GPU is good for, in eight minutes: its limit, a network trained on it, attacks, training, defenses, engines.

On any GPU machine with torch 2.11, numpy, pandas, pyarrow, pydantic, typer, rich, safetensors, scipy, scikit-learn,
jinja2 and filelock, in the root of a checkout, which need not be installed (one line):

    python3 -m pip install -q --no-index --no-deps --upgrade --target runs/site carried/*.whl;
    PYTHONPATH=.:runs/site PYTHONUNBUFFERED=1 python3 benchmarks/gpu.py --data-dir carried --out "$OUT"

What travels is the checkout (74 MiB) and beside it the folder ``carried`` (21 MiB), which git ignores: CIFAR-10, all
60,000 images, as ``carried/cifar10/{train,test}-00000-of-00001.parquet`` (18 MiB), and wheels of what such a machine
may lack (3 MiB): pydantic and its parts, and ``torchattacks`` 3.5.1, which is attacked beside ours and needs none of
its own requirements here. They come from where there is a network:

    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp
    --platform manylinux2014_x86_64 -d carried pydantic pydantic-core annotated-types typing-inspection
    torchattacks==3.5.1

Every figure is printed and written at once, into ``--work``; ``--out`` is a copy of it in at most six files below
16 MiB, side by side: ``printout.txt``, ``figures.json``, ``rows.zip`` (a results folder, to be unpacked as
``leaderboards/gpu-NAME``) and the weights that were trained, in parts that a model joins when it is given their common
name, ``weights=preact-resnet18-cifar10.safetensors``. The same command again resumes where it was stopped; on another
machine with ``--resume`` and the folder that was brought home. A step has its share of ``--minutes`` and is cut down
where it would overrun: the first leaves settings out, the second epochs, the third images, never queries. One that
fails says why, and the others go on; then the exit code is 1. The sixth, the engine's, needs no other: its network is
what the second has trained, or the weights of ``leaderboards/query-cifar10-preact-resnet18``.
"""

import argparse
import copy
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_engine import engine
from gpu_setting import SMOKE, SQUARE, Here, Log, Scale, batch, ceiling, seconds, tasks, wait
from quiet import Quiet
from torch import Tensor, nn

from bench import numerics
from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.measure.pipeline import Pipeline, deploy
from bench.metrics import calibration_error
from bench.models import resolve
from bench.models.weights import save_parts
from bench.oracle import Referee
from bench.oracle.served import ServedModel
from bench.plan.tasks import Loader
from bench.protocols import Job
from bench.registry import attacks, code_hash, defenses, load_plugins
from bench.results.store import Row, Store
from bench.rng import SampleRng
from bench.run.runner import run

SHARES = {1: 30, 2: 100, 3: 180, 4: 60, 5: 20, 6: 75}  # seconds of each step, of 480
UNDER_SQUARE = ("none", "aaa-linear", "rnd", "unig", "aaa-sine")  # in the order of what matters most
CELLS = [
    *[(defense, SQUARE) for defense in UNDER_SQUARE], ("none", "torchattacks:Square"),
    *[("aaa-linear", attack) for attack in ("up-square", "bi-square", "decode-square")],
]  # fmt: skip
FALLEN = {"none": 0.4, "rnd": 0.5, "unig": 0.5}  # share of the queries that are left once samples fall; a guess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder that holds cifar10")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="copy of what is kept; $OUT")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="where everything is kept")
    parser.add_argument("--resume", type=Path, help="what an earlier call left in --out")
    parser.add_argument("--minutes", type=float, default=8.0, help="scales the share of every step")
    parser.add_argument("--steps", default="1,2,3,4,5,6", help="which, such as 2,3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny numbers on the digits, to see that it works")
    options = parser.parse_args()
    load_plugins()
    log = Log(options.work, options.out, options.resume)
    scale, device = SMOKE if options.smoke else Scale(), torch.device(options.device)
    loader = Loader(options.data_dir, log.models)
    steps = {1: limit, 2: train, 3: attack, 4: training, 5: costs, 6: engine}
    machine(log, device)
    failed = False
    for number in map(int, options.steps.split(",")):
        began, share = time.perf_counter(), SHARES[number] * options.minutes / 8
        log.say(f"{number}. {(steps[number].__doc__ or '').partition('.')[0]} ({share:.0f} s)")
        here = Here(log, scale, device, loader, lambda began=began, share=share: began + share - time.perf_counter())
        try:
            steps[number](here)
        except Exception:
            failed = True
            log.say("  failed: " + "\n    ".join(traceback.format_exc().strip().splitlines()[-5:]))
        log.say(f"  took {time.perf_counter() - began:.1f} s")
    sys.exit(failed)


def machine(log: Log, device: torch.device) -> None:
    """Say where this runs."""
    facts = {"torch": torch.__version__, "code": code_hash(), "device": device.type, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            driver = ""
        facts |= {"name": about.name, "memory_gib": round(about.total_memory / 2**30, 1), "driver": driver or "unknown"}
    log.keep("machine", facts, ", ".join(f"{name} {value}" for name, value in facts.items()))


# 1 ------------------------------------------------------------------------------------------------------------------


def limit(here: Here) -> None:
    """Images per second of the bare forward pass, which no attack can beat."""
    data, scale = here.data(), here.scale
    eager = [
        (network, precision, layout, "eager", batch)
        for layout in scale.layouts for precision in scale.precisions for network in scale.networks
        for batch in sorted(scale.batches, key=lambda batch: abs(batch - scale.batches[-2]))
    ]  # fmt: skip
    compiled = [
        (network, precision, scale.layouts[0], "compiled", scale.batches[-2])
        for precision in scale.precisions[:2] for network in scale.networks
    ]  # fmt: skip
    left_out, bases = 0, {name: here.network(name, data) for name in scale.networks}
    for setting in (*eager[: 2 * len(scale.batches)], *compiled[:1], *eager[2 * len(scale.batches) :], *compiled[1:]):
        network, precision, layout, mode, batch = setting
        name = f"1 {network} {precision} {layout} {mode} batch {batch}"
        if name in here.log.figures:
            continue
        if here.left() < (12 if mode == "compiled" and here.device.type == "cuda" else 0):
            left_out += 1
            continue
        try:
            pace = batch / seconds(forward(here, data, bases[network], *setting[1:]), here.device, scale.timed)
        except Exception as error:  # a compiler that is not there, or memory that is not
            here.log.say(f"  {name[2:]}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}")
            continue
        here.log.keep(name, pace, f"{name[2:]}: {pace:,.0f} images/s")
    if left_out:
        here.log.say(f"  {left_out} settings left out, no time; the same command resumes with them")


def forward(
    here: Here, data: Dataset, network: nn.Module, precision: str, layout: str, mode: str, batch: int
) -> Callable[[], Tensor]:
    """A call of a copy of ``network`` in the given numbers."""
    x, module = here.images(data, batch).pixels(), copy.deepcopy(network)
    if layout == "channels-last":
        module, x = module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    kinds = {"bf16": torch.bfloat16, "f16": torch.float16}
    if precision in kinds:
        module, x = module.to(kinds[precision]), x.to(kinds[precision])
    if mode == "compiled":
        torch._dynamo.reset()
        module = torch.compile(module, backend=here.scale.compiler)

    @torch.no_grad()
    def call() -> Tensor:
        with numerics.tf32() if precision == "tf32" else nullcontext():
            logits: Tensor = module(x)
        return logits

    return call


# 2 ------------------------------------------------------------------------------------------------------------------


def train(here: Here) -> None:
    """The first network trained on the training split, without the calibration images."""
    data, scale = here.data(), here.scale
    if here.trained:
        here.log.say("  done before")
        return

    def recipe(epochs: int) -> str:
        return f"standard(epochs={epochs}, batch_size={scale.batch}, lr={scale.lr})"

    def build() -> nn.Module:
        return resolve(scale.networks[0])(len(data.classes), data.test.shape, None)

    few = replace(data, train=data.train.subset(slice(48 * scale.batch)))
    pace = training_pace(here, recipe(1), build, few)
    epochs = max(1, min(scale.epochs, int((here.left() - 8) * pace / len(data.train))))
    network = attacks.create(recipe(epochs))(build, data, Job(device=here.device))
    state = {name: value.to(torch.bfloat16) if value.is_floating_point() else value
             for name, value in network.cpu().state_dict().items()}  # fmt: skip
    here.log.models.mkdir(parents=True, exist_ok=True)
    files = save_parts(state, here.log.models / scale.weights, scale.part)
    here.log.keep_weights()
    network.load_state_dict(state)  # what was kept is judged
    accuracy, error = judged(numerics.plain(network.to(here.device)), data.test.to(here.device))
    figures = {"recipe": recipe(epochs), "images_per_second": pace, "accuracy": accuracy, "ece": error}
    here.log.keep("2 training", figures, f"{recipe(epochs)}, {len(data.train):,} images, {pace:,.0f} images/s in bf16; "
                  f"test accuracy {accuracy:.2%}, ECE {error:.4f}; {len(files)} files of weights")  # fmt: skip


@torch.no_grad()
def judged(network: nn.Module, split: Split) -> tuple[float, float]:
    """Accuracy and expected calibration error of ``network`` on ``split``."""
    parts = torch.arange(len(split), device=split.labels.device).split(1000)
    probabilities = torch.cat([network(split.pixels(rows)).softmax(dim=1) for rows in parts])
    confidence, prediction = probabilities.max(dim=1)
    right = prediction == split.labels
    return float(right.float().mean()), calibration_error(confidence.double().cpu().numpy(), right.cpu().numpy())


# 3 ------------------------------------------------------------------------------------------------------------------


def attack(here: Here) -> None:
    """AAA's own setting: Square with 2,500 queries at 8/255 against output defenses, and attacks that adapt."""
    if not here.trained:
        here.log.say("  there are no weights; step 2 makes them")
        return
    model = f"{here.scale.networks[0]}(weights={here.scale.weights})"
    paces = {cell: pace for cell in CELLS if (pace := attack_pace(here, model, *cell)) is not None}
    if "3 images" not in here.log.figures:
        cost = sum(FALLEN.get(defense, 1.0) * here.scale.queries / pace for (defense, _), pace in paces.items())
        fitting = [size for size in here.scale.sizes if cost * size < here.left() - 10]
        n = fitting[0] if fitting else here.scale.sizes[-1]
        here.log.keep("3 images", n, f"{n} images: all cells are expected to take {n * cost:.0f} s")
    store = Store(here.log.work / "rows").open()
    pipeline = Pipeline(here.log.work / "networks", here.device, batch(here))
    for defense, name in paces:
        (task,) = tasks(here, model, defense, name, here.log.figures["3 images"])
        if here.left() < 0 and store.missing(task.cell):
            here.log.say(f"  {defense} under {name}: left out, no time; the same command resumes with it")
            continue
        run([task], store, pipeline, len(task.cell.ids), batch(here), Quiet())
        say_row(here, store.row(task.cell), f"{defense} under {name}")
        here.log.keep_rows()


def say_row(here: Here, row: Row, what: str) -> None:
    """Print what a row of the store says."""
    if row.errors:
        here.log.say(f"  {what}: failed: {row.errors[-1].strip().splitlines()[-1][:160]}")
        return
    records, spent = row.records, sum(shard.seconds for shard in row.shards)
    hit, queries = records["first_hit"], int(records["forwards"].sum())
    few, most = min(100, here.scale.queries // 2), here.scale.queries
    robust = {budget: float(((hit < 0) | (hit > budget)).mean()) for budget in (few, most)}
    final = float((records["final_pred"] == records["y"]).mean())
    figures = {"n": len(records), "clean": float((hit != 0).mean()), "robust": robust[most],
               "final": final, "queries": queries, "seconds": spent}  # fmt: skip
    here.log.keep(
        f"3 row {what}", figures,
        f"{what}: {len(records)} images, clean {figures['clean']:.1%}, @{few} {robust[few]:.1%}, "
        f"@{most} {robust[most]:.1%}, final {final:.1%}; {queries:,} queries in {spent:.1f} s",
    )


def attack_pace(here: Here, model: str, defense: str, name: str) -> float | None:
    """Queries per second while no image falls (a radius of 0), or nothing where the attack cannot be named."""
    key, scale = f"3 pace {defense} under {name}", here.scale
    if key in here.log.figures:
        known: float = here.log.figures[key]
        return known
    try:
        (task,) = tasks(here, model, defense, name, min(scale.live, len(here.data().test)))
    except Exception as error:
        here.log.say(f"  {defense} under {name}: not here ({(str(error).splitlines() or [''])[0][:160]})")
        return None
    served = deploy(task, task.build().to(here.device), "fast", here.device, batch(here))
    images = here.images(task.data, scale.live)
    x, rows = images.pixels(), torch.arange(scale.live, device=here.device)
    threat = replace(task.cell.threat, eps=0.0, query_budget=scale.trial)
    noise, stream = (SampleRng.create(0, rows, purpose) for purpose in ("defense", "attack"))
    with torch.no_grad():
        y = served(x, noise).argmax(dim=1)  # as if all were right

    def once() -> Tensor:
        referee = Referee(served, x, y, threat, noise)
        task.attack(referee.oracle, x.clone(), y, threat, stream)  # type: ignore[call-arg, arg-type]
        return referee.ledger.forwards.sum()

    began = time.perf_counter()
    asked = int(once())
    if time.perf_counter() - began < 2:  # the first call has picked kernels
        began = time.perf_counter()
        asked = int(once())
    pace = asked / (time.perf_counter() - began)
    of = pace / ceiling(here)
    shown = f"{defense} under {name}: {pace:,.0f} queries/s, {of:.0%} of the limit, {scale.live} images"
    here.log.keep(key, pace, shown)
    return pace


# 4 ------------------------------------------------------------------------------------------------------------------


def training(here: Here) -> None:
    """Images per second of training, and of SEP's protecting step."""
    data, scale = here.data(), here.scale

    def build() -> nn.Module:
        return resolve(scale.networks[0])(len(data.classes), data.test.shape, None)

    kinds = {
        "standard": "standard(epochs=1, batch_size={})",
        "one-step adversarial": "pgd-at(epochs=1, steps=1, rel_step=1.25, batch_size={})",
        "PGD-10 adversarial": "pgd-at(epochs=1, batch_size={})",
    }
    for way, record in (("recorded, bf16", True), ("step by step, tf32", False)):
        for kind, recipe in kinds.items():
            name = f"4 {kind}, {way}"
            if name in here.log.figures:
                continue
            if here.left() < scale.training:
                here.log.say(f"  {name[2:]}: left out, no time; the same command resumes with it")
                continue
            with nullcontext() if record else patch("bench.training.recordable", return_value=False):
                pace = training_pace(here, recipe.format(min(128, scale.batch)), build, data)
            here.log.keep(name, pace, f"{name[2:]}, batch {min(128, scale.batch)}: {pace:,.0f} images/s")
    if "4 sep" not in here.log.figures:
        pace = protecting_pace(here, data)
        here.log.keep("4 sep", pace, f"SEP's protecting step: {pace:,.0f} images x checkpoints/s")


def training_pace(here: Here, recipe: str, build: Callable[[], nn.Module], data: Dataset) -> float:
    """Images per second of ``recipe``, of those beyond the first few, as a training also takes a while to begin."""
    registry = attacks if recipe.startswith("standard") else defenses
    trainer: Any = registry.create(recipe)

    def duration(size: int) -> float:
        part = replace(data, train=data.train.subset(slice(size)))
        began = time.perf_counter()
        trainer(build, part, Job(device=here.device))
        wait(here.device)
        return time.perf_counter() - began

    few = min(len(data.train), here.scale.first)
    if here.scale.training:
        duration(few)  # kernels are chosen
    short = duration(few)
    many = min(len(data.train), max(4 * few, int(few / short * here.scale.training)))
    if many == few or not here.scale.training:
        return few / short
    return (many - few) / max(duration(many) - short, 1e-9)


def protecting_pace(here: Here, data: Dataset) -> float:
    """Images times checkpoints that SEP's step takes in a second."""
    from defenses.checkpoints import CHUNK, cross_entropy
    from defenses.sep import total_gradient

    count = min(CHUNK, here.scale.batch)
    images, specimens = here.images(data, count), data.specimens(numerics.SPECIMENS).to(here.device)
    network = here.network(here.scale.networks[0], data)
    networks = [numerics.fast(network, specimens).module for _ in range(here.scale.checkpoints)]
    losses, levels = [cross_entropy(network) for network in networks], images.images.float()
    step = seconds(lambda: total_gradient(losses, levels, images.labels), here.device, 20 * here.scale.timed)
    return count * len(networks) / step


# 5 ------------------------------------------------------------------------------------------------------------------


def costs(here: Here) -> None:
    """What each output defense adds to a query, in fast numbers, by the images that are asked about at once."""
    data = here.data()
    network, specimens = here.network(here.scale.networks[0], data), data.specimens(numerics.SPECIMENS).to(here.device)
    calibration, bare = data.calibration.to(here.device), numerics.fast(network, specimens).module
    for name in (name for name in defenses.names() if getattr(defenses.factory(name), "stage", "") == "output"):
        key = f"5 {name}"
        if key in here.log.figures:
            continue
        if here.left() < 0:
            here.log.say(f"  {name}: left out, no time; the same command resumes with it")
            continue
        defense: Any = defenses.create(name)
        if hasattr(defense, "fit"):
            here.log.say(f"  {name}: left out, it is trained first")
            continue
        fold = not getattr(defense, "needs_batch_norm", False)
        model = numerics.fast(network, specimens, fold).module
        try:
            module = defense(model, calibration, 0).eval()
        except ConfigError as error:  # it has to be told something about each network
            here.log.say(f"  {name}: left out, {error}")
            continue
        served = ServedModel(module, random=defense.random, batch_size=4096)
        figures = {}
        for count in here.scale.costs:
            x = here.images(data, count).pixels()
            rng = SampleRng.create(0, torch.arange(count, device=here.device), "cost")
            with torch.no_grad():
                alone, with_it = (
                    seconds(lambda model=model, x=x, rng=rng: model(x, rng), here.device, here.scale.timed)
                    for model in (ServedModel(bare, batch_size=4096), served)
                )
            figures[str(count)] = {"network_ms": 1e3 * alone, "defended_ms": 1e3 * with_it}
        shown = (f"{one['network_ms']:.2f} -> {one['defended_ms']:.2f} ms at {count}" for count, one in figures.items())
        here.log.keep(key, figures, f"{name}: {', '.join(shown)}")


if __name__ == "__main__":
    main()
