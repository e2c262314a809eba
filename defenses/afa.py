"""AFA, our form of it: two sets of batch-norms, for clean and for attacked images, fused into one."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.ascent import pgd
from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.norms import per_sample
from bench.protocols import Job, Stage
from bench.ranges import Count, Fraction, NonNegative, Positive, Radius
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Threat
from bench.training import Trainer, fit, frozen, initialised
from defenses.features import features_of, last_linear


@defenses("afa")
@dataclass(frozen=True, kw_only=True)
class AdaptiveFeatureAlignment(Trainer):
    """Adaptive feature alignment, as a variant of ours: branches of batch-norms that are fused when training is over.

    Clean images go through one set of batch-norms, attacked ones through another, all else is shared. The strength of
    an attack is uniform for each image, from nothing to all of PGD's move, and the features of the attacked image are
    drawn to those of the clean one. The two branches then become one: each batch-norm gives ``clean_share`` of what the
    clean one would and the rest of what the other would. The paper has a network predict that share for each image;
    one share for all is what the network without it can hold, so the architecture stays as it is. Losses, strengths and
    schedule of the paper could not be read either: no figure of this is one of the paper's.

    An epoch costs ``steps + 2`` forward and backward passes per image. What is looked at after each epoch is the clean
    branch.

    Args:
        weight: of the attacked images' losses; 0 is ordinary training.
        align: of the mean square between the features of an attacked image and its clean one, beside the cross-entropy.
        clean_share: 1 keeps the clean branch, 0 the other.

    Source:
        Wang et al., 2021, arXiv:2105.15157, whose abstract has the two branches and the fusing weight.
    """

    eps: Radius = 8 / 255
    steps: Count = 10
    rel_step: Positive = 0.25
    weight: NonNegative = 1.0
    align: NonNegative = 1.0
    clean_share: Fraction = 0.5

    stage: ClassVar[Stage] = "training"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "ours, after Wang et al., 2021, arXiv:2105.15157"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``.

        Raises:
            ConfigError: the network has no batch-norms to double, or does not end in a linear layer.
        """
        network, recipe = initialised(build, job).to(job.device), self.recipe_for(data)
        branch = Branch(network).to(job.device)
        head = last_linear(network.eval(), data.train.pixels(slice(2)).to(job.device))

        def losses(model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Iterator[Tensor]:
            yield self.loss(model, branch, head, x, y, rng)

        optimizer = recipe.build_optimizer([*network.parameters(), *branch.parameters()])
        fit(network, data, recipe, job, objective=losses, optimizer=optimizer, kept={"branch": branch})
        branch.fuse(self.clean_share)
        return network

    def loss(
        self, model: nn.Module, branch: "Branch", head: nn.Linear, x: Tensor, y: Tensor, rng: SampleRng
    ) -> Tensor:
        """Of a batch, both branches together; the attack is on the other branch, in eval mode."""
        with features_of(head) as clean:
            loss = F.cross_entropy(model(x), y)
        if self.weight == 0:
            return loss
        with branch.put_in():
            with frozen(model):
                x_adv = pgd(model, x, y, Threat("linf", self.eps, "gradients"), rng, self.steps, self.rel_step)
            strength = rng.fork("strength").uniform().to(x)
            with features_of(head) as moved:
                attacked = model(x + per_sample(strength) * (x_adv - x))
        gap = (moved[0] - clean[0].detach()).square().mean()
        return loss + self.weight * (F.cross_entropy(attacked, y) + self.align * gap)


class Branch(nn.Module):
    """A second set of the batch-norms of ``model``, which begins as a copy of the first.

    Raises:
        ConfigError: there are none, or some without weights or running statistics.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places = [
            (parent, name) for parent in model.modules() for name, child in parent.named_children()
            if isinstance(child, nn.BatchNorm2d)
        ]  # fmt: skip
        if not self.places or not all(norm.affine and norm.track_running_stats for norm in self.own):
            raise ConfigError("afa doubles batch-norms with weights and running statistics; take a network with such")
        self.twins = nn.ModuleList(copy.deepcopy(norm) for norm in self.own)

    @property
    def own(self) -> list[nn.BatchNorm2d]:
        """What stands in the model."""
        return [getattr(parent, name) for parent, name in self.places]

    @contextmanager
    def put_in(self) -> Iterator[None]:
        """These batch-norms in place of the model's own."""
        own = self.own
        self._put(self.twins)
        try:
            yield
        finally:
            self._put(own)

    def _put(self, norms: nn.ModuleList | list[nn.BatchNorm2d]) -> None:
        for (parent, name), norm in zip(self.places, norms, strict=True):
            setattr(parent, name, norm)

    @torch.no_grad()
    def fuse(self, share: float) -> None:
        """Let each batch-norm of the model, in eval mode, give ``share`` of its answer and the rest of its twin's.

        Both are a rate and an offset for each channel, so a weighted mean of them is another batch-norm.
        """
        if share == 1:
            return
        for norm, twin in zip(self.own, self.twins, strict=True):
            rate, offset = (
                share * mine + (1 - share) * other for mine, other in zip(_line(norm), _line(twin), strict=True)
            )
            mean, deviation = _statistics(norm)
            norm.weight.copy_(rate * deviation)
            norm.bias.copy_(offset + rate * mean)


def _line(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """By what a batch-norm in eval mode multiplies each channel (C,), and what it adds then."""
    assert isinstance(norm, nn.BatchNorm2d)
    mean, deviation = _statistics(norm)
    rate = norm.weight / deviation
    return rate, norm.bias - rate * mean


def _statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The running mean and deviation (C,) of a batch-norm that has them."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    return mean, (variance + norm.eps).sqrt()
