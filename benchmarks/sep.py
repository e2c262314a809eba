"""SEP's speed: our generator against a plain loop that reloads each checkpoint at each step, on equal images, in turn.

    python benchmarks/sep.py --data-dir DATA

Counted are images times checkpoints times steps: each is one forward and one backward pass. The plain loop is what one
would write with checkpoints on disk: load, forward, backward, next. "plain" runs the same networks kept in memory,
"fast" has batch-norm folded, channels last, and bf16 on a GPU, as the defense has them. Every figure is a median over
rounds, ratios are taken within a round. Networks are ResNets with random weights, on which speed does not depend.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from setting import arguments, machine, setting
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from bench import numerics
from bench.models import resolve
from defenses.checkpoints import CHUNK, cross_entropy
from defenses.sep import SelfEnsemble, total_gradient


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--network", default="resnet20", help="of the checkpoints")
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    here, device = setting(options), torch.device(options.device)
    levels, target = (255 * here.x).round(), (here.y + 5) % 10
    torch.manual_seed(0)
    networks = [resolve(options.network)(10, (3, 32, 32), None).to(device) for _ in range(options.checkpoints)]
    fast = [numerics.fast(network, here.x).module for network in networks]
    defense = SelfEnsemble(steps=options.steps, checkpoints=options.checkpoints)

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.pt" for number in range(len(networks))]
        for network, file in zip(networks, files, strict=True):
            torch.save(network.state_dict(), file)
        spare = resolve(options.network)(10, (3, 32, 32), None).to(device)
        runs = {
            "parry, fast": lambda: ours(defense, fast, levels, target),
            "parry, plain": lambda: ours(defense, [numerics.plain(network) for network in networks], levels, target),
            "plain loop": lambda: plain_loop(spare, files, here.x, target, options.steps),
        }
        for run in runs.values():
            run()  # a GPU picks its kernels
        rounds = [{name: seconds(run, device) for name, run in runs.items()} for _ in range(options.repeats)]

    passes = len(levels) * len(networks) * options.steps
    print(machine(options.device))
    print(f"{len(levels)} images, {len(networks)} of {options.network}, {options.steps} steps\n")
    lines = []
    for name in runs:
        pace = statistics.median(passes / round[name] for round in rounds)
        ratio = statistics.median(round["plain loop"] / round[name] for round in rounds)
        lines.append((name, f"{pace:,.0f}", f"{ratio:.2f}"))
    headers = ("", "images x checkpoints x steps / s", "against the plain loop")
    print(tabulate(lines, headers=headers, disable_numparse=True, colalign=("left", "right", "right")))

    few, wanted = levels[:CHUNK], target[:CHUNK]
    exact, quick = (total_gradient([cross_entropy(k) for k in group], few, wanted) for group in (networks, fast))
    print(f"\nsigns of the mean gradient that fast and plain numbers share: {same_sign(exact, quick):.2%}")


def seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def ours(defense: SelfEnsemble, networks: list[nn.Module], levels: Tensor, target: Tensor) -> Tensor:
    losses = [cross_entropy(network) for network in networks]
    parts = zip(levels.split(CHUNK), target.split(CHUNK), strict=True)

    def direction(x: Tensor, y: Tensor, box: object, step: int) -> Tensor:
        return total_gradient(losses, x, y)

    return torch.cat([defense.move(direction, *part) for part in parts])


def plain_loop(network: nn.Module, files: list[Path], clean: Tensor, target: Tensor, steps: int) -> Tensor:
    network.eval()
    moved = []
    for original, wanted in zip(clean.split(CHUNK), target.split(CHUNK), strict=True):
        x = original
        for _ in range(steps):
            total = torch.zeros_like(x)
            for file in files:
                network.load_state_dict(torch.load(file, map_location=x.device, weights_only=True))
                x = x.detach().requires_grad_(True)
                (slope,) = torch.autograd.grad(F.cross_entropy(network(x), wanted), x)
                total += slope
            x = x.detach() - total.sign() / 255
            x = torch.minimum(torch.maximum(x, original - 2 / 255), original + 2 / 255).clamp(0, 1)
        moved.append(x)
    return torch.cat(moved)


def same_sign(a: Tensor, b: Tensor) -> float:
    return float((a.sign() == b.sign()).float().mean())


if __name__ == "__main__":
    main()
