"""Red flags of a served model beside its twin, the undefended network: what it hides, reverses, changes or knows."""

import math

import numpy as np
import torch
from torch import Tensor

from bench.losses import margin
from bench.measure.finding import FEWEST, RARE, Finding
from bench.measure.probe import EXACT, Probe, lead
from bench.norms import steepest

AVERAGED = 4  # draws over which the moves of a random model are averaged


def fewer_or_larger_scores(probe: Probe, scores: Tensor, count: int) -> list[Finding]:
    """What the ``scores`` (m, K) of ``count`` images are beside those of the twin.

    See :func:`bench.measure.audit.outputs`.
    """
    plain = probe.plain[probe.finite].double() if count else scores
    margins, plain_margins = lead(scores).unique(), lead(plain).unique()
    repeated = 1 - len(margins) / len(plain_margins)
    sure, plain_sure = ((one.float().softmax(dim=1).amax(dim=1) == 1).float().mean() for one in (scores, plain))
    saturated = float(sure - plain_sure)
    return [
        Finding(
            "repeated-margins", repeated > 0.05, repeated, 0.05, count,
            f"{len(margins)} different margins, where the twin has {len(plain_margins)}",
        ),
        Finding(
            "saturated-scores", saturated > 0.05, saturated, 0.05, count,
            f"the confidence of {float(sure):.1%} of the images rounds to 1 in float32; twin: {float(plain_sure):.1%}",
        ),
    ]  # fmt: skip


def input_precision(probe: Probe) -> list[Finding]:
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


def trend(probe: Probe) -> Finding:
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


def changed_predictions(probe: Probe) -> Finding:
    """Whether clean images get another class than from the twin, by a majority of draws (RF-42)."""
    rows = probe.finite
    differs = (probe.prediction != probe.plain.argmax(dim=1))[rows]
    share = float(differs.float().mean()) if len(differs) else 0.0
    return Finding(
        "changes-predictions", share > RARE, share, RARE, len(differs),
        f"{share:.1%} of the clean images get another class than from the undefended network",
    )  # fmt: skip


def recognition(probe: Probe) -> Finding:
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


def _turned(probe: Probe, x: Tensor) -> tuple[float, float, int]:
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
    decided = (lead(scores) > 0) & (lead(stepped_scores) > 0)  # a tie goes to the first class, wherever one steps
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
