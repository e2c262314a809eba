"""Attacks with gradients: ours beside torchattacks', pyautoattack's and foolbox's, on one network and the same images.

    python benchmarks/white_box.py                      # an adversarially trained network on digits, trained here
    python benchmarks/white_box.py --data-dir DATA      # ResNet-20 on CIFAR-10
    python benchmarks/white_box.py --data-dir DATA --model resnet20-at --eps 0.0314 --n 40 --only autoattack

For each attack: the images left, forward and backward passes for each image as they were counted at the network,
seconds, on a CPU those of computing, so that other work on the machine does not count, and the share of them outside
the passes; then on how many images both agree, which only one of the two took, and ratios, theirs over ours, so above 1
is in our favour. We stop a sample at its first success, the others between restarts and targets. ``parry`` attacks the
same network as the others; ``as served`` is what `bench run` does: it searches in fast numbers of the same precision,
batch-norms folded and channels last. In brackets, the ratios to that. Lines are printed as they are measured.
"""

import argparse
import copy
import importlib
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from setting import WEIGHTS, Clocked, Setting, arguments, machine, setting
from torch import Tensor, nn

from bench.models import resolve
from bench.numerics import SPECIMENS, fast
from bench.oracle import NEVER, Referee
from bench.oracle.served import ServedModel
from bench.protocols import Job
from bench.registry import attacks, datasets, defenses, load_plugins
from bench.rng import SampleRng
from bench.rules import rules_of
from bench.threat import Threat


class Counted(Clocked):
    """A network that counts and times images on their way back, too."""

    def reset(self) -> None:
        super().reset()
        self.back, self._began = 0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = x.view_as(x)  # of this pass alone, since others may begin at the same tensor
        logits = super().forward(x)
        if logits.requires_grad:
            logits.register_hook(self._begin)
            x.register_hook(self._end)
        return logits

    def _begin(self, gradient: Tensor) -> None:
        self.back += len(gradient)
        self._began = now(self.device)

    def _end(self, gradient: Tensor) -> None:
        self.seconds += now(self.device) - self._began


class Result(NamedTuple):
    """Who fell (n,), what that cost each image, how long it took, and what share of that was outside the passes."""

    fell: Tensor
    forwards: float
    backwards: float
    seconds: float
    outside: float


HEADERS = ("", "left", "forward", "backward", "seconds", "outside", "agree", "only we / they", "passes", "time")
WIDTHS = (8, 9, 10, 9, 9, 12, 16, 8, 14)

Run = Callable[[nn.Module, Setting, float], Tensor]  # the final examples


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", help="a trained one for CIFAR-10; by default a ResNet-20 that is not robust")
    parser.add_argument("--eps", type=float, help="linf radius; 0.15 on digits, 1/255 on CIFAR-10")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="*", help="our attacks, as they stand in the table or by name alone")
    parser.add_argument("--plain", action="store_true", help="without the line as served")
    options = parser.parse_args()
    load_plugins()
    here = setting(options, options.model or WEIGHTS) if options.data_dir else digits(options)
    eps = options.eps or (1 / 255 if options.data_dir else 0.15)
    print(f"{machine(options.device)}\n{len(here.x)} images that are right when clean, linf {eps:.4f}")
    missing = [library for library in ("torchattacks", "pyautoattack", "foolbox") if not installed(library)]
    print(f"not installed, and left out: {', '.join(missing)}\n" if missing else "")
    served = fast(copy.deepcopy(here.network), here.x[:SPECIMENS]).module
    print(line(HEADERS))
    table = rivals(options.steps)
    for spec in chosen(list(table), options.only):

        def attack(network: nn.Module, here: Setting, eps: float, spec: str = spec) -> Tensor:
            return ours(spec, network, here, eps)

        mine = run(attack, here, eps, here.network)
        print(f"\n{spec}\n" + line(("parry", *described(mine))), flush=True)
        quick = None if options.plain else run(attack, here, eps, served)
        if quick:
            print(line(("as served", *described(quick), *compared(mine, quick))), flush=True)
        for library, other in table[spec].items():
            if library in missing:
                continue
            theirs = run(other, here, eps, here.network)
            passes = (theirs.forwards + theirs.backwards) / (mine.forwards + mine.backwards)
            pace = f"{theirs.seconds / mine.seconds:.2f}"
            pace += f" ({theirs.seconds / quick.seconds:.2f})" if quick else ""
            print(line((library, *described(theirs), *compared(mine, theirs), f"{passes:.2f}", pace)), flush=True)


def chosen(specs: list[str], only: list[str] | None) -> list[str]:
    """Those that ``only`` names in full, and all of a name that is none in full; without ``only``, all of them."""
    names = {name for name in only or [] if name not in specs}
    return [spec for spec in specs if not only or spec in only or spec.partition("(")[0] in names]


def line(cells: tuple[str, ...]) -> str:
    """A line of the table."""
    first, *rest = cells
    return f"{first:14}" + "".join(f"{cell:>{width}}" for cell, width in zip(rest, WIDTHS, strict=False))


def digits(options: argparse.Namespace) -> Setting:
    """A small network trained against PGD at 0.15, and images that it gets right."""
    device = torch.device(options.device)
    data = datasets.create("digits")(None)
    defense = defenses.create("pgd-at(eps=0.15, epochs=15)")
    network = defense(lambda: resolve("cnn")(10, (1, 8, 8), None), data, Job(device=device)).requires_grad_(False)
    x, y = data.test.pixels().to(device), data.test.labels.to(device)
    right = network(x).argmax(1) == y
    return Setting(network, x[right][: options.n], y[right][: options.n])


def installed(library: str) -> bool:
    """Whether ``library`` can be imported."""
    try:
        importlib.import_module(library)
    except ImportError:
        return False
    return True


def run(attack: Run, here: Setting, eps: float, attacked: nn.Module) -> Result:
    """Time ``attack`` on the network ``attacked``, and judge what it gives: misclassified inside ball and box."""
    network = Counted(attacked)
    network.reset()
    began = now(here.x.device)
    x_adv = attack(network, here, eps).detach()
    seconds = now(here.x.device) - began
    n = len(here.x)
    inside = ((x_adv - here.x).abs().flatten(1).amax(dim=1) <= eps + 1e-6) & (x_adv.flatten(1).amin(dim=1) >= -1e-6)
    with torch.no_grad():
        wrong = here.network(x_adv).argmax(1) != here.y
    return Result(wrong & inside, network.images / n, network.back / n, seconds, 1 - network.seconds / seconds)


def now(device: torch.device) -> float:
    """Seconds of a GPU's work, or of this process's computing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def ours(spec: str, network: nn.Module, here: Setting, eps: float) -> Tensor:
    attack, ids = attacks.create(spec), torch.arange(len(here.x), device=here.x.device)
    threat = Threat("linf", eps, "gradients", 100_000 if not spec.startswith("square") else 5000)
    referee = Referee(
        ServedModel(network), here.x, here.y, threat, SampleRng.create(0, ids, "defense"), rules=rules_of(attack),
        classes=10,
    )  # fmt: skip
    final = referee.finish(attack(referee.oracle, here.x, here.y, threat, SampleRng.create(0, ids, "attack")))
    return torch.where((referee.ledger.first_hit != NEVER)[:, None, None, None], referee.ledger.hits, final)


def torchattacks(name: str, rel_step: float | None = None, **settings: object) -> Run:
    def attack(network: nn.Module, here: Setting, eps: float) -> Tensor:
        kind = getattr(importlib.import_module("torchattacks"), name)
        step = {} if rel_step is None else {"alpha": rel_step * eps}
        return kind(network, eps=eps, **step, **settings)(here.x, here.y)

    return attack


def pyautoattack(name: str, **settings: object) -> Run:
    def attack(network: nn.Module, here: Setting, eps: float) -> Tensor:
        base = importlib.import_module("pyautoattack.autopgd_base")
        fab = importlib.import_module("pyautoattack.fab_pt")
        whole = importlib.import_module("pyautoattack")
        device = here.x.device
        if name == "AutoAttack":
            judge = whole.AutoAttack(network, norm="Linf", eps=eps, seed=0, device=device, **settings)
            return judge.run_standard_evaluation(here.x, here.y, batch_size=len(here.x))[0]
        kind = {"apgd": base.APGDAttack, "apgd-t": base.APGDAttack_targeted, "fab": fab.FABAttack_PT}[name]
        return kind(network, norm="Linf", eps=eps, seed=0, device=device, **settings).perturb(here.x, here.y)

    return attack


def foolbox(name: str, **settings: object) -> Run:
    def attack(network: nn.Module, here: Setting, eps: float) -> Tensor:
        library = importlib.import_module("foolbox")
        model = library.PyTorchModel(network, bounds=(0, 1), device=here.x.device)
        return getattr(library.attacks, name)(**settings)(model, here.x, here.y, epsilons=eps)[1]

    return attack


def rivals(steps: int) -> dict[str, dict[str, Run]]:
    """Our attacks, and what others have of the same name."""
    pgd = {"steps": steps, "random_start": True}
    return {
        "fgsm": {"torchattacks": torchattacks("FGSM"), "foolbox": foolbox("LinfFastGradientAttack")},
        f"pgd(steps={steps}, rel_step=0.1, schedule=constant)": {
            "torchattacks": torchattacks("PGD", rel_step=0.1, **pgd),
            "foolbox": foolbox("LinfProjectedGradientDescentAttack", rel_stepsize=0.1, **pgd),
        },
        f"apgd(steps={steps})": {
            "torchattacks": torchattacks("APGD", steps=steps, seed=0),
            "pyautoattack": pyautoattack("apgd", n_iter=steps),
        },
        f"apgd(steps={steps}, loss=dlr)": {
            "torchattacks": torchattacks("APGD", steps=steps, seed=0, loss="dlr"),
            "pyautoattack": pyautoattack("apgd", n_iter=steps, loss="dlr"),
        },
        f"apgd-t(steps={steps})": {
            "torchattacks": torchattacks("APGDT", steps=steps, seed=0),
            "pyautoattack": pyautoattack("apgd-t", n_iter=steps),
        },
        f"fab-t(steps={steps})": {
            "torchattacks": torchattacks("FAB", steps=steps, seed=0, multi_targeted=True, n_classes=10),
            "pyautoattack": pyautoattack("fab", n_iter=steps, targeted=True),
        },
        f"fab(steps={steps})": {"pyautoattack": pyautoattack("fab", n_iter=steps)},
        f"fmn(steps={steps})": {"foolbox": foolbox("LInfFMNAttack", steps=steps)},
        f"pma(steps={steps})": {},
        "pma-plus": {},
        "autoattack": {"pyautoattack": pyautoattack("AutoAttack")},
        "autoattack(preset=rand)": {"pyautoattack": pyautoattack("AutoAttack", version="rand")},
        "autoattack(preset=plus)": {"pyautoattack": pyautoattack("AutoAttack", version="plus")},
    }  # fmt: skip


def compared(mine: Result, theirs: Result) -> tuple[str, str]:
    """On how many images both agree, and how many only we and only they took."""
    only_we, only_they = int((mine.fell & ~theirs.fell).sum()), int((theirs.fell & ~mine.fell).sum())
    n = len(mine.fell)
    return f"{n - only_we - only_they} of {n}", f"{only_we} / {only_they}"


def described(result: Result) -> tuple[str, ...]:
    left, outside = 100 * (1 - result.fell.float().mean().item()), 100 * result.outside
    passes = f"{result.forwards:.0f}", f"{result.backwards:.0f}"
    return f"{left:.1f} %", *passes, f"{result.seconds:.2f}", f"{outside:.1f} %"


if __name__ == "__main__":
    main()
