"""Random noise on the training images: the control for every perturbation that is optimised."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from bench.dataset import Dataset, Split, grey_levels
from bench.protection import check_share, fitting, merge, protected_rows
from bench.protocols import Job, Stage
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Norm
from defenses.levels import moved, whole_levels

CHUNK = 1024  # images at a time, to bound memory

By = Literal["sample", "class"]


@defenses("data-noise")
@dataclass(frozen=True, kw_only=True)
class DataNoise:
    """Add whole grey levels, uniform on -eps to eps, to every pixel and channel.

    ``by`` says who has noise of its own: each ``sample`` (sample-wise), or each ``class``, all of whose images get the
    same (class-wise). Pixels are cut off at black and white. ``share`` is the part of the training images to protect.

    Source:
        The random control of Huang et al., ICLR 2021, arXiv:2101.04898, section 4.1; the whole levels are ours.

    Raises:
        ConfigError: an eps below one grey level or above 1, or a share outside (0, 1].
    """

    eps: float = 8 / 255
    by: By = "sample"
    share: float = 1.0

    stage: ClassVar[Stage] = "data"
    norm: ClassVar[Norm] = "linf"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Huang et al., ICLR 2021, arXiv:2101.04898 (its control)"

    @property
    def needs_classes(self) -> bool:
        """Whether the noise goes by them."""
        return self.by == "class"

    def __post_init__(self) -> None:
        whole_levels(self.eps)
        check_share(self.share)

    def __call__(self, data: Dataset, job: Job) -> Split:
        """The training split to release, uint8; the noise is drawn from ``job.seed``."""
        rows, images = protected_rows(data.train, self.share, job), grey_levels(data.train)
        owners = rows if self.by == "sample" else data.train.labels[rows]
        streams, levels = SampleRng.create(job.seed, owners, "data noise"), whole_levels(self.eps)
        noisy = [
            moved(images[rows[chunk]], streams[chunk].integers(2 * levels + 1, *data.train.shape) - levels)
            for chunk in torch.arange(len(rows)).split(fitting(CHUNK, data.train.shape))
        ]
        return merge(data.train, rows, torch.cat(noisy))
