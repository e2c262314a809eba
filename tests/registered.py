"""The registered components by kind, and as small as their parameters allow."""

from typing import Any

from bench.check.attack import BUDGET
from bench.check.problem import build, network
from bench.registry import Registry, attacks, defenses, parameters

__all__ = [
    "BUDGET", "BY_STAGE", "CERTIFIERS", "EXAMPLES", "LEARNERS", "QUERYING", "build", "network", "radius", "small",
]  # fmt: skip

FOREIGN = ["torchattacks:PGD", "torchattacks:PGDL2", "torchattacks:FGSM", "torchattacks:Square(n_queries=20)"]
# Of those that need to be told something about each network, what fits :func:`network` and :func:`build`; of those that
# train networks while they attack, what does so in no time.
EXAMPLES = {
    "rfd": 'rfd(layer="2", sigma=0.1)',
    "query-net": "query-net(networks=2, network=cnn(width=2), first_steps=5, steps=1, fewest=3)",
}
_OWN = [EXAMPLES.get(name, name) for name in attacks.names() if not name.endswith(":")]
CERTIFIERS = [name for name in _OWN if attacks.create(name).access == "certificate"]
LEARNERS = [name for name in _OWN if attacks.create(name).access == "training-data"]
QUERYING = [
    (name, norm)
    for name in [*_OWN, *FOREIGN] if name not in [*LEARNERS, *CERTIFIERS]
    for norm in sorted(attacks.create(name).norms)
]  # fmt: skip
BY_STAGE = {
    stage: [EXAMPLES.get(name, name) for name in defenses.names() if defenses.create(name).stage == stage]
    for stage in ("data", "training", "output")
}


def radius(norm: str) -> float:
    """At which a few samples of :func:`network` fall."""
    return {"linf": 0.02, "l2": 0.2, "l1": 2.0}[norm]


def small(name: str, registry: Registry[Any], **fewer: int) -> Any:
    """The component as it is, trained for one epoch where it trains, and with ``fewer`` of what else it counts."""
    known = parameters(registry.factory(name)) or {}
    few = {"epochs": 1, "subspace_epochs": 1, **fewer}
    given = ", ".join(f"{key}={value}" for key, value in few.items() if key in known)
    return registry.create(f"{name}({given})" if given else name)
