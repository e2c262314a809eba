"""Attacks with gradients: ours beside torchattacks', pyautoattack's and foolbox's, on one network and the same images.

    python benchmarks/white_box.py                      # an adversarially trained network on digits, trained here
    python benchmarks/white_box.py --data-dir DATA      # ResNet-20 on CIFAR-10

For each attack: the images left, those that only one of the two took, forward and backward passes for each image as
they were counted at the network, and seconds, on a CPU those of computing, so that other work on the machine does not
count; ratios are theirs over ours, so above 1 is in our favour. We stop a sample at its first success, the others
between restarts and targets. ``parry`` attacks the same network as the others; ``as served`` is what `bench run` does:
it searches in fast numbers of the same precision, batch-norms folded and channels last. In brackets, the ratios to
that.
"""

import argparse
import copy
import importlib
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from setting import Clocked, Setting, arguments, machine, setting
from tabulate import tabulate
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
    """A network that counts images on their way back, too."""

    def reset(self) -> None:
        super().reset()
        self.back = 0

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        self.back += len(gradient)


class Result(NamedTuple):
    """Who fell (n,), what that cost each image, and how long it took."""

    fell: Tensor
    forwards: float
    backwards: float
    seconds: float


Run = Callable[[nn.Module, Setting, float], Tensor]  # the final examples


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--eps", type=float, help="linf radius; 0.15 on digits, 1/255 on CIFAR-10")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="*", help="our attacks, as they stand in the table or by name alone")
    options = parser.parse_args()
    load_plugins()
    here = setting(options) if options.data_dir else digits(options)
    eps = options.eps or (1 / 255 if options.data_dir else 0.15)
    print(f"{machine(options.device)}\n{len(here.x)} images that are right when clean, linf {eps:.4f}")
    missing = [library for library in ("torchattacks", "pyautoattack", "foolbox") if not installed(library)]
    print(f"not installed, and left out: {', '.join(missing)}\n" if missing else "")
    served = fast(copy.deepcopy(here.network), here.x[:SPECIMENS]).module
    lines = []
    for spec, others in rivals(options.steps).items():
        if options.only and not {spec, spec.partition("(")[0]} & set(options.only):
            continue
        mine, quick = (
            run(lambda network, here, eps, spec=spec: ours(spec, network, here, eps), here, eps, network)
            for network in (here.network, served)
        )
        lines.append((spec, "parry", *described(mine), "", "", ""))
        lines.append(("", "as served", *described(quick), compared(mine, quick), "", ""))
        for library, attack in others.items():
            if library in missing:
                continue
            theirs = run(attack, here, eps, here.network)
            passes = (theirs.forwards + theirs.backwards) / (mine.forwards + mine.backwards)
            pace = f"{theirs.seconds / mine.seconds:.2f} ({theirs.seconds / quick.seconds:.2f})"
            lines.append(("", library, *described(theirs), compared(mine, theirs), f"{passes:.2f}", pace))
    headers = ("attack", "", "left", "forward", "backward", "seconds", "only we / they took", "passes", "time")
    print(tabulate(lines, headers=headers, disable_numparse=True, colalign=("left", "left", *["right"] * 7)))


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
    return Result(wrong & inside, network.images / n, network.back / n, seconds)


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


def torchattacks(name: str, **settings: object) -> Run:
    def attack(network: nn.Module, here: Setting, eps: float) -> Tensor:
        kind = getattr(importlib.import_module("torchattacks"), name)
        radius = {} if name == "FMN" else {"eps": eps}
        return kind(network, **radius, **settings)(here.x, here.y)

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
            "torchattacks": torchattacks("PGD", alpha=0.1 * 0.15, **pgd),
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


def compared(mine: Result, theirs: Result) -> str:
    """The images that only we and only they took."""
    return f"{int((mine.fell & ~theirs.fell).sum())} / {int((theirs.fell & ~mine.fell).sum())}"


def described(result: Result) -> tuple[str, ...]:
    left = 100 * (1 - result.fell.float().mean().item())
    return f"{left:.1f} %", f"{result.forwards:.0f}", f"{result.backwards:.0f}", f"{result.seconds:.2f}"


if __name__ == "__main__":
    main()
