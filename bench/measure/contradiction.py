"""The attack on a certificate: whether something closer than it allows is answered otherwise all the same."""

import torch
from torch import Tensor

from bench.norms import TINY, lp_norm, per_sample, steepest
from bench.protocols import Certificates, Certifier, Network
from bench.rng import SampleRng

WITHIN = 0.99   # of the certified radius
STEPS = 20
REL_STEP = 0.2  # of the radius that is attacked
DRAWS = 16      # of each gradient
LOOK = 100      # draws of a first look at where the attack has come to
PASSES = STEPS * DRAWS * 3 + LOOK  # what an image costs, in forward passes, of which a backward one is two
LEVEL = 1e-6    # of the test that counts: below any certificate's own


def contradicted(
    certifier: Certifier, network: Network, x: Tensor, found: Certificates, rng: SampleRng, batch: int
) -> Tensor:
    """Which certificates an attack contradicts (B,): a true one is never among them, but for its own chance to fail.

    Gradient ascent away from the certified class, over the mean of fresh draws (EOT), in the ball of 0.99 times the
    radius. It may leave the box, as the proof does. Where most of a few draws are then of another class, it is asked
    again with as many as the certificate had.

    Source:
        Athalye et al., 2018, arXiv:1707.07397 (EOT); Salman et al., 2019, arXiv:1906.04584 (through smoothing).
    """
    result = torch.zeros_like(found.abstained)
    proven = (~found.abstained & (found.radius > 0)).nonzero().squeeze(1)
    for rows in proven.split(max(batch // DRAWS, 1)) if len(proven) else ():
        radius = WITHIN * found.radius[rows].to(x)
        moved = _moved(certifier, network, x[rows], found.predicted[rows], radius, rng[rows])
        for draws, alpha in ((LOOK, 1.0), (certifier.draws, LEVEL)):
            answer = certifier.predict(network, moved, rng[rows].fork(f"look {draws}"), batch, draws, alpha)
            other = (answer >= 0) & (answer != found.predicted[rows])
            rows, moved = rows[other], moved[other]
            if not len(rows):
                break
        result[rows] = True
    return result


def _moved(
    certifier: Certifier, network: Network, x: Tensor, certified: Tensor, radius: Tensor, rng: SampleRng
) -> Tensor:
    """Where the ascent comes to, within ``radius`` (B,) of ``x`` (B, C, H, W)."""
    delta = torch.zeros_like(x)
    for step in range(STEPS):
        delta.requires_grad_(True)
        soft = certifier.soften(network, x + delta, rng.fork(step), DRAWS)
        away = -(soft.gather(1, certified[:, None]) + TINY).log().sum()
        (gradient,) = torch.autograd.grad(away, delta)
        delta = delta.detach() + per_sample(REL_STEP * radius) * steepest(gradient, certifier.norm)
        delta = delta * per_sample((radius / (lp_norm(delta, certifier.norm) + TINY)).clamp(max=1))
    return x + delta
