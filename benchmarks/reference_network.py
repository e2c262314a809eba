"""Train ``resnet20-at``, the robust reference network: a ResNet-20 fine-tuned by N-FGSM on CIFAR-10 at linf 8/255.

    python benchmarks/reference_network.py FOLDER --data-dir DATA --start cifar10_resnet20.safetensors

It starts from a network that was trained without an adversary, since fine-tuning takes a fraction of the epochs (Jeddi
et al., 2020, arXiv:2012.13628). The rate is constant in the first stage and falls to zero in the second. Each epoch is
logged, with the accuracy on 512 held-out images and what is left of it under ten steps of PGD; each stage ends with its
best epoch. A run that was killed goes on from its last epoch. One thread computes; an epoch costs it about ten minutes.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from bench.models import resolve
from bench.protocols import Job
from bench.registry import datasets, load_plugins
from bench.scratch import Scratch
from bench.training import Recipe, fit
from defenses.early_stopping import EarlyStopping
from defenses.n_fgsm import NoiseFGSM

EPS, SEED = 8 / 255, 0
RATE: dict[str, Any] = {"batch_size": 128, "optimizer": "sgd", "lr": 0.05, "weight_decay": 2e-4}


class Logged(EarlyStopping):
    """Early stopping that writes down what it sees."""

    def __init__(self, log: Path, stage: str, *given: Any) -> None:
        super().__init__(*given)
        self.log, self.stage, self.began = log, stage, time.monotonic()

    def __call__(self, model: nn.Module, epoch: int) -> bool:
        """Look at ``model`` after ``epoch``, and add a line to the log."""
        before = self.accuracy
        goes_on = super().__call__(model, epoch)
        with torch.no_grad():
            clean = float((model(self.x).argmax(1) == self.y).float().mean())
        minutes = round((time.monotonic() - self.began) / 60, 1)
        line = {"stage": self.stage, "epoch": epoch, "clean": clean, "pgd": self.seen, "best": self.seen > before}
        with self.log.open("a") as file:
            print(json.dumps({**line, "minutes": minutes}), file=file)
        return goes_on


def main() -> None:
    """Both stages, each with its progress in ``FOLDER``; the weights are ``resnet20-at.safetensors`` there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True, help="weights of a ResNet-20 for CIFAR-10")
    parser.add_argument("--constant", type=int, default=1, help="epochs at the constant rate")
    parser.add_argument("--falling", type=int, default=1, help="epochs in which the rate falls to zero")
    given = parser.parse_args()
    torch.set_num_threads(1)  # other numbers train other networks
    load_plugins()
    data = datasets.create("cifar10")(given.data_dir)
    network = resolve(f"resnet20(weights='{given.start}')")(10, (3, 32, 32), None)
    given.folder.mkdir(parents=True, exist_ok=True)
    for stage, epochs, schedule in (("constant", given.constant, "steps"), ("falling", given.falling, "fall")):
        recipe = Recipe(epochs=epochs, schedule=schedule, milestones=(), flip=data.flip, shift=data.shift, **RATE)
        job = Job(SEED, scratch=Scratch(given.folder / stage))
        selection = Logged(given.folder / "log.jsonl", stage, data, EPS, job)
        network = fit(network, data, recipe, job, NoiseFGSM(eps=EPS).perturb, selection=selection)
    save_file(network.state_dict(), given.folder / "resnet20-at.safetensors")


if __name__ == "__main__":
    main()
