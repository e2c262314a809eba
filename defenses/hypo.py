"""HYPO, hypocritical perturbations: images that a trained network finds so plain that nothing is left to learn."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench.dataset import Dataset, Split
from bench.protection import check_share
from bench.protocols import Job, Stage
from bench.ranges import Count, Positive
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Norm
from bench.training import Recipe
from defenses.checkpoints import LevelBox, check_training, cross_entropy, gradient, protect, train_last
from defenses.levels import whole_levels


@defenses("hypo")
@dataclass(frozen=True, kw_only=True)
class HypocriticalPerturbations:
    """Move each image down a trained network's cross-entropy with its own class, by projected gradient descent.

    The network is trained once, on the clean images and as the data set suggests, for ``epochs``; then it stays as it
    is, which tells this from ``em``, whose network and noise take turns. The descent takes ``steps`` steps of
    ``rel_step * eps`` along the signs, from the image itself, and is rounded to grey levels.

    Args:
        eps: radius on the pixel scale, a whole number of grey levels.
        network: an untrained one by name: ``cnn`` for images below 16 pixels and else ``resnet18``, unless given.
        share: of the training images, how many are protected; the network sees all of them clean.

    Source:
        Tao et al., NeurIPS 2021, arXiv:2102.04716, its hypocritical perturbations; a step of a tenth of eps as in
        APBench, Qin et al., 2023, arXiv:2308.03258.

    Raises:
        ConfigError: a radius off the grid, or a share or a network that cannot be used.
    """

    eps: float = 8 / 255
    steps: Count = 100
    rel_step: Positive = 0.1
    epochs: int | None = None
    network: str | None = None
    share: float = 1.0

    stage: ClassVar[Stage] = "data"
    norm: ClassVar[Norm] = "linf"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Tao et al., NeurIPS 2021, arXiv:2102.04716"

    def __post_init__(self) -> None:
        whole_levels(self.eps)
        check_share(self.share)
        check_training(self.network, self.epochs)

    def __call__(self, data: Dataset, job: Job) -> Split:
        """The training split to release, uint8."""
        network = train_last(data, self.network, Recipe.for_dataset(data, epochs=self.epochs), job)
        loss = cross_entropy(network)

        def craft(levels: Tensor, own: Tensor, rng: SampleRng) -> Iterator[Tensor]:
            box, moved = LevelBox.around(levels, self.eps), levels
            for _ in range(self.steps):
                slope = gradient(loss, moved, own)
                moved = box.project(moved - 255 * self.eps * self.rel_step * slope.sign())
                yield moved

        return protect(data, self.share, 0, self.eps, job, craft, self.steps)
