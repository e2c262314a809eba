"""What attacks share that make their examples on another network than the one that is attacked."""

from dataclasses import dataclass
from typing import ClassVar

from bench.oracle import Rules
from bench.registry import added
from bench.spec import parse_sum


@dataclass(frozen=True, kw_only=True)
class Sourced:
    """Works on the undefended network, as a control, or on the models that ``from`` names, as an attacker can.

    Args:
        from_: ``from=resnet20``, or several models with ``+`` between them, whose logits are averaged. Without weights
            a model is trained on the data set as an undefended one is, from the seed after the cell's. Left out, it is
            the undefended network.
    """

    from_: str = added("")

    rules: ClassVar[Rules] = Rules(surrogate=True)

    @property
    def sources(self) -> tuple[str, ...]:
        """The models that it works on; none for the undefended network."""
        return tuple(str(spec) for spec in parse_sum(self.from_))
