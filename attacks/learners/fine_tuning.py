"""Fine-tuning: a learner that knows images already, and takes from the released ones what is new to it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.protocols import Job
from bench.ranges import Count
from bench.registry import attacks
from bench.rng import SampleRng
from bench.spec import parse_sum
from bench.threat import Access
from bench.training import Recipe, Trainer, fit, initialised

GENTLE = 0.1  # share of the usual learning rate, so that what is known is not unlearned


@attacks("fine-tuning")
@dataclass(frozen=True, kw_only=True)
class FineTuning(Trainer):
    """Train on the released images from the weights of the network ``from``, which has seen others before.

    What is written as ``from=resnet20(weights=FILE)`` is of the cell's own model, whose row this is. Its learning rate
    is a tenth of what an untrained network gets, unless ``lr`` says another.

    Args:
        from_: the model with its weights; their hash is in the key of the cell.
        classes: how many classes it tells apart. It then gets a new head, with the initial weights of the cell's seed,
            even where the data have as many. Left out, its classes are those of the data, and it keeps its head.
        layers: ``all``, or the ``head`` alone, under features that stay as they are, in eval mode; that is trained
            at the usual rate.

    Source:
        Yosinski et al., NeurIPS 2014, arXiv:1411.1792, with the layers below fine-tuned or frozen.

    Raises:
        ConfigError: ``from`` names several models.
    """

    from_: str
    classes: Count | None = None
    layers: Literal["all", "head"] = "all"

    access: ClassVar[Access] = "training-data"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Yosinski et al., NeurIPS 2014, arXiv:1411.1792"

    def __post_init__(self) -> None:
        if len(self.sources) != 1:
            raise ConfigError(f"from names {len(self.sources)} models; a training starts from one")

    @property
    def sources(self) -> tuple[str, ...]:
        """The model that it starts from."""
        return tuple(str(spec) for spec in parse_sum(self.from_))

    @property
    def source_classes(self) -> int | None:
        """How many classes that tells apart; ``None`` for those of the data."""
        return self.classes

    def recipe_for(self, data: Dataset) -> Recipe:
        """The recipe on ``data``."""
        usual = super().recipe_for(data)
        return usual if self.lr or self.layers == "head" else replace(usual, lr=GENTLE * usual.lr)

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``.

        Raises:
            ConfigError: nobody has said what the weights are, or which of them are the head.
            WeightsError: they are of another architecture.
        """
        if job.pretrained is None:
            raise ConfigError("fine-tuning finds its source at job.pretrained; give a Job that has one")
        network = initialised(build, job)
        job.pretrained.give(network, head=self.classes is None)
        network.to(job.device)
        if self.layers == "all":
            return fit(network, data, self.recipe_for(data), job, pure=True)
        return self._fit_head(network, data, job, job.pretrained.head)

    def _fit_head(self, network: nn.Module, data: Dataset, job: Job, head: frozenset[str]) -> nn.Module:
        recipe, parameters = self.recipe_for(data), dict(network.named_parameters())
        trained = {name: parameter for name, parameter in parameters.items() if name in head}
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        network = fit(
            network, data, recipe, job, objective=features_as_they_are,
            optimizer=recipe.build_optimizer(trained.values()),
        )  # fmt: skip
        return network.requires_grad_(True)


def features_as_they_are(model: nn.Module, x: Tensor, target: Tensor, rng: SampleRng) -> Iterator[Tensor]:
    """The cross-entropy under the running statistics of batch-norms, which stay as they are, and without dropout."""
    model.eval()
    yield F.cross_entropy(model(x), target)
