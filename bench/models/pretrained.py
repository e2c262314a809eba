"""A network with its weights, from which a training starts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from bench.models.weights import put_weights


@dataclass(frozen=True)
class Pretrained:
    """The ``weights`` of a trained network, which errors call ``name``.

    ``head`` has the names of those that depend on how many classes it tells apart.
    """

    name: str
    weights: Mapping[str, Tensor]
    head: frozenset[str]

    def give(self, network: nn.Module, *, head: bool) -> None:
        """Put its weights into ``network``, in place, without ``head`` all but those, which stay as they were.

        Raises:
            WeightsError: they are of another architecture.
        """
        own = network.state_dict() if not head else {}
        kept = {name: own[name] for name in self.head if name in own}
        put_weights(network, {**self.weights, **kept}, self.name, type(network).__name__)


def head_of(build: Callable[[int], nn.Module], classes: int) -> frozenset[str]:
    """The names of the weights in what ``build(classes)`` gives whose shapes depend on the number of classes."""
    one, other = ({name: value.shape for name, value in build(classes + more).state_dict().items()} for more in (0, 1))
    return frozenset(name for name, shape in one.items() if other.get(name) != shape)
