"""Red flags from probing a served model, apart from any attack: what is random, coupled, coarse or reversed.

A flag is no verdict: it says which attacks a figure needs before it can be trusted. docs/red-flags.md has the rule and
the source of each by its RF number. What needs the undefended network is in :mod:`bench.measure.beside_twin`;
gradients, which matter where attacks see them, are looked at in :mod:`bench.measure.gradients`.

Audit the plain numbers of a network: in bf16, two batch sizes differ by more than the thresholds.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.errors import ServiceError
from bench.measure.beside_twin import (
    changed_predictions,
    fewer_or_larger_scores,
    input_precision,
    recognition,
    trend,
)
from bench.measure.finding import RARE, Finding
from bench.measure.inside import seeded
from bench.measure.isolated import examine
from bench.measure.probe import EXACT, ROUNDED, Probe, difference, lead
from bench.oracle.served import ServedModel
from bench.threat import Threat

FEW = 64        # images asked one by one, or with a graph
COPIES = 8, 16  # images that are asked beside copies of themselves, and how many of each

TRAITS = {"random-outputs": "random", "batch-coupling": "batch-dependent", "state": "stateful"}


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

    Each of 256 images costs 29 forwards of the model and 16 of its twin, or 41 and 10 where answers are random, 52
    where streams do not control them; a batch coupling costs 3 more to confirm. Of a service, each of 32 costs 17
    questions, or 28 and 39. What a probe could not see because it failed is a finding, too.

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
            probe = Probe(served, twin, x, y, threat, seed)
        except ServiceError:  # is no word on the service, and the shard is to be tried again
            raise
        except (Exception, SystemExit) as error:  # a model that cannot be asked twice, perhaps
            return [_unseen({"all": error}, len(x))]
        looks: dict[str, Callable[[Probe], Finding | list[Finding]]] = {
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


def randomness(probe: Probe) -> list[Finding]:
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


def batch_coupling(probe: Probe) -> Finding:
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
    return Finding("batch-coupling", share > RARE, share, RARE, min(FEW, probe.n), evidence + probe.hidden)


def _couplings(probe: Probe, ask: Callable[[Tensor], Tensor], whole: Tensor, back: Tensor) -> dict[str, float]:
    """Shares of images whose answer differs from that in the ``whole`` batch, where ``back`` is its reverse."""
    few, (images, copies) = probe.rows[:FEW], COPIES
    others = {
        "alone": (few, torch.cat([ask(row) for row in few.split(1)])),
        "in reverse order": (probe.reverse, back),
        "among copies of itself": (few[:images], torch.cat([ask(row.expand(copies))[:1] for row in few[:images]])),
    }
    return {
        name: float(probe.differs(whole[rows], answer, ROUNDED).float().mean())
        for name, (rows, answer) in others.items()
    }


def state(probe: Probe) -> Finding:
    """Whether an answer depends on the queries before (RF-03).

    The images are asked after what is like them, again after many others, and in reverse order.
    """
    first = torch.cat((probe.base, probe.reversed, *probe.others_alone))
    later = torch.cat((probe.again, probe.reversed_again, *probe.others))
    gap = float(difference(first, later).amax())
    share = float(probe.differs(first, later, EXACT).float().mean())
    return Finding(
        "state", share > 0, gap, EXACT, probe.n,
        f"after {len(probe.others) * probe.n} other queries, answers under the same streams differ by up to "
        f"{gap:.2g} of their size, and {share:.1%} of them noticeably" + probe.hidden,
    )  # fmt: skip


def outputs(probe: Probe) -> list[Finding]:
    """What the scores are: NaN (RF-10), probabilities, ties, few values (RF-04), or too large to tell apart (RF-40).

    A confidence that float32 rounds to 1 hides the margin from a loss on probabilities; the twin's share is subtracted.
    Without a twin, nobody can say how many values or how large scores would be otherwise.
    """
    invalid = float((~probe.draws.isfinite().all(dim=2)).any(dim=0).float().mean())
    count = int(probe.finite.sum())
    scores = probe.base[probe.finite].double() if count else probe.base.new_zeros(1, probe.base.shape[1]).double()
    in_range = (scores.amax(dim=1) < 1 + 1e-5) & (scores.amin(dim=1) > -1e-5)
    softmax = float((in_range & ((scores.sum(dim=1) - 1).abs() < 1e-5)).float().mean()) if count else 0.0
    ahead = lead(scores)
    tied = float((ahead == 0).float().mean()) if count else 0.0
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
        *(fewer_or_larger_scores(probe, scores, count) if probe.has_twin else ()),
    ]  # fmt: skip


def written_inputs(probe: Probe) -> Finding:
    """Whether a forward writes into the images it is given (RF-41).

    Served models are lent copies, so no figure depends on it; with any other user of the model it might.
    """
    model, few = probe.served.fresh(), probe.rows[: COPIES[0]]
    given, streams = probe.x[few].clone(), probe.streams.fork(0)[few]
    with seeded(model.module, 0, given.device):
        model.module(given, streams) if model.random else model.module(given)
    share = float((given != probe.x[few]).flatten(1).any(dim=1).float().mean())
    return Finding(
        "written-inputs", share > 0, share, 0.0, len(few),
        f"{share:.1%} of the images that it was given were written into; it is lent copies, which keeps figures right",
    )  # fmt: skip


def mode(probe: Probe) -> list[Finding]:
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


def inference_optimisation(probe: Probe, declared: Collection[str]) -> Finding:
    """Whether a prediction runs a backward pass or an optimiser, or the defense declares so (RF-07)."""
    said = "inference-optimisation" in declared
    count = probe.optimised
    return Finding(
        "inference-optimisation", said or count > 0, float(count), 0.0, probe.n,
        f"{count} backward passes and optimiser steps in one prediction{', and it is declared' if said else ''}; "
        "a solver with gradients written by hand or forward-mode ones is not noticed",
    )  # fmt: skip


def introspection(probe: Probe) -> Finding:
    """Whether answers depend on how they are asked for: without a graph, with one, with one to the image (RF-08)."""
    few = probe.rows[:FEW]
    x = probe.x[few]
    without = probe.ask(x, few)
    with torch.enable_grad():
        answers = {"with gradients on": probe.ask(x, few), "for a gradient": probe.ask(x.requires_grad_(), few)}
    shares = {
        name: float(probe.differs(without, answer, ROUNDED).float().mean()) for name, answer in answers.items()
    }
    worst = max(shares, key=lambda name: shares[name])
    return Finding(
        "introspection", shares[worst] > RARE, shares[worst], RARE, len(few),
        f"asked {worst}, {shares[worst]:.1%} of the images get another answer than under no_grad" + probe.hidden,
    )  # fmt: skip
