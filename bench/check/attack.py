"""What every attack keeps to, each norm of it by itself."""

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.check.problem import CLASSES, SAMPLES, images, network, others
from bench.check.subject import Subject
from bench.check.verdict import Broken, Remark, Rules, require
from bench.norms import lp_norm
from bench.oracle import NEVER, Referee
from bench.oracle.ledger import Ledger
from bench.oracle.served import ServedModel
from bench.oracle.surrogate import Surrogate
from bench.protocols import FittedAttack, Job
from bench.rng import SampleRng
from bench.rules import rules_of
from bench.threat import Norm, Threat

CPU = torch.device("cpu")
BUDGET = 25
RADIUS: dict[Norm, float] = {"linf": 0.02, "l2": 0.2, "l1": 2.0, "l0": 3.0}  # at which some samples of the problem fall
ALONE = 0, 4, 7, 11  # samples that are attacked alone, too
FAR = 20  # times the radius, where hardly one should stand
AMPLE = 4 * BUDGET  # queries there: some attacks begin outside the ball


def attacked(
    attack: Any, norm: Norm, x: Tensor, y: Tensor, eps: float,
    *, model: nn.Module | None = None, seed: int = 0, ids: Tensor | None = None, budget: int = BUDGET,
    known: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Ledger]:  # fmt: skip
    """The final examples of ``attack`` on the tiny problem, and what the referee has written down.

    ``known`` is what it was fitted to before.
    """
    model = network() if model is None else model
    ids = torch.arange(len(x)) if ids is None else ids
    threat, rules = Threat(norm, eps, attack.access, budget), rules_of(attack)
    known = known or fitted(attack, threat, seed)
    referee = Referee(
        ServedModel(model), x, y, threat, SampleRng.create(seed, ids, "defense"), rules=rules, classes=CLASSES,
        surrogate=ServedModel(model) if rules.surrogate else None, fitted=known, attack="it",
    )  # fmt: skip
    stream = SampleRng.create(seed, ids, "attack")
    return referee.finish(attack(referee.oracle, x, y, threat, stream)), referee.ledger


def fitted(attack: Any, threat: Threat, seed: int = 0, device: torch.device = CPU) -> Mapping[str, Tensor] | None:
    """What ``attack`` comes to on other images of the tiny problem, where it is fitted."""
    if not isinstance(attack, FittedAttack):
        return None
    return attack.fit(Surrogate([network()]).to(device).eval(), others(), threat.free, Job(seed, device))


def stays_inside(subject: Subject) -> str:
    """Queries and examples are in the ball, the box and the budget; the referee refuses the others."""
    x, y = images()
    for norm in subject.norms:
        for budget in (BUDGET, 1):
            x_adv, ledger = attacked(subject.component, norm, x.clone(), y.clone(), RADIUS[norm], budget=budget)
            require((lp_norm(x_adv - x, norm) <= RADIUS[norm] + 1e-6).all(), f"in {norm}, examples left the ball",
                    "project what is returned: bench.norms.project(x_adv, x, threat)")  # fmt: skip
            require(ledger.forwards.max() <= budget, f"{int(ledger.forwards.max())} queries of {budget}",
                    "ask the oracle alone, it counts")  # fmt: skip
            require(ledger.forwards.min() >= 1, f"in {norm}, some images were never asked about",
                    "ask oracle.scores, oracle.labels or oracle.gradients about every row")  # fmt: skip
            late = (ledger.first_hit != NEVER) & (ledger.first_hit != ledger.forwards)
            require(not late.any(), f"in {norm}, fallen images were asked about again",
                    "ask about oracle.active() alone")  # fmt: skip
    return f"at most {BUDGET} queries an image, shapes and types as given"


def finds(subject: Subject) -> str:
    """At many times the radius something falls, and what falls is the final example."""
    x, y = images()
    shares = []
    for norm in subject.norms:
        x_adv, ledger = attacked(subject.component, norm, x.clone(), y.clone(), FAR * RADIUS[norm], budget=AMPLE)
        hit = ledger.first_hit != NEVER
        far = f"{FAR * RADIUS[norm]:g}, where random corners do"
        require(hit.any(), f"in {norm}, no image of {SAMPLES} falls in {AMPLE} queries at a radius of {far}",
                "look for a sign or a step that is turned round")  # fmt: skip
        wrong = network()(x_adv).argmax(1) != y
        require(wrong[hit].all(), "an image that fell is right again at the end", "return x_adv as it was asked about")
        shares.append(f"{int(hit.sum())} of {SAMPLES} fall in {norm}")
    return ", ".join(shares)


def leaves_inputs(subject: Subject) -> str:
    """The images, the labels and the model are afterwards what they were."""
    x, y = images()
    for norm in subject.norms:
        given, labels, model = x.clone(), y.clone(), network()
        state = copy.deepcopy(model.state_dict())
        attacked(subject.component, norm, given, labels, RADIUS[norm], model=model)
        require(torch.equal(given, x), "it writes into the images x", "work on x.clone(), and no += on x itself")
        require(torch.equal(labels, y), "it writes into the labels y", "work on y.clone()")
        same = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        require(same and not model.training, "it changes the model", "ask the oracle alone")
    return "images, labels and model stay as they were"


def repeats(subject: Subject) -> str:
    """One seed, one result, whatever the global generators hold, which stay untouched."""
    x, y = images()
    for norm in subject.norms:
        torch.manual_seed(11)
        first, ledger = attacked(subject.component, norm, x.clone(), y.clone(), RADIUS[norm])
        torch.manual_seed(12)
        expected = torch.rand(2)
        torch.manual_seed(12)
        second, again = attacked(subject.component, norm, x.clone(), y.clone(), RADIUS[norm])
        drawn = not torch.equal(torch.rand(2), expected)
        fix = "draw from rng alone: rng[rows].fork(step).uniform(...), .normal(...) or .coins(...)"
        same = torch.equal(first, second) and torch.equal(ledger.first_hit, again.first_hit)
        require(same, f"in {norm}, one seed gives two results", fix)
        require(not drawn, f"in {norm}, it draws from torch's global generator", fix)
    return "one seed gives one result, from the streams that it is given"


def stays_at_nothing(subject: Subject) -> str:
    """Without a radius nothing moves and nothing falls."""
    x, y = images()
    for norm in subject.norms:
        x_adv, ledger = attacked(subject.component, norm, x.clone(), y.clone(), 0.0)
        require((lp_norm(x_adv - x, norm) <= 1e-6).all() and (ledger.first_hit == NEVER).all(),
                f"in {norm} at eps = 0, images move or fall", "let every step be a share of threat.eps")  # fmt: skip
    return "at eps = 0 nothing moves"


def sees_no_batch(subject: Subject) -> str:
    """What becomes of an image does not depend on the rest of its batch."""
    if getattr(subject.component, "batch_dependent", False):
        return Remark("declares itself batch-dependent, and is marked so in every table")
    x, y = images()
    x, model, few = x.double(), network().double(), torch.tensor(ALONE)
    for norm in subject.norms:
        known = fitted(subject.component, Threat(norm, RADIUS[norm], subject.component.access, BUDGET))
        whole = attacked(subject.component, norm, x.clone(), y.clone(), RADIUS[norm], model=model, known=known)[1]
        alone = [attacked(subject.component, norm, x[i], y[i], RADIUS[norm], model=model, ids=i, known=known)[1]
                 for i in few.split(1)]  # fmt: skip
        for what in ("first_hit", "forwards"):
            differ = torch.cat([getattr(ledger, what) for ledger in alone]) != getattr(whole, what)[few]
            if differ.any():
                raise Broken(
                    f"in {norm}, {int(differ.sum())} of {len(few)} images fare otherwise alone than in a batch",
                    "take no mean, maximum or random number over the batch, and draw from rng[rows]; "
                    "or declare batch_dependent: ClassVar = True",
                )
    return "each image fares alone as in its batch"


def costs(subject: Subject) -> str:
    """The time of a query of one image beside that of the bare network."""
    x, y = images()
    norm = subject.norms[0]
    started = time.perf_counter()
    _, ledger = attacked(subject.component, norm, x.clone(), y.clone(), RADIUS[norm])
    spent = (time.perf_counter() - started) / max(1, int(ledger.forwards.sum()))
    model = network()
    with torch.no_grad():
        started = time.perf_counter()
        for _ in range(BUDGET):
            model(x)
        bare = (time.perf_counter() - started) / (BUDGET * SAMPLES)
    return f"{1000 * spent:.2g} ms an image and query, the bare network {1000 * bare:.2g} ms"


def trial(subject: Subject) -> Tensor:
    """A result that is the same in every process."""
    x, y = images()
    return attacked(subject.component, subject.norms[0], x, y, RADIUS[subject.norms[0]])[0]


RULES: Rules[Subject] = {
    "ball, box and budget": stays_inside, "finds something": finds, "inputs untouched": leaves_inputs,
    "one seed, one result": repeats, "no radius, no change": stays_at_nothing, "no view of the batch": sees_no_batch,
}  # fmt: skip


def in_norm(subject: Subject, norm: Norm) -> Subject:
    """``subject``, tried in one norm alone."""
    return replace(subject, norms=(norm,))
