"""What every output defense keeps to, and what probing the model that it serves shows."""

import copy
import pickle
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench.check.problem import built, digits
from bench.check.subject import Subject
from bench.check.verdict import Broken, Remark, Rules, require, said
from bench.errors import BenchError
from bench.measure.audit import audit, confirm
from bench.measure.finding import Finding
from bench.measure.fitting import fit_defense
from bench.measure.gradients import gradient_findings
from bench.measure.inspection import relative_cost
from bench.oracle.served import ServedModel, Target, as_module
from bench.plan.pin import pin
from bench.protocols import FittedDefense, Job
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Threat

CPU = torch.device("cpu")
IMAGES = 40
FEW = 5
BATCH = 7  # images of a smaller batch
ROUNDED = 1e-3  # what another batch size may move a logit by
SLOW = 0.05  # seconds of an image and query: 1,000 images of 2,500 queries would take more than a day
LISTED = 4  # signs that are named

FIXES = {
    "undeclared-random": "declare random: ClassVar = True and draw from the rng that forward(x, rng) is given",
    "undeclared-batch-dependent": "let no row see another, or declare batch_dependent: ClassVar = True",
    "undeclared-stateful": "keep nothing from one query to the next, or declare stateful: ClassVar = True",
    "failed-probes": "let forward take any number of images, with gradients on or off, and copies of the module",
    "invalid-outputs": "return finite scores; clamp what is divided by or exponentiated",
    "training-mode": "end with .eval()",
    "written-inputs": "work on x.clone(), and no += on x itself",
}


def served(subject: Subject, network: nn.Module | None = None, device: torch.device = CPU) -> nn.Module:
    """The model that the defense serves around ``network``, or the tiny one; not put into eval mode."""
    fitted = learned(subject)
    own = () if fitted is None else ({name: value.to(device, copy=True) for name, value in fitted.items()},)
    calibration = digits().calibration.to(device)
    return as_module(subject.component(built().to(device) if network is None else network, calibration, 0, *own), "it")


def learned(subject: Subject) -> Mapping[str, Tensor] | None:
    """What the defense has learned on a few digits, once for a subject; ``None`` where it is not trained."""
    if not isinstance(subject.component, FittedDefense):
        return None
    if not subject.learned:
        subject.learned.update(fit(subject))
    return subject.learned


def fit(subject: Subject, seed: int = 0, reported: list[tuple[int, int]] | None = None) -> Mapping[str, Tensor]:
    """What the defense learns on a few digits, which stay as they were."""
    said: list[tuple[int, int]] = [] if reported is None else reported
    job, data = Job(seed, CPU, lambda done, total: said.append((done, total))), digits()
    data = replace(data, test=data.test.subset(slice(0)))
    before = data.fingerprint
    made = fit_defense(subject.component, built(), data, job, "it")
    require(replace(data).fingerprint == before, "it writes into the data", "work on copies: data.train.pixels()")
    return made


def learns(subject: Subject) -> str:
    """One that is trained learns the same under one seed, whatever the global generators hold, and tells of its steps.
    """
    fitted, reported = learned(subject), list[tuple[int, int]]()
    if fitted is None:
        return "learns nothing before it serves"
    torch.manual_seed(torch.initial_seed() + 1)
    before = torch.get_rng_state()
    again = fit(subject, reported=reported)
    fix = "draw from a SampleRng or a torch.Generator of job.seed, and initial weights in bench.training.seeded(job)"
    same = again.keys() == fitted.keys() and all(torch.equal(again[name], fitted[name]) for name in fitted)
    require(same, "one seed gives two fits", fix)
    require(torch.equal(torch.get_rng_state(), before), "it moves torch's global generator", fix)
    if not reported:
        return Remark("is trained, and says nothing of its steps: call job.progress(done, total)")
    require(reported[-1][0] == reported[-1][1], f"ends at step {reported[-1][0]} of {reported[-1][1]}",
            "call job.progress(total, total) at the end")  # fmt: skip
    return f"learns {len(fitted)} tensors, the same under one seed"


def answer(subject: Subject, rows: Tensor, seed: int = 0, module: nn.Module | None = None) -> Tensor:
    """What a new served model, or ``module``, answers to the test images at ``rows``."""
    module = served(subject) if module is None else module
    with torch.no_grad():
        return _ask(subject, module, digits().test.pixels(rows), rows, seed)


def _ask(subject: Subject, module: nn.Module, x: Tensor, rows: Tensor, seed: int = 0) -> Tensor:
    model = ServedModel(module, random=subject.component.random)
    return model(x, SampleRng.create(seed, rows, "defense"))


def answers(subject: Subject) -> str:
    """Finite float32 logits for every image, from a module in eval mode."""
    model = served(subject)
    require(not model.training, "the served model is in training mode", "end with .eval()")
    logits = answer(subject, torch.arange(IMAGES), module=model)
    classes = len(digits().classes)
    require(logits.shape == (IMAGES, classes), f"scores {tuple(logits.shape)} for {IMAGES} images of {classes} classes",
            "return one score for each class")  # fmt: skip
    require(logits.dtype == torch.float32, f"scores are {logits.dtype}", "return float32, as the network does")
    require(logits.isfinite().all(), "NaN or infinite scores", FIXES["invalid-outputs"])
    one = answer(subject, torch.arange(1), module=model)
    require(one.shape == (1, classes), f"scores {tuple(one.shape)} for one image", "keep the first dimension")
    return f"logits {tuple(logits.shape)}, float32, finite"


def random_as_declared(subject: Subject) -> str:
    """Random if it says so, and only by the streams that it is given."""
    rows, said = torch.arange(IMAGES), subject.component.random
    torch.manual_seed(1)
    first = answer(subject, rows)
    torch.manual_seed(2)
    again = answer(subject, rows)
    if not torch.equal(again, first):
        where = "the rng that forward(x, rng) is given" if said else "no generator, or declare random: ClassVar = True"
        raise Broken("the same question gets two answers under one seed", f"draw from {where}; order no set or dict")
    differs = not torch.equal(answer(subject, rows, seed=5), first)
    require(differs or not said, "declares random = True, and answers the same under every seed",
            "use the rng that forward(x, rng) is given, or declare random: ClassVar = False")  # fmt: skip
    return "random by its streams alone" if said else "the same answer each time"


def sees_no_batch(subject: Subject) -> str:
    """A row's answer does not depend on the rest of its batch."""
    for trait in ("batch_dependent", "stateful"):
        if getattr(subject.component, trait, False):
            return Remark(f"declares {trait} = True, and is marked so in every table")
    rows = torch.arange(IMAGES)
    whole = answer(subject, rows)
    parts = torch.cat([answer(subject, part) for part in rows.split(BATCH)])
    gap = float((parts - whole).abs().max())
    require(gap <= ROUNDED * (1 + float(whole.abs().max())), f"in batches of {BATCH}, scores differ by {gap:.2g}",
            FIXES["undeclared-batch-dependent"])  # fmt: skip
    return "rows answer alone as in a batch"


def stays_outside(subject: Subject) -> str:
    """One that declares ``outside = True`` needs nothing of the network but its answers."""
    if not getattr(subject.component, "outside", False):
        return Remark("does not declare outside = True, so no other library answers for the network (docs/run.md)")
    fix = "call the network and nothing else of it, or leave outside = True away"
    rows = torch.arange(IMAGES)
    try:
        closed = served(subject, _Closed(built()))
        same = torch.equal(answer(subject, rows, module=closed), answer(subject, rows))
    except Exception as error:
        raise Broken(f"it fails on a network that can only be called: {said(error)}", fix) from error
    require(same, "it answers otherwise on a network that can only be called", fix)
    return "only calls the network"


class _Closed(nn.Module):
    """A network with no parts and no weights to be seen."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = (network,)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self._network[0](x)
        return logits


def names_who_knows_it(subject: Subject) -> str:
    """The attacks that it says know it are there, and ask a served model."""
    knows = getattr(subject.component, "knows", ())
    if not knows:
        return Remark("does not declare knows, the attacks that know it, so it is ranked without them")
    fix = "name attacks of bench ls attacks, with arguments that they take, or files of your own"
    for name in knows:
        try:
            access = attacks.create(name).access
        except BenchError as error:
            raise Broken(f"knows names {name!r}: {error}", fix) from error
        require(access != "training-data", f"knows names {name!r}, which trains on data and asks nothing", fix)
    return f"ranked on the query track where it has met {' and '.join(knows)}"


def has_gradients(subject: Subject) -> str:
    """A gradient reaches every image, finite and not zero."""
    rows = torch.arange(FEW)
    model, x = served(subject), digits().test.pixels(rows).requires_grad_(True)
    score = _ask(subject, model, x, rows)[:, 0].sum()
    fix = "let gradients pass: changed.detach() + (logits - logits.detach()) is changed forwards, and logits backwards"
    require(score.requires_grad, "the answer has no gradient", fix)
    (gradient,) = torch.autograd.grad(score, x, allow_unused=True)
    require(gradient is not None, "no gradient reaches the images", fix)
    require(gradient.isfinite().all(), "the gradient is NaN or infinite", "clamp what is divided by or rooted")
    zero = int((gradient == 0).flatten(1).all(dim=1).sum())
    require(zero == 0, f"the gradient of {zero} of {FEW} images is zero", fix)
    return "finite and not zero"


def _findings(subject: Subject) -> list[Finding]:
    """What the audit sees; labels are what the bare network answers, so all are right."""
    x, threat = digits().test.pixels(), Threat("linf", 0.05, "gradients", 1)
    target = _target(subject)
    assert target.undefended is not None
    y = target.undefended(x, SampleRng.create(0, torch.arange(len(x)), "labels")).argmax(dim=1)
    declared = pin("it", subject.component).traits
    found = audit(target.plain, target.undefended, x, y, threat, 0, declared)
    return [*found, *confirm(found, declared), *gradient_findings(target.plain, target.undefended, x, y, threat, 0)]


def _target(subject: Subject) -> Target:
    defended, bare = ServedModel(served(subject), random=subject.component.random), ServedModel(built())
    return Target(defended, defended, bare, bare)


def stands_probes(subject: Subject) -> str:
    """Probing shows no trait that is not declared, no failure, and no trace of a question in what was asked."""
    fired = [finding for finding in _findings(subject) if finding.fired]
    for finding in fired:
        if finding.flag in FIXES:
            raise Broken(f"{finding.flag}: {finding.evidence}", FIXES[finding.flag])
    signs = sorted({finding.flag for finding in fired})
    if not signs:
        return "no red flag"
    more = f" and {len(signs) - LISTED} more" if len(signs) > LISTED else ""
    return Remark(f"red flags to expect: {', '.join(signs[:LISTED])}{more} (docs/red-flags.md); no rule is broken")


def costs(subject: Subject) -> str:
    """The time of a query beside that of the bare network."""
    x = digits().test.pixels()
    rng = SampleRng.create(0, torch.arange(len(x)), "cost")
    ratio, seconds = relative_cost(_target(subject), x, rng)
    saw = f"{1000 * seconds / len(x):.2g} ms an image, {ratio:.3g} times the bare network's"
    require(seconds / len(x) <= SLOW, saw, "work on the whole batch at once, with no loop over images")
    return saw


def works_on_gpu(subject: Subject) -> str:
    """It answers where the network and the images are."""
    if not torch.cuda.is_available():
        return Remark("no GPU here, so whether it works on one was not tried")
    rows, device = torch.arange(FEW), torch.device("cuda")
    module = served(subject, device=device)
    with torch.no_grad():
        logits = _ask(subject, module, digits().test.pixels(rows).to(device), rows.to(device))
    require(logits.is_cuda, f"answers on {logits.device}", "make tensors with device=x.device")
    return "answers on the GPU"


def is_copied(subject: Subject) -> str:
    """The served model can be copied, and pickled for another process."""
    module = served(subject)
    try:
        pickle.dumps(module)
        copy.deepcopy(module)
    except Exception as error:
        raise Broken(
            f"the served model cannot be copied or pickled: {said(error)}",
            "keep no lambda, local function, open file or lock in it; use functions and classes of the module",
        ) from error
    return "copies and pickles"


def trial(subject: Subject) -> Tensor:
    """A result that is the same in every process."""
    return answer(subject, torch.arange(IMAGES))


RULES: Rules[Subject] = {
    "learning": learns, "logits": answers, "random as declared": random_as_declared,
    "no view of the batch": sees_no_batch, "outside": stays_outside, "known": names_who_knows_it,
    "gradients": has_gradients, "copies": is_copied,
}  # fmt: skip
MORE: Rules[Subject] = {"probes": stands_probes, "time of a query": costs, "device": works_on_gpu}
