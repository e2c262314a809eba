"""What the steps of the GPU benchmark share: how much of everything, where figures go, and what is timed."""

import json
import math
import shutil
import statistics
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import numerics
from bench.dataset import Dataset, Split
from bench.models import resolve
from bench.plan.suite import Suite
from bench.plan.tasks import Loader, Task, expand
from bench.system.files import keep_file

SQUARE = "square(preset=aaa)"
PART = 15 * 2**20  # bytes of tensors in a file
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
    cuts: int = 4            # batches that it is cut into, one after the other
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


def ceiling(here: Here) -> float:
    """The most images per second that were seen of the first network, or NaN."""
    paces = [pace for name, pace in here.log.figures.items() if name.startswith(f"1 {here.scale.networks[0]}") and pace]
    return max(paces, default=math.nan)


def tasks(here: Here, model: str, defense: str, attack: str, n: int, **more: Any) -> list[Task]:
    """The cell, as the command line would make it, or several for ``more`` settings."""
    grid = {"dataset": here.scale.dataset, "n": n, "model": model, "defense": defense, "attack": attack,
            "eps": "8/255", "queries": here.scale.queries, **more}  # fmt: skip
    return expand(Suite.model_validate({"name": "gpu", "grid": [grid]}), here.loader)


def batch(here: Here) -> int:
    """Images in one forward, as the command line has it."""
    return 1024 if here.device.type == "cuda" else 256


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
