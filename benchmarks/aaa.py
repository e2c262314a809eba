"""What AAA costs a service: its post-processing against the network's forward pass, batch by batch.

    python benchmarks/aaa.py --data-dir DATA
"""

import statistics
import time

import torch
from setting import arguments, machine, setting
from tabulate import tabulate

from bench import numerics
from bench.registry import defenses, load_plugins


def main() -> None:
    options = arguments(__doc__).parse_args()
    load_plugins()
    here = setting(options)
    network = numerics.fast(here.network, here.x).module
    print(f"{machine(options.device)}\nResNet-20 in fast numbers, median of {3 * options.repeats} calls\n")
    lines = []
    for batch in (1, 32, options.n):
        x = here.x[:batch]
        with torch.no_grad():
            logits = network(x)
        forward = median(lambda x=x: network(x), 3 * options.repeats)
        for solver in ("exact", "as-released"):
            # The defense around the identity: its input are the logits.
            served = defenses.create(f"aaa-linear(solver={solver})")(torch.nn.Identity(), None, 0)
            edit = median(lambda served=served, logits=logits: served(logits), 3 * options.repeats)
            lines.append((batch, solver, f"{1e3 * forward:.1f}", f"{1e3 * edit:.2f}", f"{100 * edit / forward:.1f} %"))
    headers = ("batch", "solver", "forward, ms", "post-processing, ms", "share of the forward")
    print(tabulate(lines, headers=headers, disable_numparse=True))


@torch.no_grad()
def median(call, repeats: int) -> float:
    """Seconds that ``call`` takes, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    main()
