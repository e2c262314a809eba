"""One shard of a cell, measured: an attack against a served model, or a learner against a released data set."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from hashlib import blake2b
from statistics import median
from typing import Any, NamedTuple, cast

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from bench.dataset import Dataset, Split
from bench.errors import RefereeError
from bench.losses import margin
from bench.measure.audit import audit, confirm
from bench.measure.perturbation import perturbation
from bench.models.lent import own
from bench.norms import lp_norm
from bench.oracle import Referee
from bench.oracle.rules import rules_of
from bench.oracle.served import ServedModel, Target, as_module
from bench.plan.tasks import Task
from bench.protocols import Attack, Job
from bench.rng import SampleRng

INSPECTED = 256  # images that a served model is probed with
ROUNDS = 6  # of timing, the first to warm up
VOTES = 16  # fresh evaluations of a random model; the majority is its prediction


class Measured(NamedTuple):
    """One record for each sample, and what was measured once: figures, what probing the served model has shown, and the
    numbers that the attack searched in."""

    records: pd.DataFrame
    figures: Mapping[str, float] = {}
    findings: Sequence[Mapping[str, Any]] = ()
    numerics: Mapping[str, Any] = {}


def attack_served(
    task: Task,
    target: Target,
    ids: list[int],
    device: torch.device,
    on_spent: Callable[[int], None] = lambda queries: None,
) -> pd.DataFrame:
    """Attack the samples ``ids`` and measure what came of it.

    The attack meets the searched numbers through the oracle; clean images and final examples are judged in plain ones,
    and what the defense changes is measured against the undefended network, which attacks with a surrogate are given.
    Samples that are misclassified when clean fell at query 0 and are not attacked.

    Returns:
        One record for each sample, columns as in :func:`_records`.

    Raises:
        RefereeError: the attack broke a rule.
    """
    attack = cast(Attack, task.attack)
    cell = task.cell
    rows = torch.tensor(ids)
    labels = task.data.test.labels
    x, y = task.data.test.pixels(rows).to(device), labels[rows].to(device)
    keys = rows.to(device)
    noise = SampleRng.create(cell.seed, keys, "defense")

    clean = _judge(target.plain, x, y, noise.fork("clean"))
    undefended = _judge(target.undefended, x, y, noise)
    todo = clean.correct.nonzero().squeeze(1)
    saved = (cell.threat.query_budget or 0) * (len(ids) - len(todo))
    rules, surrogate = rules_of(attack), None
    if rules.surrogate:
        surrogate = replace(target.undefended, module=own(target.undefended.module, task.build))
    referee = Referee(
        target.searched, x[todo], y[todo], cell.threat, noise[todo], quantise=cell.quantise, rules=rules,
        classes=len(task.data.classes), surrogate=surrogate, attack=cell.attack.spec,
        on_spent=lambda spent: on_spent(saved + spent),
    )  # fmt: skip
    before = x[todo].clone()
    stream = SampleRng.create(cell.seed, keys[todo], f"attack {cell.attack.name}")
    x_adv = attack(referee.oracle, before, y[todo], cell.threat, stream) if len(todo) else before
    final = x.clone()
    final[todo] = referee.finish(x_adv)
    if not (torch.equal(x, task.data.test.pixels(rows).to(device)) and torch.equal(y, labels[rows].to(device))):
        raise RefereeError(f"{cell} has changed the clean images or the labels that it is measured by")
    after = _judge(target.plain, final, y, noise.fork("final"))

    ledger = referee.ledger
    nearest = ledger.best_distance.where(ledger.best_distance.isfinite(), torch.nan)
    distance = torch.zeros_like(clean.margin).index_copy(0, todo, nearest)
    table = {
        "first_hit": torch.zeros_like(y).index_copy(0, todo, ledger.first_hit),
        "forwards": torch.zeros_like(y).index_copy(0, todo, ledger.forwards),
        "backwards": torch.zeros_like(y).index_copy(0, todo, ledger.backwards),
        "best_margin": clean.margin.index_copy(0, todo, torch.minimum(ledger.best_margin, clean.margin[todo])),
        "invalid": torch.zeros_like(clean.correct).index_copy(0, todo, ledger.invalid),
        **clean.columns("clean"),
        **after.columns("final"),
        "twin_pred": undefended.prediction,
        "logit_change": (clean.logits - undefended.logits).norm(dim=1),
        "probability_change": (clean.probabilities - undefended.probabilities).abs().sum(dim=1) / 2,
        "norm_linf": lp_norm(final - x, "linf"),
        "norm_l2": lp_norm(final - x, "l2"),
        "rmse": lp_norm(final - x, "l2") / math.sqrt(x[0].numel()),
        "ball_violation": (lp_norm(final - x, cell.threat.norm) - cell.threat.eps).clamp(min=0),
        "box_violation": (final - final.clamp(0, 1)).abs().flatten(1).amax(dim=1),
        "best_distance": distance if rules.minimal else torch.full_like(distance, torch.nan),
        "restarts_used": torch.full_like(y, getattr(attack, "restarts", 1)),
    }
    return _records(task.data.test, rows, table, task)


class Inspector:
    """Measures what belongs to a served model whatever attacks it: the ``cost`` of a query, and what probing it shows.

    It looks at each model under each threat once, however many attacks meet it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: dict[Any, tuple[dict[str, float], list[dict[str, Any]]]] = {}

    def __call__(self, task: Task, target: Target) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Figures, and findings of :mod:`bench.measure.audit` as plain values."""
        cell = task.cell
        parts = tuple((part.spec, part.version) for part in (cell.model, *cell.defense))
        model = cell.data_hash, parts, cell.weights_hash, cell.numerics, cell.seed
        key = *model, cell.threat.norm, cell.threat.eps, cell.ids[:INSPECTED]
        if key not in self._seen:
            self._seen[key] = self._inspect(task, target)
        return self._seen[key]

    def _inspect(self, task: Task, target: Target) -> tuple[dict[str, float], list[dict[str, Any]]]:
        cell, rows = task.cell, torch.tensor(task.cell.ids[:INSPECTED])
        x, y = task.data.test.pixels(rows).to(self._device), task.data.test.labels[rows].to(self._device)
        declared = {trait for component in cell.defense for trait in component.traits}
        findings = audit(target.plain, target.undefended, x, y, cell.threat, cell.seed, declared)
        findings += confirm(findings, declared)
        figures = {}
        with suppress(Exception):  # the model's own code fails; the audit says of what
            figures["cost"] = _cost(target, x, SampleRng.create(cell.seed, rows.to(self._device), "cost"))
        return figures, [asdict(finding) for finding in findings]


@torch.no_grad()
def _cost(target: Target, x: Tensor, rng: SampleRng) -> float:
    """The time of a query over that of the same query without the defense, medians of a few forwards of ``x``."""

    def seconds(model: ServedModel) -> float:
        started = time.perf_counter()
        model(x, rng)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - started

    rounds = [(seconds(target.searched), seconds(target.undefended_searched)) for _ in range(ROUNDS)]
    warm = rounds[1:]
    return median(defended for defended, _ in warm) / median(undefended for _, undefended in warm)


def learn_released(
    task: Task, released: Dataset, ids: list[int], job: Job, build: Callable[[], nn.Module]
) -> Measured:
    """Train the learner of ``task`` on ``released`` and test it on clean images.

    Returns:
        One record for each test sample of ``ids``, and figures of the whole: train accuracy on the released images,
        test accuracy after the last epoch and after the best one (``peak_epoch``, counted from 1), and how far the
        released images are from the originals. The peak is chosen on the test images, so it favours the learner.
    """
    rows = torch.tensor(ids)
    test = task.data.test
    x, y = test.pixels(rows).to(job.device), test.labels[rows].to(job.device)
    unused = SampleRng.create(job.seed, rows, "learner")  # what a learner returns is deterministic
    piece = f"history-{ids[0]}-{len(ids)}"
    history: list[float] = job.scratch.load(piece) or []

    def watch(network: nn.Module, epoch: int) -> None:
        history[epoch:] = [_judge(ServedModel(network), x, y, unused).accuracy]
        job.scratch.save(piece, history)

    network: object = task.attack(build, released.lent(), replace(job, watch=watch))  # type: ignore[call-arg, arg-type]
    model = ServedModel(as_module(network, task.cell.attack.label))
    judged = _judge(model, x, y, unused)
    train = released.train
    fitted = _judge(model, train.pixels().to(job.device), train.labels.to(job.device), unused)
    broken = ~judged.logits.isfinite().all(dim=1)
    table = {"final_pred": judged.prediction, "final_margin": judged.margin, "invalid": broken}
    figures = {"train_accuracy": fitted.accuracy, "last_test_accuracy": judged.accuracy}
    if history:  # a learner of a user's own may have none
        peak = max(history)
        figures |= {"peak_test_accuracy": peak, "peak_epoch": float(history.index(peak) + 1)}
    return Measured(_records(test, rows, table, task), {**figures, **perturbation(task.data.train, train)})


class _Judgement:
    """What a model says of images: its majority class, whether that is right, its margin, and the share of votes.

    ``logits`` and ``probabilities`` (B, K) are means over the votes; ``confidence`` is that in the majority class.
    """

    def __init__(self, logits: Tensor, y: Tensor) -> None:  # logits (votes, B, K)
        logits = logits.float()
        votes = logits.nan_to_num().argmax(dim=2)
        counts = one_hot(votes, logits.shape[2]).sum(dim=0)  # (B, K)
        self.prediction = counts.argmax(dim=1)
        self.correct = self.prediction == y
        self.share = (votes == y).float().mean(dim=0)
        self.margin = torch.stack([margin(one, y) for one in logits]).mean(dim=0)
        self.logits = logits.mean(dim=0)
        self.probabilities = logits.softmax(dim=2).mean(dim=0)
        self.confidence = self.probabilities.gather(1, self.prediction[:, None]).squeeze(1)
        self.nll = -_log_mean_exp(logits.log_softmax(dim=2).gather(2, y.expand(len(logits), -1)[..., None]))[:, 0]
        self.brier = (self.probabilities - one_hot(y, logits.shape[2])).square().sum(dim=1)

    @property
    def accuracy(self) -> float:
        """The share of images it gets right."""
        return float(self.correct.float().mean())

    def columns(self, when: str) -> dict[str, Tensor]:
        """What is recorded of each sample (B,), its names starting with ``when``."""
        kept = {
            "pred": self.prediction, "margin": self.margin, "share": self.share,
            "confidence": self.confidence, "nll": self.nll, "brier": self.brier,
        }  # fmt: skip
        return {f"{when}_{name}": values for name, values in kept.items()}


def _log_mean_exp(values: Tensor) -> Tensor:
    """The logarithm of the mean over the first dimension of what ``values`` are the logarithms of."""
    return values.logsumexp(dim=0) - math.log(len(values))


@torch.no_grad()
def _judge(model: ServedModel, x: Tensor, y: Tensor, rng: SampleRng) -> _Judgement:
    votes = VOTES if model.random else 1
    return _Judgement(torch.stack([model(x, rng.fork(vote)) for vote in range(votes)]), y)


def _records(test: Split, rows: Tensor, table: dict[str, Tensor], task: Task) -> pd.DataFrame:
    """One line for each sample: what identifies it, then the columns of ``table`` (B,).

    ``first_hit`` is the query that beat the sample: 0 if it was misclassified when clean, NEVER (-1) if none did.
    ``*_confidence`` is the mean probability of the predicted class, ``*_nll`` minus the logarithm of that of the true
    class, ``*_brier`` the squared distance from the truth; ``twin_pred`` is the undefended prediction on the clean
    image, ``logit_change`` (l2) and ``probability_change`` (total variation) are what the defense does to its scores.
    ``best_distance`` is that of the nearest misclassified query of a minimum-norm attack, in the norm of the threat: 0
    if the clean image was misclassified, NaN if no query was, and for other attacks.
    """
    cell = task.cell
    identity = {
        "sample_id": rows.numpy(),
        "input_hash": [blake2b(test.images[row].numpy().tobytes(), digest_size=8).hexdigest() for row in rows],
        "y": test.labels[rows].numpy(),
    }
    measured: dict[str, Any] = {name: column.cpu().numpy() for name, column in table.items()}
    return pd.DataFrame({**identity, **measured, "seed": cell.seed, "attack_version": str(cell.attack.version)})
