"""Handwritten digits that come with scikit-learn: real images without a download."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from bench.dataset import Dataset, Split
from bench.registry import added, datasets

TRAIN, CALIBRATION = 1000, 297  # of 1,797; the other 500 are the test split


@datasets("digits")
@dataclass(frozen=True)
class Digits:
    """1,797 grey digits of 8x8 pixels, shuffled once: 1,000 to train, 297 to calibrate, 500 to test.

    The 17 grey levels of the source are spread over 0 to 255. Mirroring or moving a digit of this size changes its
    meaning, so no augmentation is allowed.

    Args:
        classes: of which digits, such as ``3+8``; all by default. The splits keep their samples of these.
    """

    classes: str = added("")

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Alpaydin and Kaynak, 1998, UCI Optical Recognition of Handwritten Digits"

    def __call__(self, data_dir: Path | None) -> Dataset:
        """Load it; ``data_dir`` is not needed."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        levels = np.round(bunch.images / 16 * 255).astype(np.uint8)
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(levels))
        everything = Split(
            torch.from_numpy(levels[order, None]),  # (N, 1, 8, 8)
            torch.from_numpy(bunch.target[order].astype(np.int64)),
        )
        data = Dataset(
            name="digits",
            classes=tuple(str(digit) for digit in range(10)),
            train=everything.subset(slice(TRAIN)),
            calibration=everything.subset(slice(TRAIN, TRAIN + CALIBRATION)),
            test=everything.subset(slice(TRAIN + CALIBRATION, None)),
        )
        return data.restricted(self.classes.split("+")) if self.classes else data
