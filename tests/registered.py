"""The registered components by kind, and as small as their parameters allow."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bench.check.attack import BUDGET
from bench.check.problem import build, built, network
from bench.dataset import Dataset
from bench.measure.fitting import fit_defense
from bench.protocols import FittedDefense, Job
from bench.registry import Registry, attacks, defenses, parameters
from bench.spec import Spec

__all__ = [
    "BUDGET", "BY_STAGE", "CERTIFIERS", "EXAMPLES", "LEARNERS", "QUERYING", "build", "learned", "network", "radius",
    "small",
]  # fmt: skip

FOREIGN = ["torchattacks:PGD", "torchattacks:PGDL2", "torchattacks:FGSM", "torchattacks:Square(n_queries=20)"]
# Of those that have to be told something, what fits :func:`network` and :func:`build`; of those that
# train networks while they attack, what does so in no time.
EXAMPLES = {
    "avatar": "avatar(steps=2, depth=2)",
    "fine-tuning": "fine-tuning(from=cnn)",
    "lq-vae": "lq-vae(width=2, steps=2)",
    "pni": "pni(epochs=1, steps=1)",
    "zo-denoiser": "zo-denoiser(warm_up=2, steps=2)",
    "rfd": 'rfd(layer="2", sigma=0.1)',
    "query-net": "query-net(networks=2, network=cnn(width=2), first_steps=5, steps=1, fewest=3)",
    **{name: f"{name}(sigma=0.25)" for name in ("smooth", "gaussian-training", "some")},
}
_OWN = [EXAMPLES.get(name, name) for name in attacks.names() if not name.endswith(":")]
CERTIFIERS = [name for name in _OWN if attacks.create(name).access == "certificate"]
LEARNERS = [name for name in _OWN if attacks.create(name).access == "training-data"]
QUERYING = [
    (name, norm)
    for name in [*_OWN, *FOREIGN] if name not in [*LEARNERS, *CERTIFIERS]
    for norm in sorted(attacks.create(name).norms)
]  # fmt: skip
_DEFENSES = [EXAMPLES.get(name, name) for name in defenses.names()]
BY_STAGE = {
    stage: [name for name in _DEFENSES if defenses.create(name).stage == stage]
    for stage in ("data", "training", "output")
}


def learned(defense: Any, data: Dataset) -> Mapping[str, Tensor] | None:
    """What an output ``defense`` has learned on ``data``, where it is trained, around :func:`build`."""
    trains = isinstance(defense, FittedDefense)
    return fit_defense(defense, built(), data.lent(), Job(), "it") if trains else None


def radius(norm: str) -> float:
    """At which a few samples of :func:`network` fall."""
    return {"linf": 0.02, "l2": 0.2, "l1": 2.0}[norm]


def small(name: str, registry: Registry[Any], **fewer: int) -> Any:
    """The component as it is, trained for one epoch where it trains, and with ``fewer`` of what else it counts."""
    spec = Spec.parse(name)
    known = parameters(registry.factory(spec.name)) or {}
    few = {"epochs": 1, "subspace_epochs": 1, **fewer}
    return registry.create(Spec(spec.name, {**spec.args, **{key: few[key] for key in few if key in known}}))
