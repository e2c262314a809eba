"""EM and OPS in one: noise that minimises the loss, and a pixel that tells the class, as in CIFAR-10-S."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from bench.dataset import Dataset, Split, grey_levels
from bench.errors import ConfigError
from bench.protection import merge, protected_rows
from bench.protocols import Job, Stage
from bench.ranges import Count
from bench.registry import added, defenses
from bench.threat import Norm
from defenses.em import By, ErrorMinimising
from defenses.ops import find_shortcuts

CIFAR10 = (3, 32, 32), 10, 50_000  # shape, classes and number of its training images
RELEASED = "resnet18(normalise=false)"  # the network of EM's noise


@defenses("em-ops")
@dataclass(frozen=True, kw_only=True)
class ErrorMinimisingOnePixel:
    """Add :class:`~defenses.em.ErrorMinimising` noise, then write the one-pixel shortcuts over it.

    The shortcut survives adversarial training, the noise the augmentations that move or cover a pixel. The shortcuts
    are searched for in the clean images, so they are those of ``ops``. All other pixels are within ``noise_eps`` of
    their image; a shortcut's may be anywhere, so the bound of the whole is linf 1.

    ``pixels`` is that of ``ops``; the noise takes its other settings from ``em``. With ``preset=cifar10-s``, on all
    training images of CIFAR-10, ``cifar10(calibrate=false)``, this is the set of that name: one pixel, noise of 8/255
    for each sample, made on a ResNet-18 that takes pixels as they are. The authors' noise is not public, so it is
    another draw of theirs. The preset takes no other settings and no other images.

    Source:
        Wu et al., ICLR 2023, arXiv:2205.12141, the data set CIFAR-10-S.

    Raises:
        ConfigError: no pixels, what ``em`` refuses, or settings beside a preset.
    """

    pixels: int = 1
    noise_eps: float = 8 / 255
    by: By = "sample"
    rounds: Count = ErrorMinimising.rounds
    network: str | None = None
    share: float = 1.0
    preset: Literal["cifar10-s"] | None = added(None)

    stage: ClassVar[Stage] = "data"
    norm: ClassVar[Norm] = "linf"
    eps: ClassVar[float] = 1.0
    version: ClassVar[int] = 1  # rises with those of em and ops, too
    paper: ClassVar[str] = "Wu et al., ICLR 2023, arXiv:2205.12141 (CIFAR-10-S)"

    def __post_init__(self) -> None:
        if self.pixels < 1:
            raise ConfigError(f"pixels is {self.pixels}; a shortcut takes at least one")
        self._noise()
        others = (field for field in fields(self) if field.name != "preset")
        said = [field.name for field in others if getattr(self, field.name) != field.default]
        if self.preset and said:
            raise ConfigError(f"preset={self.preset} is a set as it was published; leave {', '.join(said)} out")

    def __call__(self, data: Dataset, job: Job) -> Split:
        """The training split to release, uint8; ``job.seed`` decides the noise and the share, not the shortcuts."""
        if self.preset and (data.train.shape, len(data.classes), len(data.train)) != CIFAR10:
            raise ConfigError(
                f"preset={self.preset} is made of the 50,000 training images of CIFAR-10, not of {len(data.train):,} "
                f"of {data.name}; take cifar10(calibrate=false), or no preset"
            )
        rows, labels = protected_rows(data.train, self.share, job), data.train.labels
        shortcuts = find_shortcuts(grey_levels(data.train)[rows], labels[rows], len(data.classes), self.pixels)
        noisy = self._noise()(data, job)
        return merge(noisy, rows, shortcuts.write(noisy.images[rows], labels[rows]))

    def _noise(self) -> ErrorMinimising:
        network = RELEASED if self.preset else self.network
        return ErrorMinimising(
            eps=self.noise_eps, by=self.by, rounds=self.rounds, network=network, share=self.share
        )
