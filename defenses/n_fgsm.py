"""N-FGSM: a single step from strong noise, without projection, which keeps single-step training from collapsing."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bench.ascent import input_gradients, uniform
from bench.ranges import NonNegative
from bench.registry import defenses
from bench.rng import SampleRng
from bench.training import RecipeName, frozen
from defenses.fast_at import SingleStep


@defenses("n-fgsm")
@dataclass(frozen=True, kw_only=True)
class NoiseFGSM(SingleStep):
    """Train on ``x + noise + step``, kept in the box [0, 1] and not in the linf ball.

    Args:
        noise: it is uniform within so many times ``eps``; 2 for CIFAR-10, 3 for SVHN.
        rel_step: size of the step as a share of ``eps``.

    Source:
        de Jorge et al., NeurIPS 2022, arXiv:2202.01181, algorithm 1; the noisy image is cut to the box before the step,
        as in the released code.
    """

    noise: NonNegative = 2.0
    recipe: RecipeName | None = "n-fgsm"

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "de Jorge et al., NeurIPS 2022, arXiv:2202.01181"

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Tensor:
        """The images (B, C, H, W), at most ``(noise + rel_step) * eps`` from ``x`` in linf."""
        start = (x + uniform(x, self.noise * self.eps, rng)).clamp(0, 1)
        with frozen(model, training=True):
            step = self.rel_step * self.eps * input_gradients(model, start, y).sign()
        return (start + step).clamp(0, 1)
