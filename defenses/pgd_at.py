"""PGD adversarial training, the reference among training defenses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from bench.ascent import ascend, total_cross_entropy, uniform
from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.norms import project
from bench.protocols import Job, Stage
from bench.ranges import Count, Positive, Radius
from bench.registry import added, defenses
from bench.rng import SampleRng
from bench.threat import Threat
from bench.training import Trainer, frozen


@defenses("pgd-at")
@dataclass(frozen=True, kw_only=True)
class PGDAdversarialTraining(Trainer):
    """Train on the worst images that projected gradient ascent finds in the linf ball.

    The inner attack sees the network in eval mode, the step that follows is taken in training mode. An epoch costs
    ``steps + 1`` forward and backward passes per image.

    Args:
        rel_step: size of a step as a share of ``eps``.
        start: ``uniform`` starts anywhere in the ball with equal probability; ``gaussian`` from normal noise with a
            deviation of one step, as APBench does.

    Source:
        Madry et al., 2018, arXiv:1706.06083, equation 2.1 and section 2.1.
    """

    eps: Radius = 8 / 255
    steps: Count = 10
    rel_step: Positive = 0.25
    start: Literal["uniform", "gaussian"] = added("uniform")

    stage: ClassVar[Stage] = "training"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Madry et al., ICLR 2018, arXiv:1706.06083"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; the inner attack takes at least one")

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        return self.train(build, data, job, perturb=self.perturb, pure=True)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Tensor:
        """The images (B, C, H, W) of high cross-entropy in the ball around ``x``; ``model`` is left as it was."""
        threat = Threat("linf", self.eps, "gradients")
        if self.start == "uniform":
            noise = uniform(x, self.eps, rng)
        else:
            noise = rng.normal(*x.shape[1:]) * self.rel_step * self.eps
        with frozen(model):
            start = project(x + noise, x, threat)
            return ascend(total_cross_entropy(model, y), start, x, threat, self.steps, self.rel_step * self.eps)
