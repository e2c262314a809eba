"""What each query attack costs beside the network: the share of its time outside it, and its pace beside Square's.

    python benchmarks/overhead.py --data-dir DATA --attack simba --attack nes

At radius 0 no sample falls, so all of them are asked about until the budget is spent; ``--eps`` lets them fall. The
network runs in fast numbers. Its clock stops all that is not a forward pass: proposals, the referee, random numbers.
Every figure is a median over rounds, in each of which all attacks run in turn; the pace is a ratio within a round.
Operations are those of torch that a query of some images costs around the network, views aside: on a GPU each is a
launch, which takes longer than the numbers where images are few, and there other ways are taken than on a CPU.
Attacks that work on the undefended network are left out, and torchattacks' SPSA, whose probes leave a ball so small.
"""

import statistics
from typing import Any

import torch
from setting import Clocked, Setting, arguments, machine, measure, ours, setting
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench import numerics
from bench.registry import attacks, load_plugins
from bench.rules import rules_of
from bench.threat import Threat

AIM = 0.1  # of the time outside the network, at most
AIMED = ("square", "simba", "nes", "sign-hunter")
FOREIGN = ("torchattacks:Square",)
COUNTED = (110, 330)  # budgets between which operations are counted


def main() -> None:
    load_plugins()
    parser = arguments(__doc__)
    parser.add_argument("--attack", action="append", help="may be repeated; all without it, and Square always")
    parser.add_argument("--queries", type=int, default=100, help="budget of each image")
    parser.add_argument("--eps", type=float, default=0.0, help="radius, in l2 for attacks without linf")
    options = parser.parse_args()
    here = setting(options)
    clock = Clocked(numerics.fast(here.network, here.x).module)
    names = list(dict.fromkeys(["square", *(options.attack or querying())]))
    print(f"{machine(options.device)}\n{len(here.x)} images, {options.queries} queries each, radius {options.eps:g}\n")

    def once(name: str) -> tuple[float, float, float]:
        attack = attacks.create(name)
        threat = Threat("linf" if "linf" in attack.norms else "l2", options.eps, attack.access, options.queries)
        return measure(lambda: ours(attack, clock, here, threat), clock)

    once("square")  # warms up
    rounds = [{name: once(name) for name in names} for _ in range(options.repeats)]
    lines = []
    for name in names:
        _, pace, outside = (statistics.median(round[name][i] for round in rounds) for i in range(3))
        ratio = statistics.median(round[name][1] / round["square"][1] for round in rounds)
        access = attacks.create(name).access
        lines.append((name, access, f"{100 * outside:.1f} %", verdict(name, outside), f"{pace:,.0f}", f"{ratio:.2f}",
                      f"{operations(name, here):.0f}"))  # fmt: skip
    headers = ("attack", "sees", "outside the network", f"aim: {100 * AIM:.0f} %", "queries/s", "against square",
               "operations")  # fmt: skip
    sides = ("left", "left", "right", "left", "right", "right", "right")
    print(tabulate(lines, headers=headers, disable_numparse=True, colalign=sides))


class Views(nn.Module):
    """A network that costs no operation: ten pixels are its logits."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10]


class Counting(TorchDispatchMode):
    """While open, counts the operations that are more than a view."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``."""
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(name: str, here: Setting) -> float:
    """Operations of a query of all images that is one of as many calls as there are queries; fewer of larger calls."""
    counts, network, x = [], Clocked(Views(here.x.device)), here.x[:20]
    attack = attacks.create(name)
    for budget in COUNTED:
        threat = Threat("linf" if "linf" in attack.norms else "l2", 0.0, attack.access, budget)
        with torch.no_grad(), Counting() as counting:  # type: ignore[no-untyped-call]
            ours(attack, network, Setting(network, x, network(x).argmax(1)), threat)
        counts.append(counting.count)
    return (counts[1] - counts[0]) / (COUNTED[1] - COUNTED[0])


def querying() -> list[str]:
    """Every attack that asks for scores or labels and has only the served model to ask, ours first."""
    named = [name for name in attacks.names() if not name.endswith(":")]
    ours = [name for name in named if getattr(attacks.factory(name), "access", "") != "certificate"]
    created = {name: attacks.create(name) for name in (*ours, *FOREIGN)}
    return [
        name
        for name, attack in created.items()
        if attack.access in ("scores", "labels") and not rules_of(attack).surrogate
    ]


def verdict(name: str, outside: float) -> str:
    """Whether an attack that is to be cheap is."""
    if name.partition("(")[0] not in AIMED:
        return ""
    return "met" if outside <= AIM else "failed"


if __name__ == "__main__":
    main()
