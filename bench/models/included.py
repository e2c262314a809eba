"""Networks that come with Parry, weights and all; ``files/README.md`` tells how each was made."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from bench.models.resnet import ResNet20
from bench.models.small import SmallImageNetwork
from bench.models.vgg import SmallVGG
from bench.models.weights import load_weights
from bench.registry import models

FILES = Path(__file__).parent / "files"


@dataclass(frozen=True)
class _Included:
    """An ``untrained`` network with the weights of ``name`` in ``files``."""

    name: ClassVar[str]
    untrained: ClassVar[SmallImageNetwork]
    version: ClassVar[int] = 1
    paper: ClassVar[str]
    trained: ClassVar[bool] = True

    def __call__(self, classes: int, shape: tuple[int, int, int], model_dir: Path | None) -> nn.Module:
        """Build it, in eval mode; see ``Architecture``.

        Raises:
            ConfigError: images too small to pool as often as it does.
            WeightsError: ten classes and three channels do not fit the data.
        """
        network = self.untrained(classes, shape, model_dir)
        fitting = f"{self.name} with {classes} classes and {shape[0]} channels"
        load_weights(network, FILES / f"{self.name}.safetensors", None, fitting)
        return network


@models("resnet20-at")
class ResNet20AT(_Included):
    """A robust ResNet-20 for CIFAR-10, which comes with Parry: trained by N-FGSM at linf 8/255, for 15 epochs.

    It gets 64.8 % of the JPEG-coded test images right, and keeps 37.2 % of 500 after 50 steps of PGD.
    ``bench/models/files/README.md`` has its recipe, its curves and its figures.
    """

    name = "resnet20-at"
    untrained = ResNet20()
    paper = "de Jorge et al., NeurIPS 2022, arXiv:2202.01181 (its training)"


@models("small-vgg-standard")
class SmallVGGStandard(_Included):
    """A small VGG for CIFAR-10, which comes with Parry: trained in the ordinary way, by ``none``, for 30 epochs.

    It gets 83.9 % of the JPEG-coded test images right; 50 steps of PGD at linf 8/255 leave 0.0 % of 500.
    ``bench/models/files/README.md`` has its recipe, its curve and its figures.
    """

    name = "small-vgg-standard"
    untrained = SmallVGG()
    paper = "Simonyan and Zisserman, ICLR 2015, arXiv:1409.1556 (its family)"
