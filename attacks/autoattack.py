"""AutoAttack: four attacks without parameters, each on the samples that those before it have left."""

from collections.abc import Sequence
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
    """One attack of an ensemble, and the name that stands in records."""

    name: str
    attack: Attack
    most: int = SQUARE  # queries, where the attack has no bound of its own

    @property
    def queries(self) -> int:
        """How many it is told it has."""
        return getattr(self.attack, "most_queries", self.most)


PRESETS: dict[str, tuple[Member, ...]] = {
    "standard": (
        Member("apgd-ce", APGD()), Member("apgd-t", TargetedAPGD()), Member("fab-t", TargetedFAB()),
        Member("square", Square(preset="autoattack")),
    ),
    "plus": (
        Member("apgd-ce", APGD(restarts=5)), Member("apgd-dlr", APGD(loss="dlr", restarts=5)),
        Member("fab", FAB(restarts=5)), Member("square", Square(preset="autoattack")),
        Member("apgd-t", TargetedAPGD()), Member("fab-t", TargetedFAB()),
    ),
    "rand": (Member("apgd-ce", APGD(eot=EOT)), Member("apgd-dlr", APGD(loss="dlr", eot=EOT))),
}  # fmt: skip

# Of ``standard`` in l1. The two points more of each wide start come off Square's, so that it costs what it costs in l2.
STANDARD_L1 = (
    Member("apgd-ce", APGD(restarts=5, wide_start=True)), Member("apgd-t", TargetedAPGD(targets=5, wide_start=True)),
    Member("fab-t", TargetedFAB()), Member("square", Square(preset="autoattack"), SQUARE - 20),
)  # fmt: skip


@attacks("autoattack")
@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """AutoAttack (Croce and Hein, ICML 2020): APGD, FAB and Square in turn, each on the samples that still stand.

    A sample falls once, to the first attack that beats it, and ``fell_to`` of its record names that attack. A sample
    that none beats costs 7,812 forward and 1,900 backward passes under ``standard``, for which the budget has to leave
    room: what is left over at its end is not run. For random defenses use ``rand``, which averages 20 draws. In l1,
    ``standard`` has APGD begin in larger balls, from five starts and towards five targets.

    The public code's warnings are red flags here: random, softmax and optimised outputs are found by probing the served
    model, zero and masked gradients, too, and ``square-beats-gradients`` fires where Square takes what the attacks with
    gradients have left.

    Args:
        preset: ``standard``, ``plus`` (more restarts, and both untargeted and targeted members) or ``rand``.

    Source: arXiv:2003.01690, section 5, and arXiv:2103.01208 for l1; the members' parameters as in the authors' code.
    """

    preset: Literal["standard", "plus", "rand"] = "standard"

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l1", "l2", "linf"})
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

    def members(self, norm: Norm = "linf") -> tuple[Member, ...]:
        """The attacks in the order of their turns."""
        return STANDARD_L1 if (norm, self.preset) == ("l1", "standard") else PRESETS[self.preset]

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns what APGD came to last for those that stand."""
        return cascade(self.members(threat.norm), oracle, x, y, threat, rng)


def cascade(
    members: Sequence[Member], oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng
) -> Tensor:
    """Each of ``members`` on the samples that those before it have left; returns what the last ascent came to.

    What FAB and Square return for a sample that they do not beat is weaker and does not count. A run that was killed
    goes on with the member that was at work.
    """
    done, x_adv = oracle.resume(x.clone())
    for member in members[done:]:
        rows = oracle.active()
        if len(rows) == 0:
            break
        oracle.stage(member.name)
        found = member.attack(Part(oracle, rows, member.queries), x[rows], y[rows], threat, rng[rows].fork(member.name))
        if not isinstance(member.attack, FAB | Square):
            x_adv[rows] = found
        oracle.keep(x_adv)
    return x_adv
