"""What a GPU is good for, in eight minutes: its limit, a network trained on it, attacks, training, defenses, engines.

On any GPU machine with torch 2.11, numpy, pandas, pyarrow, pydantic, typer, rich, safetensors, scipy, scikit-learn,
jinja2 and filelock, in the root of a checkout, which need not be installed (one line):

    python3 -m pip install -q --no-index --no-deps --upgrade --target runs/site carried/*.whl;
    PYTHONPATH=.:runs/site PYTHONUNBUFFERED=1 python3 benchmarks/gpu.py --data-dir carried --out "$OUT"

What travels is the checkout (37 MiB) and beside it the folder ``carried`` (21 MiB), which git ignores: CIFAR-10, all
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
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench import numerics
from bench.cuda_graphs import CudaGraphs
from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.measure import search
from bench.measure.attacked import attack_served
from bench.measure.pipeline import Pipeline, deploy
from bench.metrics import calibration_error
from bench.models import resolve
from bench.models.weights import save_parts
from bench.oracle import Referee
from bench.oracle.served import ServedModel
from bench.plan.suite import Suite
from bench.plan.tasks import Loader, Task, expand
from bench.protocols import Job
from bench.registry import attacks, code_hash, defenses, load_plugins
from bench.results.store import Row, Store
from bench.rng import SampleRng
from bench.run.executor import Executor, Local
from bench.run.processes import Processes
from bench.run.runner import run
from bench.run.units import Unit
from bench.system.files import keep_file

SHARES = {1: 30, 2: 100, 3: 180, 4: 60, 5: 20, 6: 75}  # seconds of each step, of 480
COMMITTED = Path("leaderboards/query-cifar10-preact-resnet18/weights")  # of the first network
PART = 15 * 2**20  # bytes of tensors in a file
UNDER_SQUARE = ("none", "aaa-linear", "rnd", "unig", "aaa-sine")  # in the order of what matters most
SQUARE = "square(preset=aaa)"
CELLS = [
    *[(defense, SQUARE) for defense in UNDER_SQUARE], ("none", "torchattacks:Square"),
    *[("aaa-linear", attack) for attack in ("up-square", "bi-square", "decode-square")],
]  # fmt: skip
FALLEN = {"none": 0.4, "rnd": 0.5, "unig": 0.5}  # share of the queries that are left once samples fall; a guess
SIZES = (5000, 3000, 2000, 1000, 700, 500, 300, 200, 100, 50)  # images that step 3 may take


@dataclass(frozen=True)
class Scale:
    """How much of everything: on a GPU, or to see in two minutes of a CPU that it works."""

    dataset: str = "cifar10"
    networks: tuple[str, str] = ("preact-resnet18", "wide-resnet28-10")  # all steps but the first take the first
    batches: tuple[int, ...] = (256, 1024, 4096)
    precisions: tuple[str, ...] = ("bf16", "f16", "tf32", "f32")
    layouts: tuple[str, ...] = ("channels-last", "contiguous")
    compiler: str = "inductor"
    timed: float = 0.15      # seconds of forwards, at least
    train: int | None = None  # images; all
    epochs: int = 30         # at most
    batch: int = 512
    lr: float = 0.2
    queries: int = 2500
    sizes: tuple[int, ...] = SIZES
    trial: int = 40          # queries that the pace of an attack is measured with
    live: int = 1000         # images of which it is
    first: int = 2560        # images that a training warms up with
    training: float = 7.0    # seconds for each kind of training and numbers
    checkpoints: int = 5
    costs: tuple[int, ...] = (1, 64, 1024)
    part: int = PART
    answers: tuple[int, ...] = (1, 16, 64, 256, 1024)  # images that the engine is asked about at once
    whole: int = 1000        # images of a whole run
    beside: int = 500        # queries beside torchattacks
    shared: int = 600        # queries of the cells that share the device
    workers: int = 4

    @property
    def weights(self) -> str:
        """The file of what step 2 trains."""
        return f"{self.networks[0]}-{self.dataset}.safetensors"


SMOKE = Scale(
    dataset="digits", networks=("resnet20", "preact-resnet18"), batches=(2, 4), precisions=("bf16", "f32"),
    layouts=("channels-last",), compiler="eager", timed=0.0, train=320, epochs=2, batch=32, lr=3e-3, queries=20,
    sizes=(12,), trial=2, live=12, first=32, training=0.0, checkpoints=2, costs=(1, 4), part=300_000,
    answers=(1, 4), whole=60, beside=4, shared=4, workers=2,
)  # fmt: skip


class Log:
    """What was measured, in ``work`` and in a copy in ``out``, from the first figure on."""

    def __init__(self, work: Path, out: Path | None, resume: Path | None) -> None:
        self.work, self.out = work, out
        for folder in filter(None, (work, out)):
            folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(resume.iterdir()) if resume else ():
            shutil.copy(file, self._place(file.name))
        if (rows := work / "rows.zip").is_file():
            shutil.unpack_archive(rows, work / "rows")
        kept = work / "figures.json"
        self.figures: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
        self._copy()

    def say(self, text: str) -> None:
        """Print a line, and keep it."""
        print(text, flush=True)
        with (self.work / "printout.txt").open("a") as file:
            file.write(text + "\n")
        self._copy("printout.txt")

    def keep(self, name: str, value: Any, text: str) -> None:
        """Keep a figure and print what it says."""
        self.figures[name] = value
        keep_file(self.work / "figures.json", (json.dumps(self.figures, indent=1) + "\n").encode())
        self._copy("figures.json")
        self.say(f"  {text}")

    def keep_rows(self) -> None:
        """Pack the rows so far."""
        beside = self.work / ".rows.zip"
        with zipfile.ZipFile(beside, "w") as packed:
            for file in sorted((self.work / "rows").rglob("*-*.*")):
                if file.suffix in (".json", ".parquet"):
                    packed.write(file, file.relative_to(self.work / "rows"))
        beside.replace(self.work / "rows.zip")
        self._copy("rows.zip")

    def keep_weights(self) -> None:
        """Copy the parts of the weights, which lie where models look for them."""
        for file in sorted(self.models.glob("*.safetensors")):
            if self.out is not None:
                shutil.copy(file, self.out / file.name)

    @property
    def models(self) -> Path:
        """The folder of weights."""
        return self.work / "models"

    def _place(self, name: str) -> Path:
        folder = self.models if name.endswith(".safetensors") else self.work
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def _copy(self, *names: str) -> None:
        for name in names or ("printout.txt", "figures.json", "rows.zip"):
            if self.out is not None and (self.work / name).is_file():
                shutil.copy(self.work / name, self.out / name)
        if not names:
            self.keep_weights()


@dataclass(frozen=True)
class Here:
    """What all steps share. ``left()`` is how many seconds the step in work has."""

    log: Log
    scale: Scale
    device: torch.device
    loader: Loader
    left: Callable[[], float]

    def data(self) -> Dataset:
        """The data set, with as many training images as are to be trained on."""
        data = self.loader.dataset(self.scale.dataset)[1]
        if self.scale.train is None:
            return data
        return replace(data, train=data.train.subset(slice(self.scale.train)))

    @property
    def trained(self) -> bool:
        """Whether step 2 has been done."""
        return any(self.log.models.glob(f"{Path(self.scale.weights).stem}*"))

    def network(self, name: str, data: Dataset) -> nn.Module:
        """An untrained network, always the same, on the device."""
        torch.manual_seed(0)
        return numerics.plain(resolve(name)(len(data.classes), data.test.shape, None)).to(self.device)

    def images(self, data: Dataset, count: int) -> Split:
        """``count`` test images on the device, again from the first where there are too few."""
        return data.test.subset(torch.arange(count) % len(data.test)).to(self.device)


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


def ceiling(here: Here) -> float:
    """The most images per second that were seen of the first network, or NaN."""
    paces = [pace for name, pace in here.log.figures.items() if name.startswith(f"1 {here.scale.networks[0]}") and pace]
    return max(paces, default=math.nan)


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


def tasks(here: Here, model: str, defense: str, attack: str, n: int, **more: Any) -> list[Task]:
    """The cell, as the command line would make it, or several for ``more`` settings."""
    grid = {"dataset": here.scale.dataset, "n": n, "model": model, "defense": defense, "attack": attack,
            "eps": "8/255", "queries": here.scale.queries, **more}  # fmt: skip
    return expand(Suite.model_validate({"name": "gpu", "grid": [grid]}), here.loader)


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


def batch(here: Here) -> int:
    """Images in one forward, as the command line has it."""
    return 1024 if here.device.type == "cuda" else 256


class Quiet:
    """Tells nobody how a run goes; notes when its first unit began."""

    begun: float | None = None

    def plan(self, samples: int) -> None: ...
    def start(self, task: Task, unit: Unit) -> None:
        self.begun = self.begun or time.perf_counter()

    def work(self, unit: Unit, done: int, total: int, what: str) -> None: ...
    def end(self, unit: Unit, samples: int) -> None: ...
    def finish(self, task: Task, row: Row, seconds: float) -> None: ...
    def wait(self, cells: int) -> None: ...


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


# 6 ------------------------------------------------------------------------------------------------------------------


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
    """Square to its end, tail included, judging too, without what is converted or probed."""
    for mode in modes(here):
        figures = attacked(here, task, mode)
        of = figures["queries"] / figures["seconds"] / floor(here)
        here.log.keep(
            f"6 whole run {mode}", {**figures, "share": of},
            f"whole run, {mode}: {figures['n']} images, {task.cell.threat.query_budget} queries, "
            f"@{task.cell.threat.query_budget} {figures['robust']:.1%}; {figures['queries']:,} queries in "
            f"{figures['seconds']:.2f} s, {of:.1%} of the limit, {1e3 * figures['step']:.2f} ms a step",
        )  # fmt: skip


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


def attacked(here: Here, task: Task, mode: str) -> dict[str, Any]:
    """What came of the attack of ``task``, on all samples at once, and the seconds that it took once all was made."""
    most = math.inf if mode == "eager" else search.WORTH
    with patch.object(search, "WORTH", most), torch.no_grad():
        pipeline = Pipeline(here.log.work / "networks", here.device, batch(here))
        with pipeline.serving(task) as target:
            says = target.numbers["engine"]
            if (mode == "graphs") != says.startswith("CUDA"):
                here.log.say(f"  {mode}: the engine is {says}")
            wait(here.device)
            began = time.perf_counter()
            records = attack_served(task, target, list(task.cell.ids), here.device)
            wait(here.device)
            spent = time.perf_counter() - began
    hit, budget = records["first_hit"], task.cell.threat.query_budget
    return {"n": len(records), "robust": float((hit < 0).mean()), "queries": int(records["forwards"].sum()),
            "seconds": spent, "step": spent / max(int(records["forwards"].max()), 1), "budget": budget}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], Tensor], device: torch.device, least: float) -> float:
    """The median time of ``call``, over as many as take ``least`` seconds, after two to warm up."""
    for _ in range(2 if least else 1):
        call()
    wait(device)
    times: list[float] = []
    while not times or (sum(times) < least and len(times) < 200):
        began = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
