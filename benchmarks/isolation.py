"""What a process of its own costs a defense: a forward there beside the same forward here.

    python benchmarks/isolation.py --data-dir DATA --batch 100 --batch 256

The defense is AAA around a ResNet-20 in fast numbers. Forwards there and here take turns, and medians are compared: on
a CPU of the seconds that both processes compute, which other programs on the machine change less than the time that
passes; on a GPU of the time. What the way there and back takes is measured once more around a network that computes
next to nothing, where it is not lost in the differences between two forwards. The aim, at most 5 %, is for that.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from setting import arguments, machine, setting
from tabulate import tabulate
from torch import nn

from bench import numerics
from bench.dataset import Split
from bench.measure.isolated import Deployment, in_own_process
from bench.oracle.served import ServedModel
from bench.registry import defenses, load_plugins
from bench.rng import SampleRng

AIM = 0.05


def main() -> None:
    load_plugins()
    parser = arguments(__doc__)
    parser.set_defaults(repeats=9)
    parser.add_argument("--batch", type=int, action="append", help="images in a forward; may be repeated")
    parser.add_argument("--defense", default="aaa-linear")
    options = parser.parse_args()
    here, device = setting(options), torch.device(options.device)
    networks = (numerics.fast(here.network, here.x[:32]).module, nn.Sequential(nn.AvgPool2d(8), nn.Flatten()))
    defense = defenses.create(options.defense)
    calibration = Split((here.x * 255).round().byte().cpu(), here.y.cpu())
    insides = [defense(network, calibration.to(device), 0).eval() for network in networks]
    print(f"{machine(options.device)}\n{options.defense} around a ResNet-20, forwards of each: {options.repeats}\n")
    deployment = Deployment(defense, networks, calibration, 0, 4096, device, options.defense)
    lines = []
    with torch.no_grad(), in_own_process(deployment) as remotes:
        clock = clock_of(remotes[0].process.begun.pid, device)
        whole, nothing = (
            [ServedModel(module, defense.random, 4096) for module in pair]
            for pair in zip(remotes, insides, strict=True)
        )
        for batch in options.batch or (100, 256):
            x = here.x.repeat(1 + batch // len(here.x), 1, 1, 1)[:batch]
            streams = SampleRng.create(0, torch.arange(batch, device=device), "isolation")
            same = torch.equal(*(model(x, streams) for model in whole))
            there, within = medians(whole, x, streams, clock, options.repeats)
            way = float(np.subtract(*medians(nothing, x, streams, clock, 10 * options.repeats)))
            times = [f"{1000 * each:.1f} ms" for each in (within, there, way)]
            verdict = "met" if way / within <= AIM else "failed"
            lines.append((batch, *times, f"{100 * way / within:+.1f} %", verdict, "yes" if same else "NO"))
    print(tabulate(lines, headers=("batch", "here", "there", "way", "cost", "aim: +5 %", "same answers")))


def medians(
    models: Sequence[ServedModel], x: torch.Tensor, streams: SampleRng, clock: Callable[[], float], repeats: int
) -> list[float]:
    """The seconds of a forward of each of ``models``, which take turns; the first turn warms up."""
    turns = [[seconds(model, x, streams, clock) for model in models] for _ in range(repeats + 1)]
    return [statistics.median(times) for times in zip(*turns[1:], strict=True)]


def clock_of(pid: int, device: torch.device) -> Callable[[], float]:
    """Seconds that this process and the process ``pid`` have computed; with a GPU, the time."""
    if device.type == "cuda":
        return time.perf_counter
    theirs = ~pid << 3 | 2  # as clock_getcpuclockid makes it on Linux
    return lambda: time.process_time() + time.clock_gettime(theirs)


def seconds(model: ServedModel, x: torch.Tensor, streams: SampleRng, clock: Callable[[], float]) -> float:
    """What one forward takes."""
    began = clock()
    model(x, streams)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return clock() - began


if __name__ == "__main__":
    main()
