"""LTD: adversarial training on the soft labels of a teacher at a low temperature."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.ascent import ascend, uniform
from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.norms import project
from bench.protocols import Job, Stage
from bench.ranges import Count, Positive, Radius
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Threat
from bench.training import RecipeName, Trainer, frozen
from defenses.surrogate import surrogate_job


@defenses("ltd")
@dataclass(frozen=True, kw_only=True)
class LowTemperatureDistillation(Trainer):
    """PGD training towards softmax(teacher(x) / ``teacher_temperature``), the teacher seeing the clean image.

    The teacher is the same network, trained without an adversary by the same recipe. The student's logits are divided
    by ``temperature`` in training and in use, by way of its last linear layer, so its gradients are not masked. Soft
    labels can fool attacks on the cross-entropy all the same: attack margins, too.

    The paper gives neither temperatures nor schedule in what we could read; these are ours.

    Source:
        Chen and Lee, 2021, arXiv:2111.02331.
    """

    eps: Radius = 8 / 255
    steps: Count = 10
    rel_step: Positive = 0.25
    teacher_temperature: Positive = 2.0
    temperature: Positive = 1.0
    recipe: RecipeName | None = "awp"

    stage: ClassVar[Stage] = "training"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Chen and Lee, 2021, arXiv:2111.02331"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``.

        Raises:
            ConfigError: a temperature other than 1 for a network without a linear layer.
        """
        total = 2 * self.recipe_for(data).epochs
        other = surrogate_job(job)  # so that the teacher does not start where the student does
        before = replace(other, progress=lambda done, of: job.progress(done, total), watch=None)
        teacher = self.train(build, data, before)

        def losses(model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Iterator[Tensor]:
            with torch.no_grad():
                soft = (teacher(x) / self.teacher_temperature).softmax(dim=1)
            x_adv = self.attack(model, x, soft, rng)
            yield F.cross_entropy(model(x_adv) / self.temperature, soft)

        after = replace(job, progress=lambda done, of: job.progress(total - of + done, total))
        student = self.train(build, data, after, objective=losses)
        return student if self.temperature == 1 else divided(student, self.temperature)

    def attack(self, model: nn.Module, x: Tensor, soft: Tensor, rng: SampleRng) -> Tensor:
        """The images in the ball around ``x`` whose answers are far from ``soft`` (B, K)."""
        threat = Threat("linf", self.eps, "gradients")
        start = project(x + uniform(x, self.eps, rng), x, threat)

        def loss(z: Tensor) -> Tensor:
            return F.cross_entropy(model(z) / self.temperature, soft, reduction="sum")

        with frozen(model):
            return ascend(loss, start, x, threat, self.steps, self.rel_step * self.eps)


@torch.no_grad()
def divided(network: nn.Module, temperature: float) -> nn.Module:
    """``network`` with its last linear layer, and so its logits, divided by ``temperature``, in place.

    Raises:
        ConfigError: it has no linear layer.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ConfigError(f"temperature is {temperature}, and {type(network).__name__} ends in no linear layer; use 1")
    for parameter in layers[-1].parameters():
        parameter.div_(temperature)
    return network
