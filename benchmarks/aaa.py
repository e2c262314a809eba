"""What AAA costs a service: its post-processing against the network's forward pass, batch by batch.

    python benchmarks/aaa.py --data-dir DATA
"""

import statistics

import torch
from setting import arguments, machine, now, setting
from tabulate import tabulate

from bench import engine, numerics
from bench.registry import defenses, load_plugins


def main() -> None:
    options = arguments(__doc__).parse_args()
    load_plugins()
    here = setting(options)
    found = engine.installed() if options.device == "cpu" else None
    fast = numerics.fast(here.network, here.x, engine=found)
    network = fast.module
    print(f"{machine(options.device)}, engine: {fast.engine}")
    print(f"ResNet-20 in fast numbers, median of {3 * options.repeats} calls\n")
    lines = []
    for batch in (1, 32, options.n):
        x = here.x[:batch]
        with torch.no_grad():
            logits = network(x)
        forward = median(lambda x=x: network(x), 3 * options.repeats, x.device)
        for solver in ("exact", "as-released"):
            # The defense around the identity: its input are the logits.
            served = defenses.create(f"aaa-linear(solver={solver})")(torch.nn.Identity(), None, 0)
            edit = median(lambda served=served, logits=logits: served(logits), 3 * options.repeats, x.device)
            lines.append((batch, solver, f"{1e3 * forward:.1f}", f"{1e3 * edit:.2f}", f"{100 * edit / forward:.1f} %"))
    headers = ("batch", "solver", "forward, ms", "post-processing, ms", "share of the forward")
    print(tabulate(lines, headers=headers, disable_numparse=True))


@torch.no_grad()
def median(call, repeats: int, device: torch.device) -> float:
    """Seconds that ``call`` takes, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        began = now(device)
        call()
        times.append(now(device) - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
