"""The signatures that components follow. No base class: whatever has these attributes and this call takes part.

Every component is a frozen dataclass of its hyper-parameters, with a ``version`` that rises whenever its results change
and a ``paper`` that says where it comes from.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bench.dataset import Dataset
from bench.rng import SampleRng
from bench.scratch import Scratch
from bench.threat import Access, Norm, Threat

if TYPE_CHECKING:
    from bench.oracle import Oracle

Stage = Literal["data", "training", "output"]


@runtime_checkable
class Attack(Protocol):
    """Moves images of a served model.

    Class attributes: ``access`` ("scores", "labels" or "gradients"), ``norms``, ``version``, ``paper``; optionally
    ``batch_dependent = True`` where a sample's result depends on the rest of its batch (foreign code), and
    ``rescaled = True`` (a property, too) where the schedule is stretched over the query budget; ``minimal = True``
    for minimum-norm attacks, whose queries may leave the ball (not the box); success is a misclassified query inside;
    ``lookahead = True`` for white-box attacks that ask where they do not go, outside the ball or the box;
    ``averages = True`` where the k queries of one call are k draws of one image: each is paid for, and success is a
    misclassified mean of their logits; ``alone = True`` where the queries of a row in one call are to be a batch of
    their own; and ``surrogate = True`` where it works on the undefended network, found at ``oracle.surrogate``; that
    makes it a control, which stands in no worst case. A method ``check(classes, shape)`` may refuse data, of images
    (C, H, W), by a ConfigError before anything runs.
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


@dataclass(frozen=True)
class Job:
    """What a training run is given beside its data: where to run, its seed, and whom to tell about progress.

    ``watch`` is shown the model in eval mode after each epoch (0, 1, ...), and leaves it as it is. ``scratch`` keeps
    what is done so far; a job that goes on with it watches only the epochs again that it has to train again.
    """

    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Callable[[int, int], None] = lambda done, total: None  # epochs done, of how many
    watch: Callable[[nn.Module, int], None] | None = None
    scratch: Scratch = field(default_factory=Scratch)


@runtime_checkable
class Learner(Protocol):
    """Trains on a released data set, which is how it attacks one; class attribute ``access = "training-data"``."""

    @property
    def access(self) -> Access: ...
    @property
    def version(self) -> int: ...
    @property
    def paper(self) -> str: ...

    def __call__(self, build: Callable[[], nn.Module], data: Dataset, job: Job) -> nn.Module:
        """Return the network from ``build`` trained on ``data.train``, in eval mode and on ``job.device``."""
        ...


class Defense(Protocol):
    """Acts at one of three stages; a chain holds at most one of each.

    - ``stage = "output"``: ``defense(model, calibration, seed) -> model``, the served model (a module in eval mode).
      With ``random = True`` the served module is called ``model(x, rng)``: ``rng`` is a SampleRng with one stream for
      each row, new at each query, and the only source of randomness it may use. Optionally ``batch_dependent = True``
      where a row's answer depends on the rest of its batch, and ``stateful = True`` where it depends on earlier
      queries (properties, too); tables mark both. ``needs_batch_norm = True`` where it works on the network's
      batch-norms, which fast numbers fold away otherwise.
    - ``stage = "training"``: ``defense(build, data, job) -> model``, the signature of a learner.
    - ``stage = "data"``: ``defense(data, job) -> Split``, the training split to release: same length, order and labels,
      uint8, inside the defense's own ``norm`` and ``eps``. ``needs_classes = False`` (a property, too) where it never
      looks at the labels, so that images without classes can be protected.
    """

    @property
    def stage(self) -> Stage: ...
    @property
    def version(self) -> int: ...
    @property
    def paper(self) -> str: ...
    @property
    def __call__(self) -> Callable[..., Any]: ...


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


class DatasetSource(Protocol):
    """A data set by name."""

    def __call__(self, data_dir: Path | None) -> Dataset:
        """Load it; ``data_dir`` is the folder that holds downloaded data sets, one folder each."""
        ...
