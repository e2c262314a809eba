"""What a component has learned before it is measured, as tensors that are kept; and a defense that serves with it."""

import copy
from collections.abc import Mapping
from typing import TypeVar, cast

from torch import Tensor, nn

from bench.dataset import Dataset, Split
from bench.errors import RefereeError
from bench.oracle.served import as_module
from bench.oracle.surrogate import Surrogate
from bench.protocols import AtOutput, FittedDefense, Job, OutputDefense

T = TypeVar("T")

QUERIES = "queries"  # under this name a defense says how many answers of the network it took


def as_tensors(made: object, who: str) -> Mapping[str, Tensor]:
    """What ``who`` has come to when it was fitted, on the CPU.

    Raises:
        RefereeError: no tensors by their names, or some that are not finite.
    """
    if not isinstance(made, Mapping) or not all(isinstance(value, Tensor) for value in made.values()):
        raise RefereeError(f"the fit of {who} gave a {type(made).__name__}; give tensors by name")
    broken = [name for name, value in made.items() if not value.isfinite().all()]
    if broken:
        raise RefereeError(f"the fit of {who} gave {broken[0]} with NaN or infinity in it")
    return {name: value.detach().cpu() for name, value in made.items()}


def to_fit(component: T) -> T:
    """A copy of ``component`` for its method ``fit``, so that what that leaves there is lost at once.

    A later run finds tensors alone, and is to come to the same.
    """
    return copy.deepcopy(component)


def fit_defense(defense: FittedDefense, network: nn.Module, data: Dataset, job: Job, who: str) -> Mapping[str, Tensor]:
    """What ``defense`` has learned of ``network`` and of ``data``, which holds no test images.

    Raises:
        RefereeError: no finite tensors by their names, or fewer queries than it asked.
    """
    model = Surrogate([network]).eval()
    made = as_tensors(to_fit(defense).fit(model, data, job), who)
    if QUERIES in made and float(made[QUERIES]) < model.forwards:  # a training that was resumed has asked before
        raise RefereeError(
            f"the fit of {who} says that it asked {float(made[QUERIES]):,.0f} queries, and asked {model.forwards:,}"
        )
    return made


def around(
    defense: AtOutput, network: nn.Module, calibration: Split, seed: int, fitted: Mapping[str, Tensor] | None, who: str
) -> nn.Module:
    """The model that ``defense`` serves around ``network``, in eval mode, with copies of what it has learned.

    Raises:
        RefereeError: it gives no module.
    """
    if fitted is None:
        made = cast(OutputDefense, defense)(network, calibration, seed)
    else:
        own = {name: value.to(calibration.images.device, copy=True) for name, value in fitted.items()}
        made = cast(FittedDefense, defense)(network, calibration, seed, own)
    return as_module(made, f"the output defense of {who}").eval()
