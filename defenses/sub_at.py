"""Sub-AT: adversarial training inside the few directions in which a first adversarial training has moved."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from bench.ascent import pgd
from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.protocols import Job, Stage
from bench.ranges import Count, Positive, Radius
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Threat
from bench.training import Perturb, Recipe, RecipeName, Trainer, fit, frozen, initialised, steps_in_epoch
from defenses.early_stopping import EarlyStopping
from defenses.subspace import SubspaceSGD, Trajectory, principal_directions

RELEASED = (200, 400, 550)  # batches of an epoch (0, 1, ...) after which the released code takes a snapshot


@dataclass(frozen=True, kw_only=True)
class _Variant:
    epochs: int
    dimensions: int


VARIANTS = {"fast": _Variant(epochs=65, dimensions=80), "pgd": _Variant(epochs=100, dimensions=100)}
STEPS, REL_STEP = 10, 0.25  # of the PGD variant's first training


@defenses("sub-at")
@dataclass(frozen=True, kw_only=True)
class SubspaceAdversarialTraining(Trainer):
    """Train adversarially at a constant rate and keep snapshots; start anew, inside their principal directions.

    The second training begins at the *first* weights and can only reach ``w_0 + span(P)``. There per-sample gradients
    stay small, so that single-step training does not collapse, and its radius may be larger. The attack sees the
    network in training mode in both phases.

    Args:
        variant: the attack of the first training, Fast-AT's single step or ten steps of PGD; the second training takes
            a single step in either.
        dimensions: of the subspace; the paper's 80 (fast) or 100 (pgd) where ``None``, or as many as there are.
        subspace_epochs: epochs inside the subspace; ``epochs`` is those before it.
        subspace_lr: constant rate inside the subspace, where there is no weight decay, as it would lead out.
        enlarge: the radius inside the subspace over ``eps``.
        rel_step: size of the single step as a share of its radius.
        snapshots: when they are taken. ``as-released`` is after the epoch and after its batches 200, 400 and 550
            as far as it has them: twice in CIFAR-10's 352 batches, once in an epoch of 200 or less. ``as-intended`` is
            twice in every epoch, in the middle and at its end.
        early_stopping: return the epoch that withstands PGD best on held-out images, as the paper does.

    Source:
        Li et al., CVPR 2022, arXiv:2111.12229; numbers are those of the released ``run.sh``. Its principal components
        come of scikit-learn's randomised solver under an unset seed; here they are exact. Its momentum is of full size;
        here it has the coordinates' (:class:`defenses.subspace.SubspaceSGD`), which is the same training.
    """

    eps: Radius = 8 / 255
    variant: Literal["fast", "pgd"] = "fast"
    dimensions: Count | None = None
    subspace_epochs: Count = 40
    subspace_lr: Positive = 1.0
    enlarge: Positive = 2.0
    rel_step: Positive = 1.25
    snapshots: Literal["as-released", "as-intended"] = "as-intended"
    early_stopping: bool = True
    recipe: RecipeName | None = "sub-at"

    stage: ClassVar[Stage] = "training"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Li et al., CVPR 2022, arXiv:2111.12229"

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``.

        Raises:
            ConfigError: fewer snapshots than the subspace has dimensions, or no images to choose the epoch by.
        """
        epochs = self.recipe_for(data).epochs
        self.check_snapshots(data)
        total = epochs + self.subspace_epochs
        basis = self.explore(build, data, part(job, 0, total))
        return self.train_inside(basis, build, data, part(job, epochs, total))

    def recipe_for(self, data: Dataset) -> Recipe:
        """The recipe of the first training."""
        recipe = super().recipe_for(data)
        return recipe if self.epochs else replace(recipe, epochs=VARIANTS[self.variant].epochs)

    def explore(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> Tensor:
        """The basis (d, n) of the subspace in which a first training moves."""
        network, recipe = initialised(build, job).to(job.device), self.recipe_for(data)
        trajectory, moments = Trajectory(network, job), self.moments(data)

        def on_step(epoch: int, batch: int) -> None:
            if batch in moments:
                trajectory.take(1 + epoch * len(moments) + moments.index(batch))

        fit(network, data, recipe, job, self.perturb(self.variant, self.eps), on_step=on_step, pure=True)
        snapshots = trajectory.matrix(1 + recipe.epochs * len(moments)).to(job.device)
        basis, shares = principal_directions(snapshots, self.dimension(data))
        job.note("explained_variance", float(shares.sum()))
        return basis

    def train_inside(self, basis: Tensor, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """The network from ``build`` trained within its first weights plus the span of ``basis`` (d, n)."""
        network = initialised(build, job).to(job.device)
        optimizer = SubspaceSGD(network.parameters(), basis, self.subspace_lr)
        recipe = replace(
            self.recipe_for(data), epochs=self.subspace_epochs, lr=self.subspace_lr, schedule="steps", milestones=(),
            weight_decay=0.0,
        )  # fmt: skip
        selection = EarlyStopping(data, self.eps, job) if self.early_stopping else None
        adversary = self.perturb("fast", self.enlarge * self.eps)
        return fit(network, data, recipe, job, adversary, optimizer=optimizer, selection=selection, pure=True)

    def perturb(self, variant: Literal["fast", "pgd"], eps: float) -> Perturb:
        """The attack of a training, within ``eps``."""
        steps, size = (1, self.rel_step) if variant == "fast" else (STEPS, REL_STEP)
        threat = Threat("linf", eps, "gradients")

        def attack(model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Tensor:
            with frozen(model, training=True):
                return pgd(model, x, y, threat, rng, steps, size)

        return attack

    def moments(self, data: Dataset) -> list[int]:
        """The batches of an epoch (0, 1, ...) after which there is a snapshot, the last among them."""
        count = steps_in_epoch(data, self.recipe_for(data))
        early = RELEASED if self.snapshots == "as-released" else (count // 2 - 1,)
        return [*(batch for batch in early if 0 <= batch < count - 1), count - 1]

    def dimension(self, data: Dataset) -> int:
        """Of the subspace."""
        most = self.recipe_for(data).epochs * len(self.moments(data))  # one less than there are snapshots
        return self.dimensions or min(VARIANTS[self.variant].dimensions, most)

    def check_snapshots(self, data: Dataset) -> None:
        """Whether the snapshots can span the subspace.

        Raises:
            ConfigError: there are too few.
        """
        most = self.recipe_for(data).epochs * len(self.moments(data))
        if self.dimension(data) > most:
            raise ConfigError(
                f"{most + 1} snapshots span at most {most} dimensions, not {self.dimension(data)}; "
                "train for more epochs or lower dimensions"
            )


def part(job: Job, before: int, total: int) -> Job:
    """``job`` for a training that is a part of ``total`` epochs, of which ``before`` come first."""
    watch = job.watch
    return replace(
        job,
        progress=lambda done, of: job.progress(before + done, total),
        watch=None if watch is None else lambda model, epoch: watch(model, before + epoch),
    )
