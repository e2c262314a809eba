"""Red flags from probing a served model, apart from any attack: what is random, coupled, coarse or reversed.

A flag is no verdict: it says which attacks a figure needs before it can be trusted. docs/red-flags.md has the rule and
the source of each by its RF number. Gradients, which matter where attacks see them, are looked at in
:mod:`bench.measure.gradients`.

Probes meet copies of the model as it was deployed, so an audit leaves no trace in a stateful one; they use known
streams and seed every generator, so that noise is not taken for state or for coupling between rows. Audit the plain
numbers of a network: in bf16, two batch sizes differ by more than the thresholds.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from bench.errors import ServiceError
from bench.losses import margin
from bench.measure.inside import optimisation, seeded
from bench.measure.isolated import Remote, examine
from bench.norms import project, steepest
from bench.oracle.served import ServedModel
from bench.rng import SampleRng
from bench.threat import Threat

REPEATS = 5      # answers compared for randomness
DRAWS = 16       # answers where they are found to be random
FEW = 64         # images asked one by one, or with a graph
COPIES = 8, 16   # images that are asked beside copies of themselves, and how many of each
MOVES = 8        # windows on the path of an image
AVERAGED = 4     # draws over which the moves of a random model are averaged
FEWEST = 20      # images or moves, below which a share says nothing

EXACT = 1e-4     # relative difference between answers that should agree to the last bit
ROUNDED = 1e-3   # and between answers that were computed in another order
RARE = 0.01      # share of the images that rounding errors may move, namely those at a step of their scores

TRAITS = {"random-outputs": "random", "batch-coupling": "batch-dependent", "state": "stateful"}


@dataclass(frozen=True)
class Finding:
    """What one test saw on ``n`` images: a ``statistic``, which fires above ``threshold``, and a sentence about it.

    Where the two say otherwise than ``fired``, the sentence says why: too few images, noise, a change of class.
    """

    flag: str
    fired: bool
    statistic: float
    threshold: float
    n: int
    evidence: str


def audit(
    served: ServedModel,
    twin: ServedModel | None,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    seed: int,
    declared: Collection[str],
) -> list[Finding]:
    """Every flag, fired or not; without a twin, those that need none.

    Each of 256 images costs 29 forwards of the model and 16 of its twin, or 41 and 10 where answers are random; a batch
    coupling costs 3 more to confirm. Of a service, each of 32 costs 17 questions, or 28. What a probe could not see
    because it failed is a finding, too.

    Args:
        served: the defended model, in plain numbers.
        twin: the undefended network, served as it is, if there is one.
        x, y: clean images (n, C, H, W) in [0, 1] and their classes (n,).
        threat: paths of candidates stay in its ball, linf or l2.
        seed: of paths and draws.
        declared: what the defense says of itself; only ``inference-optimisation`` matters here, the rest to
            :func:`confirm`.
    """
    with torch.no_grad():
        try:
            probe = _Probe(served, twin, x, y, threat, seed)
        except ServiceError:  # is no word on the service, and the shard is to be tried again
            raise
        except (Exception, SystemExit) as error:  # a model that cannot be asked twice, perhaps
            return [_unseen({"all": error}, len(x))]
        looks: dict[str, Callable[[_Probe], Finding | list[Finding]]] = {
            "randomness": randomness, "batch coupling": batch_coupling, "state": state, "outputs": outputs,
            "input precision": input_precision, "written inputs": written_inputs, "mode": mode,
            "inference optimisation": partial(inference_optimisation, declared=declared),
            "introspection": introspection, "trend": trend, "changed predictions": changed_predictions,
            "recognition": recognition,
        }  # fmt: skip
        looks = {name: look for name, look in looks.items() if twin is not None or name in _shown_by(served)}
        findings: list[Finding] = []
        failed: dict[str, BaseException] = {}
        for name, look in looks.items():
            try:
                found = look(probe)
            except ServiceError:
                raise
            except (Exception, SystemExit) as error:  # the model's own code may raise anything at all
                failed[name] = error
            else:
                findings += [found] if isinstance(found, Finding) else found
        return [*findings, _unseen(failed, len(x))]


def _shown_by(service: ServedModel) -> frozenset[str]:
    """The tests that show something of a ``service``, of which nothing is here but what it answers."""
    shown = {"randomness", "batch coupling", "state"}
    scores = service.desk is None or service.desk.service.tells_all
    return frozenset(shown | {"outputs"} if scores else shown)


def _unseen(failed: Mapping[str, BaseException], n: int) -> Finding:
    """What could not be looked at (RF-43), and why: what it would have shown is not known."""
    reasons = "; ".join(
        f"{name} ({type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:100]})"
        for name, error in failed.items()
    )
    said = f"probes that failed: {reasons}" if failed else "every probe ran"
    return Finding("failed-probes", bool(failed), float(len(failed)), 0.0, n, said)


def confirm(findings: Collection[Finding], declared: Collection[str]) -> list[Finding]:
    """The contradictions: traits that were measured and not declared, as ``undeclared-...`` findings."""
    return [
        replace(finding, flag=f"undeclared-{trait}", evidence=f"not declared {trait}: {finding.evidence}")
        for finding in findings
        if finding.fired and (trait := TRAITS.get(finding.flag)) and trait not in declared
    ]


class _Probe:
    """A model under audit, its twin, and the answers that several tests look at."""

    def __init__(
        self, served: ServedModel, twin: ServedModel | None, x: Tensor, y: Tensor, threat: Threat, seed: int
    ) -> None:
        self.served, self.x, self.y = served, x, y
        self._twin, self.has_twin = twin, twin is not None
        self.threat = replace(threat, eps=min(threat.eps, 1.0)) if threat.norm == "linf" else threat
        self.rows = torch.arange(len(x), device=x.device)
        self.streams = SampleRng.create(seed, self.rows, "audit")
        self.n = len(x)
        live = self.fresh()
        weights = examine(live.module).weights
        with optimisation() as seen:
            self.base = self.ask(x, model=live)                                     # (n, K)
        self.optimised = len(seen) + (live.module.optimised if isinstance(live.module, Remote) else 0)
        self.finite = self.base.isfinite().all(dim=1)
        self._live_on(live, weights)
        self.draws = torch.stack([self.base, *(self.ask(x, draw=draw) for draw in range(1, REPEATS))])
        self.random = not torch.equal(self.draws.nan_to_num(), self.draws[:1].nan_to_num().expand_as(self.draws))
        # What changes though the streams do not: noise from elsewhere, which hides all differences that are smaller.
        self.noise = 0.0
        if self.random:
            more = [self.ask(x, draw=draw) for draw in range(REPEATS, DRAWS)]
            self.draws = torch.cat((self.draws, torch.stack(more)))
            self.noise = float(difference(self.base, self.ask(x, noise=1)).amax())
        self.votes = self.draws.nan_to_num().argmax(dim=2)                          # (draws, n)
        self.prediction = self.votes.mode(dim=0).values

    @property
    def twin(self) -> ServedModel:
        """The undefended network, for the tests that are asked only where there is one."""
        assert self._twin is not None
        return self._twin

    @cached_property
    def plain(self) -> Tensor:
        """Logits (n, K) of its twin."""
        return self.ask(self.x, model=self.twin)

    def fresh(self) -> ServedModel:
        """The model as it was deployed; itself, if it cannot be copied."""
        try:
            return replace(self.served, module=copy.deepcopy(self.served.module))
        except Exception:  # copying runs the module's own code, which may raise anything at all
            return self.served

    def ask(
        self,
        x: Tensor,
        rows: Tensor | None = None,
        *,
        draw: int = 0,
        noise: int | None = None,
        model: ServedModel | None = None,
    ) -> Tensor:
        """Logits (m, K) of ``x`` (m, C, H, W), images of the samples ``rows``, from a fresh copy of the model.

        Streams belong to a sample and a ``draw``; every generator starts from ``noise``, by default from ``draw``.
        """
        model = self.fresh() if model is None else model
        streams = self.streams.fork(draw)
        with seeded(model.module, draw if noise is None else noise, x.device):
            return model(x, streams if rows is None else streams[rows]).detach()

    def ask_exactly(self, rows: Tensor) -> Tensor:
        """Logits of the samples ``rows`` (m,) in float64."""
        module = copy.deepcopy(self.served.module).double()
        return self.ask(self.x[rows].double(), rows, model=replace(self.served, module=module))

    def path(self, x: Tensor, rows: Tensor) -> Iterator[Tensor]:
        """Candidates (m, C, H, W) from ``x`` on, each one window in the ball further than the one before.

        Windows are squares of a fifth of the image's side that go to an end of the ball, with one sign for each
        channel, as in the Square attack; in l2 each has the length of the radius before the candidate is projected.
        """
        channels, height, width = x.shape[1:]
        side = max(1, round(min(height, width) / 5))
        reach = self.threat.eps * (2 if self.threat.norm == "linf" else 1 / (side * math.sqrt(channels)))
        candidate = x
        for move in range(MOVES):
            rng = self.streams[rows].fork("path").fork(move)
            inside = []
            for name, length in (("row", height), ("column", width)):
                offset = torch.arange(length, device=x.device) - rng.fork(name).integers(length - side + 1)[:, None]
                inside.append((offset >= 0) & (offset < side))
            window = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]       # (m, 1, H, W)
            signs = rng.fork("signs").coins(channels)[:, :, None, None].to(x) * 2 - 1
            candidate = project(candidate + window * signs * reach, x, self.threat)
            yield candidate

    def _live_on(self, live: ServedModel, weights: tuple[str, ...]) -> None:
        """Ask the copy that ``live`` is many other things, then the same again, also in reverse order."""
        others = [other for _, other in zip(range(2), self.path(self.x, self.rows), strict=False)]
        self.others = [self.ask(other, draw=1, model=live) for other in others]
        self.others_alone = [self.ask(other, draw=1) for other in others]
        self.again = self.ask(self.x, model=live)
        self.reverse = self.rows.flip(0)
        self.reversed_again = self.ask(self.x[self.reverse], self.reverse, model=live)
        self.reversed = self.ask(self.x[self.reverse], self.reverse)
        now = examine(live.module).weights
        self.changed_weights = sum(one != other for one, other in zip(now, weights, strict=True))


def randomness(probe: _Probe) -> list[Finding]:
    """Whether the same query gets different answers (RF-01, RF-39), and whether that alone fools images (RF-31)."""
    gap = float(torch.stack([difference(probe.draws[0], other) for other in probe.draws[1:]]).amax())
    flips = float((probe.votes != probe.votes[0]).any(dim=0).float().mean())
    right = probe.prediction == probe.y
    lucky = float((probe.votes != probe.y).any(dim=0)[right].float().mean()) if right.any() else 0.0
    draws = len(probe.draws)
    noise = probe.noise
    return [
        Finding(
            "unkeyed-randomness", noise > EXACT, noise, EXACT, probe.n,
            f"under the same streams, logits move by up to {noise:.2g} of their size as other generators do (torch's, "
            "NumPy's or Python's): such noise belongs to no sample, so answers depend on the batch and on the order",
        ),
        Finding(
            "random-outputs", gap > EXACT or flips > 0, gap, EXACT, probe.n,
            f"over {draws} fresh draws the logits of an image move by up to {gap:.2g} of their size, and the class "
            f"of {flips:.1%} of the images changes",
        ),
        Finding(
            "first-hit-inflation", lucky > RARE, lucky, RARE, int(right.sum()),
            f"some of {draws} fresh draws misclassifies {lucky:.1%} of the clean images that most get right, so a "
            "first hit may be luck",
        ),
    ]  # fmt: skip


def batch_coupling(probe: _Probe) -> Finding:
    """Whether an answer depends on the rest of the batch: alone, in another order, beside copies of itself (RF-02).

    All under the same streams. What differs is asked again in float64, if the model can: a solver such as AAA's may
    make a large difference of a rounding error, which is no coupling, though it limits how exactly runs repeat.
    """
    shares = _couplings(probe, lambda rows: probe.ask(probe.x[rows], rows), probe.base, probe.reversed)
    worst = max(shares, key=lambda name: shares[name])
    evidence = f"asked {worst}, {shares[worst]:.1%} of the images get another answer than in a batch of {probe.n}"
    if shares[worst] > RARE:
        try:
            whole = probe.ask_exactly(probe.rows)
        except Exception:  # constants of another type inside, a device without float64, or no copy at all
            evidence += "; float64, which would show what is rounding, does not run"
        else:
            shares = _couplings(probe, probe.ask_exactly, whole, probe.ask_exactly(probe.reverse))
            evidence += f"; in float64, without the rounding errors, {max(shares.values()):.1%}"
    share = max(shares.values())
    return Finding("batch-coupling", share > RARE, share, RARE, min(FEW, probe.n), evidence + _noise(probe))


def state(probe: _Probe) -> Finding:
    """Whether an answer depends on the queries before (RF-03).

    The images are asked after what is like them, again after many others, and in reverse order.
    """
    first = torch.cat((probe.base, probe.reversed, *probe.others_alone))
    later = torch.cat((probe.again, probe.reversed_again, *probe.others))
    gap = float(difference(first, later).amax())
    share = float(_differs(probe, first, later, EXACT).float().mean())
    return Finding(
        "state", share > 0, gap, EXACT, probe.n,
        f"after {len(probe.others) * probe.n} other queries, answers under the same streams differ by up to "
        f"{gap:.2g} of their size, and {share:.1%} of them noticeably" + _noise(probe),
    )  # fmt: skip


def outputs(probe: _Probe) -> list[Finding]:
    """What the scores are: NaN (RF-10), probabilities, ties, few values (RF-04), or too large to tell apart (RF-40).

    A confidence that float32 rounds to 1 hides the margin from a loss on probabilities; the twin's share is subtracted.
    Without a twin, nobody can say how many values or how large scores would be otherwise.
    """
    invalid = float((~probe.draws.isfinite().all(dim=2)).any(dim=0).float().mean())
    count = int(probe.finite.sum())
    scores = probe.base[probe.finite].double() if count else probe.base.new_zeros(1, probe.base.shape[1]).double()
    in_range = (scores.amax(dim=1) < 1 + 1e-5) & (scores.amin(dim=1) > -1e-5)
    softmax = float((in_range & ((scores.sum(dim=1) - 1).abs() < 1e-5)).float().mean()) if count else 0.0
    lead = _lead(scores)
    tied = float((lead == 0).float().mean()) if count else 0.0
    return [
        Finding(
            "invalid-outputs", invalid > 0, invalid, 0.0, probe.n, f"{invalid:.1%} of the images get NaN or infinity"
        ),
        Finding(
            "softmax-outputs", softmax > 1 - RARE, softmax, 1 - RARE, count,
            f"the scores of {softmax:.1%} of the images are in [0, 1] and add up to 1",
        ),
        Finding(
            "tied-scores", tied > RARE, tied, RARE, count, f"the two best scores of {tied:.1%} of the images are equal"
        ),
        *(_beside_twin(probe, scores, count) if probe.has_twin else ()),
    ]  # fmt: skip


def _beside_twin(probe: _Probe, scores: Tensor, count: int) -> list[Finding]:
    """What the ``scores`` (m, K) of ``count`` images are beside those of the twin; see :func:`outputs`."""
    plain = probe.plain[probe.finite].double() if count else scores
    lead, plain_lead = _lead(scores), _lead(plain)
    repeated = 1 - len(lead.unique()) / len(plain_lead.unique())
    sure, plain_sure = ((one.float().softmax(dim=1).amax(dim=1) == 1).float().mean() for one in (scores, plain))
    saturated = float(sure - plain_sure)
    return [
        Finding(
            "repeated-margins", repeated > 0.05, repeated, 0.05, count,
            f"{len(lead.unique())} different margins, where the twin has {len(plain_lead.unique())}",
        ),
        Finding(
            "saturated-scores", saturated > 0.05, saturated, 0.05, count,
            f"the confidence of {float(sure):.1%} of the images rounds to 1 in float32; twin: {float(plain_sure):.1%}",
        ),
    ]  # fmt: skip


def input_precision(probe: _Probe) -> list[Finding]:
    """Whether small changes of the input are lost: 1/255 in one pixel, 1e-4 in all of them (RF-05).

    Only images count whose twin moves by more than the smallest change the model has shown anywhere, so neither dead
    units nor rounded scores pass for a rounded input.
    """
    height, width = probe.x.shape[2:]
    inside = ((probe.x - 0.5).abs() < 0.3).all(dim=1).flatten(1)  # where noise that is clipped still shows a change
    place = (probe.streams.fork("pixel").uniform(height * width) + inside).argmax(dim=1)
    pixel = torch.zeros(probe.n, 1, height * width, device=probe.x.device).scatter_(2, place[:, None, None], 1)
    inwards = torch.where(probe.x > 0.5, -1.0, 1.0).to(probe.x)
    one_level = probe.x + inwards * pixel.view(-1, 1, height, width) / 255
    little = probe.x + inwards * 1e-4
    answers = [probe.ask(changed) for changed in (one_level, little)]
    steps = torch.cat([(answer - probe.base).abs().flatten() for answer in (*answers, *probe.others)])
    steps = steps[(steps > 0) & steps.isfinite()]
    grain = float(steps.amin()) if len(steps) else 0.0
    findings = []
    for flag, limit, what, changed, answer in (
        ("coarse-inputs", 0.05, "one level (1/255) in one pixel", one_level, answers[0]),
        ("rounded-inputs", 0.9, "1e-4 in every pixel", little, answers[1]),
    ):
        moved = (probe.ask(changed, model=probe.twin) - probe.plain).abs().amax(dim=1)
        same = (answer == probe.base).all(dim=1)[(moved > 2 * grain) & probe.finite]
        share = float(same.float().mean()) if len(same) else 0.0
        enough = len(same) >= min(FEWEST, probe.n)
        evidence = f"{what} leaves the scores of {share:.1%} of {len(same)} images as they were"
        if not enough:
            evidence += "; too few to tell, as the scores are coarse themselves or the twin is"
        findings.append(Finding(flag, enough and share > limit, share, limit, len(same), evidence))
    return findings


def written_inputs(probe: _Probe) -> Finding:
    """Whether a forward writes into the images it is given (RF-41).

    Served models are lent copies, so no figure depends on it; with any other user of the model it might.
    """
    model, few = probe.fresh(), probe.rows[: COPIES[0]]
    given, streams = probe.x[few].clone(), probe.streams.fork(0)[few]
    with seeded(model.module, 0, given.device):
        model.module(given, streams) if model.random else model.module(given)
    share = float((given != probe.x[few]).flatten(1).any(dim=1).float().mean())
    return Finding(
        "written-inputs", share > 0, share, 0.0, len(few),
        f"{share:.1%} of the images that it was given were written into; it is lent copies, which keeps figures right",
    )  # fmt: skip


def mode(probe: _Probe) -> list[Finding]:
    """Whether parts are in training mode, or queries change parameters or buffers (RF-06)."""
    training = examine(probe.served.module).training
    changed = probe.changed_weights
    return [
        Finding(
            "training-mode", training > 0, float(training), 0.0, probe.n, f"{training} modules are in training mode"
        ),
        Finding(
            "changed-weights", changed > 0, float(changed), 0.0, probe.n,
            f"{changed} parameters and buffers were changed by queries",
        ),
    ]  # fmt: skip


def inference_optimisation(probe: _Probe, declared: Collection[str]) -> Finding:
    """Whether a prediction runs a backward pass or an optimiser, or the defense declares so (RF-07)."""
    said = "inference-optimisation" in declared
    count = probe.optimised
    return Finding(
        "inference-optimisation", said or count > 0, float(count), 0.0, probe.n,
        f"{count} backward passes and optimiser steps in one prediction{', and it is declared' if said else ''}; "
        "a solver with gradients written by hand or forward-mode ones is not noticed",
    )  # fmt: skip


def introspection(probe: _Probe) -> Finding:
    """Whether answers depend on how they are asked for: without a graph, with one, with one to the image (RF-08)."""
    few = probe.rows[:FEW]
    x = probe.x[few]
    without = probe.ask(x, few)
    with torch.enable_grad():
        answers = {"with gradients on": probe.ask(x, few), "for a gradient": probe.ask(x.requires_grad_(), few)}
    shares = {
        name: float(_differs(probe, without, answer, ROUNDED).float().mean()) for name, answer in answers.items()
    }
    worst = max(shares, key=lambda name: shares[name])
    return Finding(
        "introspection", shares[worst] > RARE, shares[worst], RARE, len(few),
        f"asked {worst}, {shares[worst]:.1%} of the images get another answer than under no_grad" + _noise(probe),
    )  # fmt: skip


def trend(probe: _Probe) -> Finding:
    """How often the margin moves the other way than the twin's along paths of small candidates (RF-35, RF-36).

    Counted is the larger half of the moves of the twin's margin, on images that both get right. A random model answers
    a whole path under the same streams, so that noise which does not depend on the image cancels, and moves are
    averaged over AVERAGED draws: they count as reversed only beyond two standard errors, which noise alone exceeds on
    one side with probability 7 % (Student's t with 3 degrees of freedom). Margins that jump up as the twin's rises are
    a sawtooth; adaptive attacks need its period, which is in units of the twin's margin.
    """
    rows = ((probe.prediction == probe.y) & (probe.plain.argmax(dim=1) == probe.y) & probe.finite).nonzero().squeeze(1)
    draws = AVERAGED if probe.random else 1
    rows = rows[::draws]
    x, y = probe.x[rows], probe.y[rows]
    points = [x, *probe.path(x, rows)] if len(rows) else []
    if not points:
        return Finding("trend-reversal", False, 0.0, 0.3, 0, "no image is right in the model and in its twin")
    shown = torch.stack(
        [torch.stack([margin(probe.ask(point, rows, draw=draw), y) for draw in range(draws)]) for point in points]
    )  # (points, draws, m)
    real = torch.stack([margin(probe.ask(point, rows, model=probe.twin), y) for point in points])  # (points, m)

    rise = real.diff(dim=0)
    noticed = rise.abs() > torch.maximum(rise.abs().median(), EXACT * real[0].median())
    along = shown.diff(dim=0) * rise.sign()[:, None]                                # (moves, draws, m)
    error = along.std(dim=1) / math.sqrt(draws) if draws > 1 else torch.zeros_like(rise)
    reversed_ = along.mean(dim=1) < -2 * error
    moves = int(noticed.sum())
    share = float(reversed_[noticed].float().mean()) if moves else 0.0
    fired = share > 0.3 and moves >= FEWEST
    evidence = f"{share:.1%} of {moves} moves of the twin's margin are reported the other way round"
    jumps = sawtooth(real.flatten(), shown.mean(dim=1).flatten())
    if fired and jumps:
        evidence += f"; a sawtooth, which jumps up at a margin of {', '.join(f'{jump:.2g}' for jump in jumps)}"
    if fired and len(jumps) > 1:
        evidence += f", with a period of about {float(np.median(np.diff(jumps))):.2g}"
    return Finding("trend-reversal", fired, share, 0.3, len(rows), evidence)


def changed_predictions(probe: _Probe) -> Finding:
    """Whether clean images get another class than from the twin, by a majority of draws (RF-42)."""
    rows = probe.finite
    differs = (probe.prediction != probe.plain.argmax(dim=1))[rows]
    share = float(differs.float().mean()) if len(differs) else 0.0
    return Finding(
        "changes-predictions", share > RARE, share, RARE, len(differs),
        f"{share:.1%} of the clean images get another class than from the undefended network",
    )  # fmt: skip


def recognition(probe: _Probe) -> Finding:
    """Whether the defense knows the images that it is tested on (RF-46).

    Blends, half of one test image and half of another, are images that nobody can have kept. Where a step along the
    twin's gradient turns the twin, a defense that computes with it is turned as often from a test image as from a
    blend; one that looks test images up is turned from blends alone, or answers blends as the images in them.
    """
    known, strange = probe.x, (probe.x + probe.x.roll(1, dims=0)) / 2
    answers = [_turned(probe, x) for x in (known, strange)]
    (stays, changed, n), (stays_blended, changed_blended, blends) = answers
    enough = min(n, blends) >= FEWEST // 2
    share = max(stays - stays_blended if enough else 0.0, changed_blended - changed)
    said = (
        f"of {n} test images from which a step turns the twin, the defense stays at {stays:.1%}, of {blends} blends at "
        f"{stays_blended:.1%}; {changed:.1%} of the images and {changed_blended:.1%} of the blends get another class "
        "than from the twin"
    )
    return Finding("recognised-images", probe.n >= FEWEST and share > 0.5, share, 0.5, probe.n, said)


def _turned(probe: _Probe, x: Tensor) -> tuple[float, float, int]:
    """Where the model stays as it was though a step turns its twin, where it differs from the twin on ``x``; of how
    many the first is."""
    with torch.enable_grad():
        leaf = x.clone().requires_grad_(True)
        logits = probe.twin(leaf, probe.streams)
        loss = margin(logits, logits.argmax(dim=1)).sum()
        slope = torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else torch.zeros_like(x)
    stepped = (x - probe.threat.eps * steepest(slope, probe.threat.norm)).clamp(0, 1)
    before, after = logits.detach().argmax(dim=1), probe.ask(stepped, model=probe.twin).argmax(dim=1)
    scores, stepped_scores = probe.ask(x).nan_to_num(), probe.ask(stepped).nan_to_num()
    shown, then = scores.argmax(dim=1), stepped_scores.argmax(dim=1)
    decided = (_lead(scores) > 0) & (_lead(stepped_scores) > 0)  # a tie goes to the first class, wherever one steps
    turned = (before != after) & (shown == before) & decided
    stays = float((then == shown)[turned].float().mean()) if turned.any() else 0.0
    return stays, float((shown != before).float().mean()), int(turned.sum())


def sawtooth(real: Tensor, shown: Tensor) -> list[float]:
    """Where the reported margin, as a function of the real one, jumps up by more than half of its range.

    Args:
        real, shown: (n,) margins of the twin and of the model; those that are negative in either are left out.

    Returns:
        Positions in the real margin, ascending; from medians in bins, so single points do not matter.
    """
    kept = (real > 0) & (shown > 0) & shown.isfinite()
    real, shown = real[kept].double(), shown[kept].double()
    bins = min(len(real) // 12, 96)
    if bins < 8:
        return []
    width = float(real.quantile(0.98)) / bins
    index = (real / width).long()
    filled = [bin_ for bin_ in range(bins) if int((index == bin_).sum()) >= 3]
    if len(filled) < 2:  # as margins of one value have no bin below the largest
        return []
    medians = torch.stack([shown[index == bin_].median() for bin_ in filled])
    jumps = (medians.diff() > (medians.amax() - medians.amin()) / 2).nonzero().squeeze(1).tolist()
    return [width * (filled[jump] + filled[jump + 1] + 1) / 2 for jump in jumps]


def difference(a: Tensor, b: Tensor) -> Tensor:
    """How far two answers (B, K) lie apart, relative to the spread of the first over its classes: (B,) in l2.

    A NaN or an infinity is 1 away from every number, and 0 from another.
    """
    scale = (a - a.mean(dim=1, keepdim=True)).nan_to_num(0, 0, 0).norm(dim=1).clamp(min=1e-6)
    gap: Tensor = (a - b).nan_to_num(0, 0, 0).norm(dim=1) / scale
    return gap.where((a.isfinite() == b.isfinite()).all(dim=1), 1.0)


def _couplings(probe: _Probe, ask: Callable[[Tensor], Tensor], whole: Tensor, back: Tensor) -> dict[str, float]:
    """Shares of images whose answer differs from that in the ``whole`` batch, where ``back`` is its reverse."""
    few, (images, copies) = probe.rows[:FEW], COPIES
    others = {
        "alone": (few, torch.cat([ask(row) for row in few.split(1)])),
        "in reverse order": (probe.reverse, back),
        "among copies of itself": (few[:images], torch.cat([ask(row.expand(copies))[:1] for row in few[:images]])),
    }
    return {
        name: float(_differs(probe, whole[rows], answer, ROUNDED).float().mean())
        for name, (rows, answer) in others.items()
    }


def _differs(probe: _Probe, a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    """Which answers (B,) differ by more than ``tolerance`` and than noise does, or, where there is none, in class."""
    flipped = a.nan_to_num().argmax(dim=1) != b.nan_to_num().argmax(dim=1)
    return (difference(a, b) > max(tolerance, 2 * probe.noise)) | (flipped & (probe.noise <= tolerance))


def _noise(probe: _Probe) -> str:
    if probe.noise <= EXACT:
        return ""
    return f"; noise that no stream controls, up to {probe.noise:.2g}, hides what is smaller"


def _lead(scores: Tensor) -> Tensor:
    if scores.shape[1] < 2:  # nothing to lead
        return scores.new_full((len(scores),), torch.inf)
    best, second = scores.topk(2, dim=1).values.unbind(1)
    return best - second
