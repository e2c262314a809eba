"""How unlike the gradients of SEP's checkpoints are, and what its steps do to them, on real training images.

    python benchmarks/checkpoints.py --data-dir DATA --train 5000 --epochs 20 --network resnet20

Its authors find the input gradients of checkpoints of one training run nearly orthogonal, which is why few images that
fool one checkpoint fool the others. Printed are the cosines between the gradients of the loss on the target class, the
mean over images, by how far apart the checkpoints are; and after each step, by how many checkpoints an image is still
taken for its class, and for its target.
"""

import argparse
from itertools import combinations
from pathlib import Path

import torch
from tabulate import tabulate
from torch.nn import functional as F

from bench.data.cifar import Cifar10
from bench.protocols import Job
from defenses.checkpoints import LevelBox, cross_entropy, gradient, mean_cosine, recognised
from defenses.sep import SelfEnsemble, total_gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--train", type=int, default=5000, help="training images of the protecting network")
    parser.add_argument("--images", type=int, default=500, help="images that are looked at")
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--eps", type=int, default=2, help="radius in grey levels")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    data = Cifar10(train=options.train)(options.data_dir)
    defense = SelfEnsemble(
        eps=options.eps / 255, steps=options.steps, checkpoints=options.checkpoints, epochs=options.epochs,
        network=options.network,
    )  # fmt: skip
    networks = defense.ensemble(data, Job(device=torch.device(options.device)))
    part = data.train.subset(slice(options.images)).to(torch.device(options.device))
    levels, y = part.images.float(), part.labels
    target = (y + len(data.classes) // 2) % len(data.classes)
    losses = [cross_entropy(network) for network in networks]

    slopes = [gradient(loss, levels, target) for loss in losses]
    apart: dict[int, list[float]] = {}
    for one, other in combinations(range(len(slopes)), 2):
        cosine = F.cosine_similarity(slopes[one].flatten(1), slopes[other].flatten(1)).mean()
        apart.setdefault(other - one, []).append(float(cosine))
    print(f"{len(networks)} checkpoints of {options.network}, {options.epochs} epochs on {options.train} images\n")
    print(f"mean cosine over all pairs and {len(levels)} images: {float(mean_cosine(slopes).mean()):.3f}\n")
    lines = [(distance, f"{sum(found) / len(found):.3f}") for distance, found in apart.items()]
    print(tabulate(lines, headers=("checkpoints apart", "cosine"), disable_numparse=True))

    box, moved, steps = LevelBox.around(levels, defense.eps), levels, []
    for step in range(options.steps + 1):
        counts = [float(recognised(networks, moved, labels).float().mean()) for labels in (y, target)]
        steps.append((step, *(f"{count:.2f}" for count in counts)))
        moved = box.project(moved - total_gradient(losses, moved, target).sign())
    print(f"\ncheckpoints of {len(networks)} that take an image, moved by up to {options.eps} levels, for its class\n")
    print(tabulate(steps, headers=("step", "true class", "target"), disable_numparse=True))


if __name__ == "__main__":
    main()
