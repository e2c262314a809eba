"""AutoQuery: what AutoAttack is to attacks with gradients, for a service that is only asked."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attacks.decoding import Undone
from attacks.hop_skip_jump import HopSkipJump
from attacks.probing import COARSE, EDITED, PLAIN, RANDOM, REVERSED, SCALED, probe
from attacks.rays import RayS
from attacks.sweeps import Tactic, sweep
from bench.losses import dlr, unit_margin
from bench.oracle import Oracle, Part, Rules
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

RECHECK = 5   # refusals, after which an answer that may have been luck is asked for again
LARGER = 0.2  # share of the pixels in the first windows where answers are random: small ones are lost in the noise
LEAVE = 15    # refusals, after which a walk along the boundary moves a little away from it


@attacks("autoquery")
@dataclass(frozen=True, kw_only=True)
class AutoQuery:
    """A cascade without parameters: a few questions about the scores, then the search that their answers call for.

    Whoever tries one attack after another pays for each. This one has a budget for all it does, and every question
    counts in it:

    1. **Probing**, 2 to 35 questions for each sample (:func:`attacks.probing.probe`): is the clean image told the same
       twice, and does the margin run down to 0 at the decision boundary, and straight?
    2. **A search by scores** (:func:`attacks.sweeps.sweep`), by what the sample's own answers have shown: margins; a
       loss that no scale moves, under a random scale; an incumbent that is asked about again, under other
       randomness; ties taken, on coarse scores; margins undone, where they are edited interval by interval as by
       AAA and the Dashed Line Defense, with an interval that was found, not told; and a walk beside the decision
       boundary into the ball, where margins rise and fall on the way there, as under a sine: close to 0 they are true.
    3. **Labels alone** (RayS in linf, HopSkipJump in l2) with the rest, where scores say nothing, or where half of all
       questions of the search have been refused in a row: whatever is done to scores, labels stay what they are.

    What a sample is asked depends on its own answers, so neither on its batch nor on the budget: one run answers for
    every smaller budget. ``fell_to`` of a record says what beat it. Its questions may leave the ball, and only
    what is inside counts. Of services that tell labels alone ask by ``rays``.

    It was designed on ResNet-20 and 500 test images of CIFAR-10, of which 32 are among the first 200 in the order in
    which suites choose theirs; what version 4 changed, on 100 that are on no board, from the 2,001st on.

    Source: our own.
    """

    access: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    rules: ClassVar[Rules] = Rules(roams=True)
    version: ClassVar[int] = 4
    paper: ClassVar[str] = "ours"

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns what the search by scores of each sample has come to."""
        oracle.stage("probing")
        known = probe(oracle, x, y, rng.fork("probing"))
        x_adv = x.clone()
        met = set(known.kind.tolist())  # a GPU is waited for once, and not for each kind that nobody is of
        for kind, (name, tactic) in tactics(known.classes).items():
            if kind not in met:
                continue
            rows = oracle.active()
            rows = rows[known.kind[rows] == kind]
            if len(rows) == 0:
                continue
            oracle.stage(name)
            part = Part(oracle, rows)
            asked = Undone(part, y[rows], known.edit[rows]) if kind == EDITED else part
            x_adv[rows] = sweep(asked, x[rows], y[rows], threat, rng[rows].fork(name), tactic)
        rows = oracle.active()
        if len(rows):
            oracle.stage("labels")
            last = RayS() if threat.norm == "linf" else HopSkipJump()
            # What it returns is moved back into the ball, where nobody has asked about it.
            last(Part(oracle, rows), x[rows], y[rows], threat, rng[rows].fork("labels"))
        return x_adv


def tactics(classes: int) -> dict[int, tuple[str, Tactic]]:
    """How each kind of scores of so many ``classes`` is searched, and what that is called in records."""
    return {
        PLAIN: ("margins", Tactic()),
        SCALED: ("scale-free", Tactic(loss=dlr if classes > 2 else unit_margin)),
        RANDOM: ("asking-again", Tactic(recheck=RECHECK, p_init=LARGER)),
        COARSE: ("steps", Tactic(ties=True)),
        EDITED: ("decoded", Tactic(ties=True)),
        REVERSED: ("beside-the-boundary", Tactic(recheck=LEAVE, walks=True)),
    }
