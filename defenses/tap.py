"""TAP, targeted adversarial poisons: adversarial examples against one trained network, released as training images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.protection import check_share
from bench.protocols import Job, Stage
from bench.ranges import Count
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Norm
from bench.training import augment
from defenses.checkpoints import (
    ImageLoss,
    LevelBox,
    check_shift,
    check_training,
    cross_entropy,
    gradient,
    protect,
    stepwise,
    train_last,
)
from defenses.levels import whole_levels

# How the released protecting network is trained, where it is not as the data set suggests.
RELEASED = {"epochs": 40, "schedule": "steps", "milestones": (0.375, 0.625, 0.875)}


@defenses("tap")
@dataclass(frozen=True, kw_only=True)
class TargetedPoisons:
    """Move each image by projected gradient descent on a trained network's cross-entropy with its target.

    The network is trained on the clean training images for ``epochs``, the released 40 by default; images below 16
    pixels have their own recipe (:meth:`bench.training.Recipe.for_dataset`). The descent starts from Gaussian noise
    with a deviation of ``eps``, cut to the ball, and takes ``steps`` steps of ``rel_step * eps``. Each step sees the
    images moved and mirrored anew, as in training. The result is rounded to grey levels.

    The released code draws eight starts and keeps the set with the lowest loss; this is one start. Its augmentation
    moves images by parts of a pixel, too; this one by whole pixels.

    Args:
        eps: radius on the pixel scale, a whole number of grey levels.
        shift: the target is so many classes after the true one, in a circle.
        share: of the training images, how many are protected; the network sees all of them clean.

    Source:
        Fowl et al., NeurIPS 2021, arXiv:2106.10807, and the released ``forgemaster_targeted.py``.

    Raises:
        ConfigError: a radius off the grid, no steps, a step of no size, or a share or a network that cannot be used.
    """

    eps: float = 8 / 255
    steps: int = 250
    rel_step: float = 0.05
    epochs: int | None = None
    network: str | None = None
    shift: Count = 1
    share: float = 1.0

    stage: ClassVar[Stage] = "data"
    norm: ClassVar[Norm] = "linf"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Fowl et al., NeurIPS 2021, arXiv:2106.10807"

    def __post_init__(self) -> None:
        whole_levels(self.eps)
        check_share(self.share)
        check_training(self.network, self.epochs)
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; take at least one")
        if not 0 < self.rel_step < float("inf"):
            raise ConfigError(f"rel_step is {self.rel_step}; it is a positive share of eps")

    def __call__(self, data: Dataset, job: Job) -> Split:
        """The training split to release, uint8."""
        check_shift(self.shift, data)
        network = train_last(data, self.network, stepwise(data, self.epochs, RELEASED), job)
        loss = cross_entropy(network)

        def seen(rng: SampleRng) -> ImageLoss:
            return lambda x, target: loss(augment(x, data.flip, data.shift, rng), target)

        def craft(levels: Tensor, target: Tensor, rng: SampleRng) -> Iterator[Tensor]:
            box = LevelBox.around(levels, self.eps)
            moved = box.project(levels + 255 * self.eps * rng.fork("start").normal(*levels.shape[1:]))
            for step in range(self.steps):
                slope = gradient(seen(rng.fork(step)), moved, target)
                moved = box.project(moved - 255 * self.eps * self.rel_step * slope.sign())
                yield moved

        return protect(data, self.share, self.shift, self.eps, job, craft, self.steps)
