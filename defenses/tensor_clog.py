"""TensorClog: images whose gradient by the weights of a new head is small, so that a head on known features learns
little from them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn import functional as F

from bench.dataset import Dataset, Split
from bench.protection import check_share
from bench.protocols import Job, Stage
from bench.ranges import Count, NonNegative, Positive
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Norm
from bench.training import Recipe
from defenses.checkpoints import ImageLoss, LevelBox, check_training, gradient, protect, train_last
from defenses.features import features_of, last_linear
from defenses.levels import whole_levels
from defenses.surrogate import surrogate, surrogate_job


@defenses("tensor-clog")
@dataclass(frozen=True, kw_only=True)
class TensorClog:
    """Move each image so that its loss has a small gradient by the weights and the biases of a new, random head.

    The network below the head is trained once, on the clean images and as the data set suggests, for ``epochs``. Then
    ``steps`` plain gradient steps of ``lr`` go down the norms of the two gradients, added, and ``weight`` times the
    distance from the image. Of a linear head they are known without a second pass: see :func:`clog`.

    The victim that the paper means trains a head on the same network. A learner that starts from nothing computes other
    gradients, which nothing makes small.

    Args:
        eps: radius on the pixel scale, a whole number of grey levels; released is a tenth of a standard deviation of
            the pixels, which are 5 levels on CIFAR-10.
        lr: of a step on the pixel scale; the released step of 1 in pixels that are divided by their standard deviation
            of 0.2, squared.
        weight: of the l2 distance; the released 0.01 in such pixels.
        network: an untrained one by name: ``cnn`` for images below 16 pixels and else ``resnet18``, unless given.
        share: of the training images, how many are protected; the network sees all of them clean.

    Source:
        Shen, Zhu and Ma, IEEE Access 7, 2019; steps, rate, weight and the norms added layer by layer as in the released
        ``attacks.py``.

    Raises:
        ConfigError: a radius off the grid, or a share or a network that cannot be used.
    """

    eps: float = 8 / 255
    steps: Count = 100
    lr: Positive = 0.04
    weight: NonNegative = 0.05
    epochs: int | None = None
    network: str | None = None
    share: float = 1.0

    stage: ClassVar[Stage] = "data"
    norm: ClassVar[Norm] = "linf"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Shen, Zhu and Ma, IEEE Access 7, 2019"

    def __post_init__(self) -> None:
        whole_levels(self.eps)
        check_share(self.share)
        check_training(self.network, self.epochs)

    def __call__(self, data: Dataset, job: Job) -> Split:
        """The training split to release, uint8.

        Raises:
            ConfigError: the network does not end in a linear layer.
        """
        few = data.train.pixels(slice(2)).to(job.device)
        last_linear(surrogate(data, self.network, surrogate_job(job)).eval(), few)  # before slow work starts
        network = train_last(data, self.network, Recipe.for_dataset(data, epochs=self.epochs), job)
        old = last_linear(network, few)
        loss = clog(network, old, new_head(old, surrogate_job(job).seed).to(job.device))

        def craft(levels: Tensor, own: Tensor, rng: SampleRng) -> Iterator[Tensor]:
            box, moved = LevelBox.around(levels, self.eps), levels

            def costs(x: Tensor, target: Tensor) -> Tensor:
                away: Tensor = vector_norm((x - levels / 255).flatten(1), dim=1)
                return loss(x, target) + self.weight * away

            for _ in range(self.steps):
                moved = box.project(moved - 255 * self.lr * gradient(costs, moved, own))
                yield moved

        return protect(data, self.share, 0, self.eps, job, craft, self.steps)


def new_head(old: nn.Linear, seed: int) -> nn.Linear:
    """A head of the sizes of ``old`` that has learned nothing: Glorot's weights and torch's biases; on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.init.xavier_uniform_(torch.empty(old.weight.shape), generator=generator)
    bias = nn.init.uniform_(torch.empty(old.out_features), -(old.in_features**-0.5), old.in_features**-0.5, generator)
    head = nn.Linear(old.in_features, old.out_features)
    head.load_state_dict({"weight": weight, "bias": bias})
    return head.requires_grad_(False)


def clog(network: nn.Module, old: nn.Linear, head: nn.Linear) -> ImageLoss:
    """How much of each image's cross-entropy under ``head``, in the place of ``old``, its parameters feel.

    The l2 norm of the gradient by the biases, ``p - y``, and of that by the weights, its outer product with the
    features: that norm times the features' own.
    """
    def loss(x: Tensor, target: Tensor) -> Tensor:
        with features_of(old) as seen:
            network(x)
        features = seen[0].to(head.weight.dtype)
        error = head(features).softmax(dim=1) - F.one_hot(target, head.out_features)
        norm: Tensor = vector_norm(error, dim=1) * (1 + vector_norm(features, dim=1))
        return norm

    return loss
