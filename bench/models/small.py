"""What the networks for small images share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from bench.errors import ConfigError
from bench.models.weights import load_weights
from bench.registry import added


@dataclass(frozen=True)
class SmallImageNetwork(ABC):
    """A network for images of at least ``smallest`` pixels a side.

    With ``weights`` (a file) it comes trained, without it does not. ``normalise`` is off for networks that take pixels
    as they are, as many published ones do.
    """

    weights: str | None = None
    normalise: bool = added(True)

    smallest: ClassVar[int] = 1
    version: ClassVar[int] = 1
    paper: ClassVar[str]

    @property
    def trained(self) -> bool:
        return self.weights is not None

    @abstractmethod
    def network(self, classes: int, channels: int) -> nn.Module:
        """The network with its initial weights."""

    def __call__(self, classes: int, shape: tuple[int, int, int], model_dir: Path | None) -> nn.Module:
        """Build it, in eval mode; see ``Architecture``.

        Raises:
            ConfigError: images too small to pool as often as it does.
            WeightsError: weights that are missing, unsafe, or of another architecture.
        """
        name = type(self).__name__
        if min(shape[1:]) < self.smallest:
            raise ConfigError(
                f"{name}: images are {shape[2]}x{shape[1]}; it pools them to nothing below "
                f"{self.smallest}x{self.smallest}, choose a smaller network"
            )
        network = self.network(classes, shape[0])
        if not self.normalise:
            network.normalise = nn.Identity()
        if self.weights is not None:
            load_weights(network, self.weights, model_dir, f"{name} with {classes} classes and {shape[0]} channels")
        return network.eval()
