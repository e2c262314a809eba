"""One step along the gradient: FGSM, and R+FGSM from a random point nearby."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench.errors import ConfigError
from bench.losses import log_likelihood
from bench.norms import project, steepest
from bench.oracle import Oracle
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat


@attacks("fgsm")
@dataclass(frozen=True, kw_only=True)
class FGSM:
    """One step of length eps along the steepest direction of the cross-entropy; in l2 along its gradient.

    Costs two forward passes and one backward pass, the last forward pass to ask what became of it. It is weak: an
    iterative attack that takes less than it does has gone wrong.

    Source: Goodfellow et al., 2015, arXiv:1412.6572, section 4.
    """

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Goodfellow et al., 2015, arXiv:1412.6572"
    most_queries: ClassVar[int] = 2

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns the end of the step."""
        return _step(oracle, x, x, threat, threat.eps)


@attacks("r-fgsm")
@dataclass(frozen=True, kw_only=True)
class RandomFGSM:
    """FGSM after a random step, which takes it away from a point where the gradient is masked.

    Costs two forward passes and one backward pass. The random step goes to the signs of Gaussian noise, in l2 along
    it; of ``eps``, ``rel_start`` goes into it and the rest into the step along the gradient.

    Source: Tramer et al., 2018, arXiv:1705.07204, equation 7.
    """

    rel_start: float = 0.5

    access: ClassVar[Access] = "gradients"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Tramer et al., 2018, arXiv:1705.07204"
    most_queries: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not 0 < self.rel_start < 1:
            raise ConfigError(f"rel_start is {self.rel_start:g}; it is the share of eps before the gradient, below 1")

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns the end of the second step."""
        first = self.rel_start * threat.eps
        u = project(x + first * steepest(rng.normal(*x.shape[1:]).to(x), threat.norm), x, threat)
        return _step(oracle, u, x, threat, threat.eps - first)


def _step(oracle: Oracle, u: Tensor, x: Tensor, threat: Threat, size: float) -> Tensor:
    """From ``u`` (B, C, H, W), by ``size``; of samples that fall at ``u`` nothing more is asked."""
    _, gradient = oracle.gradients(u, log_likelihood)
    x_adv = project(u - size * steepest(gradient, threat.norm), x, threat)
    rows = oracle.active()
    if len(rows):
        oracle.scores(x_adv[rows], rows)
    return x_adv
