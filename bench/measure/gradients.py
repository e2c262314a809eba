"""Red flags of gradients: whether a served model has any, and whether they are those of what it answers.

They matter where attacks see gradients. Such an attack gets them through the whole served model, and what they are is
said here, fired or not: of the function that answers, of the undefended network around the defense, or of neither.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from bench.losses import margin
from bench.measure.finding import RARE, Finding
from bench.norms import DUAL, project, steepest
from bench.oracle.served import ServedModel
from bench.rng import SampleRng
from bench.threat import Threat

LOOKED_AT = 64     # images that are right when clean
REACHES = 0.2, 0.02, 0.002  # of eps, at which the fall of the margin is held against what the gradient says
AGREES = 0.5, 2.0  # what falls over what the gradient says, at one of these at least
JUMPS = 5.0        # times what the gradient says, at the first of these: more than a gradient that grows explains
MASKED = 0.05      # share of images, beyond which gradients are not believed
SAME = 0.999       # cosine of two gradients that are one


def gradient_findings(
    served: ServedModel, twin: ServedModel, x: Tensor, y: Tensor, threat: Threat, seed: int
) -> list[Finding]:
    """``zero-gradients`` and ``masked-gradients``, fired or not; a probe that fails is ``failed-probes``.

    Args:
        served, twin: the defended model and the undefended network, in plain numbers.
        x, y: clean images (n, C, H, W) and their classes (n,).
        threat: linf, l2 or l1; gradients are followed along its steepest direction.
        seed: of the draws of a random model, which are the same at every point.
    """
    rng = SampleRng.create(seed, torch.arange(len(x), device=x.device), "gradients")
    try:
        with torch.no_grad():
            right = (served.fresh()(x, rng).argmax(dim=1) == y).nonzero().squeeze(1)[:LOOKED_AT]
        x, y, rng = x[right], y[right], rng[right]
        value, gradient = _slope(served.fresh(), x, y, rng)
        around = _slope(twin, x, y, rng)[1]
        return [_zero(gradient), _masked(served, x, y, threat, rng, value, gradient, around)]
    except (Exception, SystemExit) as error:  # the model's own code may raise anything at all
        said = f"probes that failed: gradients ({type(error).__name__}: {str(error).strip()[:100]})"
        return [Finding("failed-probes", True, 1.0, 0.0, len(x), said)]


def _zero(gradient: Tensor) -> Finding:
    """Whether there is no gradient to follow (RF-09)."""
    none = (gradient == 0).flatten(1).all(dim=1)
    share = float(none.float().mean()) if len(none) else 0.0
    return Finding(
        "zero-gradients", share > RARE, share, RARE, len(none),
        f"the gradient of the margin is exactly zero, or none is given, on {share:.1%} of the images",
    )  # fmt: skip


def _masked(
    served: ServedModel, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng, value: Tensor, gradient: Tensor,
    around: Tensor,
) -> Finding:  # fmt: skip
    """Whether the margin falls along its gradient by what the gradient says (RF-11), and whose gradient it is."""
    norm = threat.norm if threat.norm != "l1" else "l2"
    slope = torch.linalg.vector_norm(gradient.flatten(1), DUAL[norm], dim=1)
    told = slope > 0
    agrees, jumps, seen = torch.zeros_like(told), torch.zeros_like(told), torch.zeros_like(told)
    for reach in REACHES:
        step = min(threat.eps, 1.0) * reach
        there = project(x - step * steepest(gradient, norm), x, replace(threat, norm=norm, eps=step))
        expected = -(gradient * (there - x)).flatten(1).sum(dim=1)
        with torch.no_grad():
            fall = value - margin(served.fresh()(there, rng), y)
        clear = torch.maximum(expected, fall.abs()) > 1e-5 * value.abs()  # float32 tells no less
        ratio = fall / expected.clamp(min=1e-30)
        seen |= clear & told
        agrees |= clear & (ratio >= AGREES[0]) & (ratio <= AGREES[1])
        if reach == REACHES[0]:
            jumps = clear & told & (ratio.abs() > JUMPS)
    agrees = (agrees & ~jumps) | ~seen
    share = float((~agrees).float().mean()) if len(agrees) else 0.0
    cosine = cosine_similarity(gradient.flatten(1), around.flatten(1), dim=1)[told]
    same = len(cosine) > 0 and bool((cosine > SAME).float().mean() > 1 - MASKED)
    if share <= MASKED:
        whose = "attacks get the gradient of what answers"
        whose += ", which points as the undefended network's does" if same else ", through the defense"
    else:
        neither = "attacks get a gradient that is neither of what answers nor of the undefended network"
        whose = "attacks get the undefended network's gradient, around the defense" if same else neither
    return Finding(
        "masked-gradients", share > MASKED, share, MASKED, len(agrees),
        f"on {share:.1%} of the images the margin does not fall along its gradient as that says, or it jumps; {whose}",
    )  # fmt: skip


def _slope(model: ServedModel, x: Tensor, y: Tensor, rng: SampleRng) -> tuple[Tensor, Tensor]:
    """The margin (n,) and its gradient (n, C, H, W), zero where the model gives none."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        value = margin(model(x, rng), y)
        if not value.requires_grad:
            return value.detach(), torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient.detach().nan_to_num()
