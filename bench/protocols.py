"""The signatures that components follow. No base class: whatever has these attributes and this call takes part.

Every component is a frozen dataclass of its hyper-parameters, with a ``version`` that rises whenever its results change
and a ``paper`` that says where it comes from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bench.dataset import Dataset, Split
from bench.declarations import Stage as Stage
from bench.rng import SampleRng
from bench.scratch import Scratch
from bench.service import Line, Service
from bench.threat import Access, Norm, Threat

if TYPE_CHECKING:
    from bench.models.pretrained import Pretrained
    from bench.oracle import Oracle
    from bench.oracle.surrogate import Surrogate


@runtime_checkable
class Attack(Protocol):
    """Moves images of a served model.

    Class attributes (or properties): ``access`` ("scores", "labels" or "gradients"), ``norms``, ``version``, ``paper``;
    optionally ``rules``, what the referee is to do otherwise (:class:`bench.oracle.Rules`): an attack on the undefended
    network is a control, which stands in no worst case, unless it names other models to work on in ``sources``;
    ``replays`` names an attack whose examples it takes; ``top_scores = True`` where it looks at the true class and the
    best other alone, so that a service may tell it the best few, and ``fine_scores = True`` where it compares scores so
    close that one that rounds them tells it nothing; ``batch_dependent = True`` where a sample's result depends on
    the rest of its batch, ``whole_set = True`` as well where it learns from all samples of the cell, which are then
    attacked together, and ``rescaled = True`` where the schedule is stretched over the query budget.
    A method ``check(classes, shape)`` may refuse data, of images (C, H, W), by a ConfigError before anything runs.
    """

    @property
    def access(self) -> Access: ...
    @property
    def norms(self) -> frozenset[Norm]: ...
    @property
    def version(self) -> int: ...
    @property
    def paper(self) -> str: ...

    def __call__(self, oracle: "Oracle", x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """Return ``x_adv`` (B, C, H, W), shaped and typed like ``x``, which stays as it was.

        ``x`` (B, C, H, W) in [0, 1] and ``y`` (B,) int64 are samples that the served model gets right. The oracle
        answers for them by their row in this batch. Whatever is returned, the runner measures.
        """
        ...


Network = Callable[[Tensor], Tensor]  # logits (B, K) of images (B, C, H, W)


@dataclass(frozen=True)
class Job:
    """What a training run is given beside its data: where to run, its seed, and whom to tell about progress.

    ``watch`` is shown the model in eval mode after each epoch (0, 1, ...), and leaves it as it is; ``note`` takes what
    a training says of itself once, by name, for those who read its curves. ``scratch`` keeps what is done so far; a job
    that goes on with it watches only the epochs again that it has to train again. ``pretrained`` is the network that a
    learner names in ``sources``.
    """

    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Callable[[int, int], None] = lambda done, total: None  # epochs done, of how many
    watch: Callable[[nn.Module, int], None] | None = None
    note: Callable[[str, float], None] = lambda name, value: None
    scratch: Scratch = field(default_factory=Scratch)
    pretrained: "Pretrained | None" = None


@runtime_checkable
class FittedAttack(Protocol):
    """An attack that learns from other images than it attacks, once for each network and seed, and then asks little.

    Whoever has the methods ``fit`` and ``apply`` is one; all else is as of an :class:`Attack`, and ``version`` and
    ``paper`` may be left out. What ``fit`` keeps to itself is lost: a later run finds tensors alone. ``most_images``
    says how many training images it looks at, at most, for those who plan a run.
    """

    @property
    def access(self) -> Access: ...
    @property
    def norms(self) -> frozenset[Norm]: ...

    def fit(self, model: "Surrogate", data: Dataset, threat: Threat, job: Job) -> Mapping[str, Tensor]:
        """What it comes to on the images of ``data``, which holds no test images; found at ``oracle.fitted``.

        ``model`` is what ``oracle.surrogate`` holds: the undefended network or those that the attack names, in plain
        float32, to work on at will. ``threat`` has no query budget, since one fit serves all. Single numbers, tensors
        of shape (), are kept as figures of the row as well.
        """
        ...

    def apply(self, x: Tensor, threat: Threat, fitted: Mapping[str, Tensor]) -> Tensor:
        """What ``fitted`` makes of images (B, C, H, W) of any class, each by itself; inside the ball and the box."""
        ...


@runtime_checkable
class Learner(Protocol):
    """Trains on a released data set, which is how it attacks one; class attribute ``access = "training-data"``.

    Optionally ``sources``, the one model with weights from which it starts, to be found at ``job.pretrained``, and
    ``source_classes``, how many classes that tells apart where those are not the data's.
    """

    @property
    def access(self) -> Access: ...
    @property
    def version(self) -> int: ...
    @property
    def paper(self) -> str: ...

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        ...


@dataclass(frozen=True)
class Certificates:
    """What is proven of images: ``predicted`` is the answer of all within ``radius`` of each, unless it ``abstained``.

    ``votes`` of the ``n`` draws are for that class, which ``n0`` other draws chose, and ``most`` is the radius had all
    of the ``n`` been. Each proof fails with a probability of ``alpha`` at most. ``invalid`` where an answer was NaN or
    infinite, which is a vote for nothing.
    """

    predicted: Tensor  # (B,) int64
    radius: Tensor     # (B,) float64, in the norm of the certifier on the pixel scale; 0 where it abstained
    abstained: Tensor  # (B,) bool
    votes: Tensor      # (B,) int64
    invalid: Tensor    # (B,) bool
    n0: int
    n: int
    alpha: float
    most: float


@runtime_checkable
class Certifier(Protocol):
    """Proves within which radius no change of an image moves the answer; class attribute ``access = "certificate"``.

    What it proves something of may be another classifier than the network it asks: ``certifier(network, ...)``
    certifies that, ``predict`` answers as that does, and ``soften`` is what an attack on that can follow. None of them
    keeps to the box [0, 1]: a proof holds outside of it, too.
    """

    @property
    def access(self) -> Access: ...
    @property
    def norm(self) -> Norm: ...
    @property
    def draws(self) -> int:
        """Forward passes that each image costs."""
        ...
    @property
    def version(self) -> int: ...
    @property
    def paper(self) -> str: ...

    def __call__(self, network: Network, x: Tensor, rng: SampleRng, batch: int) -> Certificates:
        """Certify the images ``x`` (B, C, H, W), of which each draws from its stream in ``rng`` alone.

        ``network`` gives logits (B, K) of at most ``batch`` images at once.
        """
        ...

    def predict(self, network: Network, x: Tensor, rng: SampleRng, batch: int, draws: int, alpha: float) -> Tensor:
        """The answers (B,) int64 at ``x`` by so many ``draws``, each wrong with a probability of ``alpha`` at most.

        -1 where it abstains; with an ``alpha`` of 1 it says what it holds likeliest.
        """
        ...

    def soften(self, network: Network, x: Tensor, rng: SampleRng, draws: int) -> Tensor:
        """Probabilities (B, K) that stand for the answers at ``x`` and have a gradient, from so many ``draws``."""
        ...


class DataDefense(Protocol):
    """Releases training images; class attributes ``stage = "data"``, ``norm`` and ``eps``, the ball that it keeps to.

    ``needs_classes = False`` (a property, too) where it never looks at the labels, so that images without classes can
    be protected.
    """

    @property
    def stage(self) -> Literal["data"]: ...
    @property
    def norm(self) -> Norm: ...
    @property
    def eps(self) -> float: ...
    @property
    def version(self) -> int: ...
    @property
    def paper(self) -> str: ...

    def __call__(self, data: Dataset, job: Job) -> Split:
        """Return the training split to release: same length, order and labels, uint8, inside the ball."""
        ...


class TrainingDefense(Protocol):
    """Trains the network, as a learner does; class attribute ``stage = "training"``.

    Optionally ``trains``, the name of the one model that it can train, and a method ``check(classes, shape)`` that may
    refuse data by a ConfigError before anything runs.
    """

    @property
    def stage(self) -> Literal["training"]: ...
    @property
    def version(self) -> int: ...
    @property
    def paper(self) -> str: ...

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        ...


class OutputDefense(Protocol):
    """Serves a model; class attributes ``stage = "output"`` and ``random``.

    Optionally ``batch_dependent = True`` where a row's answer depends on the rest of its batch, and ``stateful = True``
    where it depends on earlier queries (properties, too); tables mark both. ``by_sample = True`` where these are the
    queries of the same sample alone, as its random numbers tell. ``needs_batch_norm = True`` where it works on the
    network's batch-norms, which fast numbers fold away otherwise.
    ``knows = ("decode-square",)`` names the attacks that know it, with the arguments that matter: on the query track it
    is ranked only where it has met them.
    ``outside = True`` where all it does with the network is to call it: it looks at no layer and no weight and sets no
    hook, so another library may answer for it.
    """

    @property
    def stage(self) -> Literal["output"]: ...
    @property
    def random(self) -> bool: ...
    @property
    def version(self) -> int: ...
    @property
    def paper(self) -> str: ...

    def __call__(self, model: nn.Module, calibration: Split, seed: int) -> nn.Module:
        """The served model, a module in eval mode.

        With ``random = True`` it is called ``served(x, rng)``: ``rng`` is a SampleRng with one stream for each row, new
        at each query, and the only source of randomness it may use.
        """
        ...


@runtime_checkable
class FittedDefense(Protocol):
    """An output defense that is trained before it serves, once for each network and seed.

    Whoever acts at the output and has the method ``fit`` is one; all else is as of an :class:`OutputDefense`, and
    ``version`` and ``paper`` may be left out. What ``fit`` keeps to itself is lost: a later run finds tensors alone.
    ``serving = ("random",)`` names the parameters that ``fit`` does not depend on, so that those who differ in them
    alone learn once.
    """

    @property
    def stage(self) -> Literal["output"]: ...
    @property
    def random(self) -> bool: ...

    def fit(self, model: "Surrogate", data: Dataset, job: Job) -> Mapping[str, Tensor]:
        """What it learns on the images of ``data``, as it was released, which holds no test images.

        ``model`` is the network in plain float32, to work on at will; it counts the images that pass it. ``job`` keeps
        unfinished work, and ``job.progress`` is told of steps. Single numbers, tensors of shape (), are figures of the
        row as well; one named ``queries`` says how many answers of the network it took.
        """
        ...

    def __call__(self, model: nn.Module, calibration: Split, seed: int, fitted: Mapping[str, Tensor]) -> nn.Module:
        """The served model, as that of an :class:`OutputDefense`, with what the defense has learned."""
        ...


AtOutput = OutputDefense | FittedDefense
Defense = DataDefense | TrainingDefense | AtOutput  # told apart by their stage; a chain holds one of each at most


class Architecture(Protocol):
    """A network by name: logits (B, K) from images (B, C, H, W) in [0, 1], normalising inside."""

    @property
    def trained(self) -> bool:
        """Whether it comes with weights; an untrained one is trained on the data set first."""
        ...

    def __call__(self, classes: int, shape: tuple[int, int, int], model_dir: Path | None) -> nn.Module:
        """Build it for ``classes`` and images of ``shape`` (C, H, W), weights loaded where it comes with some.

        Initial weights are drawn from torch's global generator, which the caller seeds. ``model_dir`` is a folder in
        which weights named by a relative path are looked for, after the working directory.
        """
        ...


@runtime_checkable
class ServiceModel(Architecture, Protocol):
    """A model that is only asked: it comes "trained", and what it builds has neither weights nor gradients.

    ``random = True``, ``stateful = True`` and ``batch_dependent = True`` say for tables what its service declares.
    """

    @property
    def service(self) -> Service: ...

    def line(self) -> Line:
        """How it is reached."""
        ...


class DatasetSource(Protocol):
    """A data set by name."""

    def __call__(self, data_dir: Path | None) -> Dataset:
        """Load it; ``data_dir`` is the folder that holds downloaded data sets, one folder each."""
        ...
