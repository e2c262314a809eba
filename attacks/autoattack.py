"""AutoAttack: four attacks without parameters, each on the samples that those before it have left."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from attacks.apgd import APGD
from attacks.apgd_t import TargetedAPGD
from attacks.fab import FAB, TargetedFAB
from attacks.square import Square
from bench.errors import ConfigError
from bench.losses import check_classes
from bench.oracle import Oracle, Part, Rules
from bench.protocols import Attack
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

EOT = 20  # draws of a random model for each point
SQUARE = 5000  # queries of a sample


class Member(NamedTuple):
    """One attack of the ensemble, the name that stands in records, and the queries that it is told it has."""

    name: str
    attack: Attack
    queries: int


PRESETS: dict[str, tuple[tuple[str, Attack], ...]] = {
    "standard": (
        ("apgd-ce", APGD()), ("apgd-t", TargetedAPGD()), ("fab-t", TargetedFAB()),
        ("square", Square(preset="autoattack")),
    ),
    "plus": (
        ("apgd-ce", APGD(restarts=5)), ("apgd-dlr", APGD(loss="dlr", restarts=5)), ("fab", FAB(restarts=5)),
        ("square", Square(preset="autoattack")), ("apgd-t", TargetedAPGD()), ("fab-t", TargetedFAB()),
    ),
    "rand": (("apgd-ce", APGD(eot=EOT)), ("apgd-dlr", APGD(loss="dlr", eot=EOT))),
}  # fmt: skip


@attacks("autoattack")
@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """AutoAttack (Croce and Hein, ICML 2020): APGD, FAB and Square in turn, each on the samples that still stand.

    A sample falls once, to the first attack that beats it, and ``fell_to`` of its record names that attack. A sample
    that none beats costs 7,812 forward and 2,700 backward passes under ``standard``, for which the budget has to leave
    room: what is left over at its end is not run. For random defenses use ``rand``, which averages 20 draws.

    The public code's warnings are red flags here: random, softmax and optimised outputs are found by probing the served
    model, zero and masked gradients, too, and ``square-beats-gradients`` fires where Square takes what the attacks with
    gradients have left.

    Args:
        preset: ``standard``, ``plus`` (more restarts, and both untargeted and targeted members) or ``rand``.

    Source: arXiv:2003.01690, section 5; the members' parameters as in the authors' code.
    """

    preset: Literal["standard", "plus", "rand"] = "standard"

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Croce and Hein, 2020, arXiv:2003.01690"

    def check(self, classes: int, shape: tuple[int, int, int]) -> None:
        """Whether the data have the classes that the members compare."""
        try:
            check_classes("dlr", classes, fewest=3 if self.preset == "rand" else 4)
        except ConfigError as error:
            said = str(error).partition(";")[0]
            raise ConfigError(f"autoattack: {said}; use apgd, fab and square by name") from error

    @property
    def rules(self) -> Rules:
        """FAB asks outside the ball; of a random defense, the queries of a call are draws of one image."""
        return Rules(averages=True) if self.preset == "rand" else Rules(lookahead=True)

    @property
    def most_queries(self) -> int:
        """Forward passes that a sample costs which never falls."""
        return sum(member.queries for member in self.members())

    def members(self) -> Iterator[Member]:
        """The attacks in the order of their turns."""
        for name, attack in PRESETS[self.preset]:
            yield Member(name, attack, getattr(attack, "most_queries", SQUARE))

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns what APGD came to last for those that stand."""
        x_adv = x.clone()
        for name, attack, queries in self.members():
            rows = oracle.active()
            if len(rows) == 0:
                break
            oracle.stage(name)
            found = attack(Part(oracle, rows, queries), x[rows], y[rows], threat, rng[rows].fork(name))
            if name.startswith("apgd"):
                x_adv[rows] = found
        return x_adv
