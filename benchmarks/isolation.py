"""What a process of its own costs a defense: the time of a forward there over that of the same forward here.

    python benchmarks/isolation.py --data-dir DATA --batch 100 --batch 256

The defense is AAA around a ResNet-20 in fast numbers. Each figure is the median over pairs of forwards, one there and
one here in turn, of the ratio within a pair; the aim is at most 5 % more.
"""

import statistics
import time

import torch
from setting import arguments, machine, setting
from tabulate import tabulate

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
    parser.add_argument("--batch", type=int, action="append", help="images in a forward; may be repeated")
    parser.add_argument("--defense", default="aaa-linear")
    options = parser.parse_args()
    here = setting(options)
    network = numerics.fast(here.network, here.x[:32]).module
    defense = defenses.create(options.defense)
    calibration = Split((here.x * 255).round().byte().cpu(), here.y.cpu())
    inside = ServedModel(defense(network, calibration.to(options.device), 0).eval(), defense.random, 4096)
    print(f"{machine(options.device)}\n{options.defense} around a ResNet-20, pairs of forwards: {options.repeats}\n")
    device = torch.device(options.device)
    deployment = Deployment(defense, (network,), calibration, 0, 4096, device, options.defense)
    lines = []
    with torch.no_grad(), in_own_process(deployment) as (remote,):
        outside = ServedModel(remote, defense.random, 4096)
        for batch in options.batch or (100, 256):
            x = here.x.repeat(1 + batch // len(here.x), 1, 1, 1)[:batch]
            streams = SampleRng.create(0, torch.arange(batch, device=device), "isolation")
            same = torch.equal(inside(x, streams), outside(x, streams))  # warms up, too
            pairs = [(seconds(outside, x, streams), seconds(inside, x, streams)) for _ in range(options.repeats)]
            more = statistics.median(there / within for there, within in pairs) - 1
            took = statistics.median(within for _, within in pairs)
            lines.append((batch, f"{1000 * took:.0f} ms", f"{100 * more:+.1f} %", "met" if more <= AIM else "failed",
                          "yes" if same else "NO"))  # fmt: skip
    print(tabulate(lines, headers=("batch", "forward", "in a process of its own", "aim: +5 %", "same answers")))


def seconds(model: ServedModel, x: torch.Tensor, streams: SampleRng) -> float:
    """The time of one forward."""
    began = time.perf_counter()
    model(x, streams)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
