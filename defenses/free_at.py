"""Free adversarial training: every backward pass moves the weights and the images at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.dataset import Dataset
from bench.protocols import Job, Stage
from bench.ranges import Count, Radius
from bench.registry import defenses
from bench.rng import SampleRng
from bench.training import RecipeName, Trainer


@defenses("free-at")
@dataclass(frozen=True, kw_only=True)
class FreeAdversarialTraining(Trainer):
    """Train ``replays`` times on each batch, and move its perturbation by ``eps`` up the same gradients.

    The perturbation goes on from one batch to the next. An epoch costs ``replays`` forward and backward passes per
    image, so it counts for as many epochs of other trainings.

    Source:
        Shafahi et al., NeurIPS 2019, arXiv:1904.12843, algorithm 1.
    """

    eps: Radius = 8 / 255
    replays: Count = 8
    recipe: RecipeName | None = "free-at"

    stage: ClassVar[Stage] = "training"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Shafahi et al., NeurIPS 2019, arXiv:1904.12843"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        largest = self.recipe_for(data).batch_size
        replay = Replay(self.eps, self.replays, torch.zeros(largest, *data.train.shape, device=job.device))
        return self.train(build, data, job, objective=replay, kept={"replay": replay})


@dataclass
class Replay:
    """The losses of a batch and, by its place in the batch, the perturbation ``delta`` (largest batch, C, H, W)."""

    eps: float
    replays: int
    delta: Tensor

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Iterator[Tensor]:
        """One step for each replay; the gradient of each also moves the perturbation."""
        for _ in range(self.replays):
            delta = self.delta[: len(x)].clone().requires_grad_(True)
            yield F.cross_entropy(model((x + delta).clamp(0, 1)), y)
            assert delta.grad is not None  # of the step that was taken on what was yielded
            self.delta[: len(x)] = (delta.detach() + self.eps * delta.grad.sign()).clamp(-self.eps, self.eps)

    def state_dict(self) -> dict[str, Tensor]:
        """The perturbation that the next batch starts from."""
        return {"delta": self.delta}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.delta = state["delta"].to(self.delta)
