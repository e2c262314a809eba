"""Square's speed: ours against torchattacks' and pyautoattack's, on one network, with equal images and budget, in turn.

    python benchmarks/square.py --data-dir DATA

Queries are images that went through the network. The share outside the network is what the attack itself costs, and
for ours what the referee costs, too. "plain" runs the very network that the others run; "fast" is how the runner
searches: batch-norm folded, channels last, and bf16 on a GPU. Every figure is a median over rounds, ratios are taken
within a round. Where OpenVINO is installed, "engine" is the search network that it answers for.
"""

import statistics

import torch
from setting import Clocked, Setting, arguments, machine, measure, ours, setting
from tabulate import tabulate

from attacks.square import Square
from bench import engine, numerics
from bench.threat import Threat


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--queries", type=int, default=150, help="budget of each image")
    parser.add_argument("--eps", type=float, default=8 / 255)
    options = parser.parse_args()
    here = setting(options)
    threat = Threat("linf", options.eps, "scores", options.queries)
    square = Square(preset="eccv2020")
    fast = numerics.fast(here.network, here.x)
    by_engine = numerics.fast(here.network, here.x, engine=engine.installed() if options.device == "cpu" else None)
    clocks = {
        **({} if by_engine.engine.startswith(numerics.TORCH) else {"parry, engine": Clocked(by_engine.module)}),
        "parry, fast": Clocked(fast.module),
        "parry, plain": Clocked(here.network),
        "torchattacks": Clocked(here.network),
        "pyautoattack": Clocked(here.network),
    }
    runs = {
        "parry, engine": lambda: ours(square, clocks["parry, engine"], here, threat, confirmed=True),
        "parry, fast": lambda: ours(square, clocks["parry, fast"], here, threat),
        "parry, plain": lambda: ours(square, clocks["parry, plain"], here, threat),
        "torchattacks": lambda: torchattacks(clocks["torchattacks"], here, threat),
        "pyautoattack": lambda: pyautoattack(clocks["pyautoattack"], here, threat),
    }
    runs = {name: run for name, run in runs.items() if name in clocks}
    print(f"{machine(options.device)}\nengine: {by_engine.engine}")
    print(f"{len(here.x)} images, {options.queries} queries each, linf {options.eps:.4f}\n")
    rounds = [{name: measure(run, clocks[name]) for name, run in runs.items()} for _ in range(options.repeats)]

    lines = []
    for name in runs:
        robust, pace, outside = (statistics.median(round[name][i] for round in rounds) for i in range(3))
        ratio = statistics.median(round[name][1] / round["torchattacks"][1] for round in rounds)
        lines.append((name, f"{100 * robust:.1f} %", f"{pace:,.0f}", f"{100 * outside:.1f} %", f"{ratio:.2f}"))
    headers = ("", "robust accuracy", "queries/s", "outside the network", "against torchattacks")
    print(tabulate(lines, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 4)))


@torch.no_grad()
def torchattacks(network: Clocked, here: Setting, threat: Threat) -> float:
    from torchattacks import Square as Theirs

    settings = {"eps": threat.eps, "n_queries": threat.query_budget, "p_init": 0.05, "seed": 0}
    adversarial = Theirs(network, norm="Linf", **settings)(here.x, here.y)
    return float((network.network(adversarial).argmax(1) == here.y).float().mean())


@torch.no_grad()
def pyautoattack(network: Clocked, here: Setting, threat: Threat) -> float:
    from pyautoattack.square import SquareAttack as Theirs

    settings = {"eps": threat.eps, "n_queries": threat.query_budget, "p_init": 0.05, "seed": 0, "resc_schedule": True}
    attack = Theirs(network, norm="Linf", n_restarts=1, verbose=False, device=here.x.device, **settings)
    return float((network.network(attack.perturb(here.x, here.y)).argmax(1) == here.y).float().mean())


if __name__ == "__main__":
    main()
