"""What the benchmarks share: a network, images, a clock inside the network, and attacks measured by it."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.data.cifar import Cifar10
from bench.models import resolve
from bench.oracle import NEVER, Referee
from bench.oracle.served import ServedModel
from bench.protocols import Attack
from bench.rng import SampleRng
from bench.rules import rules_of
from bench.threat import Threat

WEIGHTS = "resnet20(weights=cifar10_resnet20.safetensors)"  # those that are not robust


class Clocked(nn.Module):
    """A network that counts its images and the seconds that it takes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.device = next(network.parameters()).device
        self.images, self.seconds = 0, 0.0
        self.eval()  # torchattacks restores the mode it finds, batch-norms included

    def reset(self) -> None:
        """Start anew."""
        self.images, self.seconds = 0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.timed(self.network, x)

    def timed(self, network: nn.Module, x: Tensor) -> Tensor:
        """The logits of ``network``, whose seconds count, and its images do not: a confirmation is no query."""
        began = now(x.device)
        logits: Tensor = network(x)
        self.seconds += now(x.device) - began
        return logits


class Beside(nn.Module):
    """``network``, whose seconds are ``clock``'s."""

    def __init__(self, network: nn.Module, clock: Clocked) -> None:
        super().__init__()
        self.network, self._clock = network, (clock,)

    def forward(self, x: Tensor) -> Tensor:
        return self._clock[0].timed(self.network, x)


@dataclass(frozen=True)
class Setting:
    """A network in plain float32 and ``x``, ``y`` that it gets right."""

    network: nn.Module
    x: Tensor
    y: Tensor


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder that holds cifar10; random images without it")
    parser.add_argument("--n", type=int, default=200, help="images")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def setting(options: argparse.Namespace, model: str = WEIGHTS) -> Setting:
    """``model`` with the weights beside the data folder; without one, a ResNet-20 with random ones, on random images.

    Speed does not depend on the weights, but how soon samples fall does.
    """
    device = torch.device(options.device)
    if options.data_dir is None:
        torch.manual_seed(0)
        network = resolve("resnet20")(10, (3, 32, 32), None).to(device)
        x = SampleRng.create(0, torch.arange(options.n), "benchmark").uniform(3, 32, 32).to(device)
        with torch.no_grad():
            return Setting(network.requires_grad_(False), x, network(x).argmax(1))
    network = resolve(model)(10, (3, 32, 32), options.data_dir.resolve().parent / "models").to(device)
    test = Cifar10()(options.data_dir).test.subset(slice(0, 2 * options.n)).to(device)
    x, y = test.pixels(), test.labels
    with torch.no_grad():
        right = torch.cat([network(part) for part in x.split(200)]).argmax(1) == y
    return Setting(network.requires_grad_(False), x[right][: options.n], y[right][: options.n])


def measure(run: Callable[[], float], clock: Clocked) -> tuple[float, float, float]:
    """Robust accuracy, queries per second, and the share of the time that was spent outside the network.

    Seconds of a CPU are those of computing, of all threads together, so that other work on the machine does not count.
    """
    clock.reset()
    began = now(clock.device)
    robust = run()
    seconds = now(clock.device) - began
    return robust, clock.images / seconds, 1 - clock.seconds / seconds


def ours(
    attack: Attack, network: Clocked, here: Setting, threat: Threat, confirmed: bool = False
) -> float:
    """The robust accuracy that ``attack`` leaves before the referee, which may have hits confirmed in plain numbers."""
    exact = ServedModel(Beside(here.network, network)) if confirmed else None
    ids = torch.arange(len(here.x), device=here.x.device)
    served = ServedModel(network, batch_size=1024 if here.x.is_cuda else 256)  # as the command line does
    streams = SampleRng.create(0, ids, "defense")
    referee = Referee(served, here.x, here.y, threat, streams, rules=rules_of(attack), classes=10, exact=exact)
    referee.finish(attack(referee.oracle, here.x, here.y, threat, SampleRng.create(0, ids, "attack")))
    return float((referee.ledger.first_hit == NEVER).float().mean())


def machine(device: str) -> str:
    """One line about where this runs."""
    from bench.results.provenance import provenance

    facts = provenance(torch.device(device))
    return f"{facts['hardware']}, {facts['threads']} threads, torch {torch.__version__}, {device}"


def now(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
