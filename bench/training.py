"""The one training loop, behind every learner and every training defense."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.norms import per_sample
from bench.numerics import InBfloat16, tf32
from bench.protocols import Job
from bench.ranges import Count, NonNegative, Positive
from bench.registry import added
from bench.replay import Replay, recordable
from bench.rng import SampleRng

Prepare = Callable[[Tensor], Tensor]
Perturb = Callable[[nn.Module, Tensor, Tensor, SampleRng], Tensor]
Mix = Callable[[Tensor, Tensor, SampleRng], tuple[Tensor, Tensor]]
Objective = Callable[[nn.Module, Tensor, Tensor, SampleRng], Iterator[Tensor]]


class Selection(Protocol):
    """Chooses among the epochs of a training; its choice so far is kept with the training."""

    def __call__(self, model: nn.Module, epoch: int) -> bool:
        """Look at ``model``, in eval mode after ``epoch`` (0, 1, ...); whether the training goes on."""
        ...

    def put_back(self, model: nn.Module) -> None:
        """Give ``model`` the weights of the epoch that was chosen."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any) -> None: ...


RecipeName = Literal[
    "sep", "ops", "fast-at", "n-fgsm", "grad-align", "gat", "free-at", "trades", "mart", "awp", "sub-at", "smoothing",
    "some",
]  # fmt: skip

# Recipes as papers' codes have them, for CIFAR-10; all train on pixels as they are, with flips and crops.
PUBLISHED: dict[RecipeName, dict[str, Any]] = {
    "sep": {  # Chen et al., 2023, ``vanilla.py``: the rate rises for one epoch, and falls after 75 and 90
        "epochs": 120, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "nesterov": False,
        "schedule": "steps", "milestones": (75 / 120, 90 / 120), "warm_up": 1 / 120,
    },
    "ops": {  # Wu et al., 2023, ``main.py``: the rate falls after 100 and 150
        "epochs": 200, "batch_size": 256, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "nesterov": False,
        "schedule": "steps", "milestones": (1 / 2, 3 / 4),
    },
    "fast-at": {  # Wong et al., 2020: one triangle, up to the middle and down
        "epochs": 15, "batch_size": 128, "optimizer": "sgd", "lr": 0.2, "weight_decay": 5e-4, "nesterov": False,
        "schedule": "triangle",
    },
    "n-fgsm": {  # de Jorge et al., 2022
        "epochs": 30, "batch_size": 128, "optimizer": "sgd", "lr": 0.2, "weight_decay": 5e-4, "nesterov": False,
        "schedule": "triangle",
    },
    "grad-align": {  # Andriushchenko and Flammarion, 2020, ``train.py`` and its README
        "epochs": 30, "batch_size": 128, "optimizer": "sgd", "lr": 0.3, "weight_decay": 5e-4, "nesterov": False,
        "schedule": "triangle", "warm_up": 2 / 5,
    },
    "gat": {  # Sriramanan et al., 2020, ``GAT_cifar10.py``: the rate falls after epochs 71 and 86
        "epochs": 100, "batch_size": 64, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "nesterov": False,
        "schedule": "steps", "milestones": (71 / 100, 86 / 100),
    },
    "free-at": {  # Shafahi et al., 2019: 80,000 steps, 8 on each batch
        "epochs": 26, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "weight_decay": 2e-4, "nesterov": False,
        "schedule": "steps", "milestones": (1 / 2, 3 / 4),
    },
    "trades": {  # Zhang et al., 2019, ``train_trades_cifar10.py``
        "epochs": 76, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "weight_decay": 2e-4, "nesterov": False,
        "schedule": "steps", "milestones": (75 / 76,),
    },
    "mart": {  # Wang et al., 2020, ``train_resnet.py``
        "epochs": 120, "batch_size": 128, "optimizer": "sgd", "lr": 0.01, "weight_decay": 3.5e-3, "nesterov": False,
        "schedule": "steps", "milestones": (75 / 120, 90 / 120, 100 / 120),
    },
    "awp": {  # Wu et al., 2020, ``train_cifar10.py``
        "epochs": 200, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "nesterov": False,
        "schedule": "steps", "milestones": (1 / 2, 3 / 4),
    },
    "sub-at": {  # Li et al., 2022, ``run.sh``: it stops before the rate first falls
        "epochs": 65, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "nesterov": False,
        "schedule": "steps", "milestones": (),
    },
    "smoothing": {  # Cohen et al., 2019, ``train.py`` and its list of experiments
        "epochs": 90, "batch_size": 400, "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4, "nesterov": False,
        "schedule": "steps", "milestones": (1 / 3, 2 / 3),
    },
    "some": {  # ``circular_teaching.py``; its batch of 256 is two copies of 128 images
        "epochs": 150, "batch_size": 128, "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4, "nesterov": False,
        "schedule": "steps", "milestones": (1 / 3, 2 / 3),
    },
}  # fmt: skip

WARM_UP = 0.2  # share of a one-cycle schedule in which the learning rate rises
SMALL = 16  # pixels a side below which images are trained on as digits are


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: ``lr`` is the highest learning rate, ``flip`` and ``shift`` are the augmentation.

    ``momentum`` matters to SGD alone, and is Nesterov's unless ``nesterov`` is off. ``milestones`` are the shares of
    the training after which the schedule "steps" divides by ten, ``warm_up`` the share in which it first rises from a
    hundredth. A "triangle" rises in that share, half where there is none, and then falls to zero, as "fall" does from
    the start. ``shift`` moves an image by up to that many pixels each way.

    Raises:
        ConfigError: a number that no training can use.
    """

    epochs: int
    batch_size: int
    optimizer: Literal["sgd", "adam"]
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = True
    schedule: Literal["cosine", "one-cycle", "steps", "triangle", "fall"]
    milestones: tuple[float, ...] = (0.5, 0.75)
    warm_up: float = 0.0
    flip: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ConfigError(f"{self.epochs} epochs in batches of {self.batch_size}; both are at least 1")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr is {self.lr}; a learning rate is positive and finite")
        if self.shift < 0:
            raise ConfigError(f"shift is {self.shift}; it is a number of pixels, zero or more")

    @classmethod
    def for_dataset(cls, data: Dataset, published: RecipeName | None = None, **changes: Any) -> "Recipe":
        """What suits the data set, or a recipe of :data:`PUBLISHED`, with ``changes``; a change to ``None`` is none.

        Images below 16 pixels (digits) are trained with Adam, larger ones with SGD and weight decay, both under one
        cycle of the learning rate. The augmentation is what the data set says its images bear.
        """
        if published is not None:
            recipe = cls(**PUBLISHED[published])
        elif small_images(data):
            recipe = cls(epochs=30, batch_size=64, optimizer="adam", lr=3e-3, schedule="one-cycle")
        else:
            recipe = cls(
                epochs=30, batch_size=128, optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="one-cycle"
            )
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(recipe, flip=data.flip, shift=data.shift, **given)

    def rate(self, done: float) -> float:
        """The learning rate as a share of ``lr`` when a share ``done`` in [0, 1] of the training is over."""
        if self.schedule == "steps":
            if done < self.warm_up:
                return max(done / self.warm_up, 0.01)
            return 0.1 ** sum(done >= milestone for milestone in self.milestones)
        if self.schedule == "fall":
            return 1 - done
        if self.schedule == "triangle":
            peak = self.warm_up or 0.5
            return max(done / peak, 0.01) if done < peak else (1 - done) / (1 - peak)
        if self.schedule == "one-cycle":
            if done < WARM_UP:
                return max(done / WARM_UP, 0.01)  # a first step of size zero would be wasted
            done = (done - WARM_UP) / (1 - WARM_UP)
        return (1 + math.cos(math.pi * done)) / 2

    def build_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of ``parameters``, at the highest learning rate."""
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        nesterov = self.nesterov and self.momentum > 0
        return torch.optim.SGD(
            parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=nesterov
        )


def small_images(data: Dataset) -> bool:
    """Whether the images of ``data`` are of a digit's size, below 16 pixels a side."""
    return max(data.train.shape[1:]) < SMALL


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What learners and training defenses share: the numbers of their recipe, as arguments.

    ``None`` stands for those of the ``recipe``, and where none is named, for the data set's own
    (:meth:`Recipe.for_dataset`).
    """

    epochs: Count | None = None
    batch_size: Count | None = None
    lr: Positive | None = None
    weight_decay: NonNegative | None = None
    recipe: RecipeName | None = added(None)

    def train(self, build: Callable[[], nn.Module], data: Dataset, job: Job, **hooks: Any) -> nn.Module:
        """The network from ``build`` after :func:`fit` with ``hooks``, from the weights of ``job.seed``."""
        return fit(initialised(build, job), data, self.recipe_for(data), job, **hooks)

    def recipe_for(self, data: Dataset) -> Recipe:
        """The recipe on ``data``."""
        return Recipe.for_dataset(
            data, self.recipe, epochs=self.epochs, batch_size=self.batch_size, lr=self.lr,
            weight_decay=self.weight_decay,
        )  # fmt: skip


def steps_in_epoch(data: Dataset, recipe: Recipe) -> int:
    """The batches of one epoch."""
    return math.ceil(len(data.train) / recipe.batch_size)


def cross_entropy(model: nn.Module, x: Tensor, target: Tensor, rng: SampleRng) -> Iterator[Tensor]:
    """One step on the cross-entropy with ``target``, classes (B,) or shares (B, K)."""
    yield F.cross_entropy(model(x), target)


def fit(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    job: Job,
    perturb: Perturb | None = None,
    *,
    perturb_at: Callable[[int], Perturb] | None = None,
    prepare: Prepare | None = None,
    mix: Mix | None = None,
    objective: Objective = cross_entropy,
    optimizer: torch.optim.Optimizer | None = None,
    on_step: Callable[[int, int], None] | None = None,
    selection: Selection | None = None,
    kept: Mapping[str, Any] | None = None,
    pure: bool = False,
) -> nn.Module:
    """Train ``model`` on ``data.train``, by cross-entropy where no other ``objective`` is given.

    The result is a function of the initial weights and ``job.seed``, up to the rounding of the device. A batch goes
    through ``prepare``, the recipe's augmentation, ``perturb`` and ``mix``, in this order, and then to the
    ``objective``. The sample streams ``rng`` are new for each sample, epoch and hook.

    Now and then ``job.scratch`` takes the state after an epoch; a run that was stopped goes on from there, to the same
    result. It is told from other runs of the same job by its seed, recipe, data and network.

    Args:
        model: logits (B, K) from images (B, C, H, W) in [0, 1]; trained in place.
        perturb: ``perturb(model, x, y, rng) -> x``, an adversary or a random change; the model is in training mode.
        perturb_at: ``perturb_at(epoch) -> perturb``, for one that changes over the epochs (0, 1, ...).
        prepare: ``prepare(x) -> x``, a fixed map of the stored images; it may leave [0, 1].
        mix: ``mix(x, shares, rng) -> (x, shares)``, where ``shares`` (B, K) are of the classes in each image. The loss
            is the cross-entropy of each class, weighted by them.
        objective: ``objective(model, x, target, rng)`` yields losses of a batch; after each there is one step on it.
        optimizer: what steps, where it is not the recipe's own; it has the parameters of ``model``, on ``job.device``.
        on_step: ``on_step(epoch, batch)`` is called after each batch (0, 1, ... in each epoch).
        selection: chooses the epoch whose weights are returned; without one it is the last.
        kept: what else changes on the way, by name, kept with the training (see :class:`TrainingState`).
        pure: whether all hooks but the last three are functions of their tensors, the same in each epoch, and the
            objective yields one loss. Where the layers of ``model`` are torch's and ours, a GPU then computes in
            bfloat16 and replays a recorded step (:mod:`bench.replay`).

    Returns:
        ``model`` in eval mode on ``job.device``.

    Raises:
        ConfigError: the data set has no training images.
    """
    if len(data.train) == 0:
        raise ConfigError(
            f"data set {data.name!r} has no training images; take a model that comes with weights, "
            "or a data set with a train split"
        )
    train = data.train.to(job.device)
    model = model.to(job.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
    streams = SampleRng.create(job.seed, torch.arange(len(train), device=job.device), "training")
    shuffle = torch.Generator().manual_seed(job.seed)
    steps = steps_in_epoch(data, recipe)
    optimizer = optimizer or recipe.build_optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.rate(step / (steps * recipe.epochs)))
    more = {"schedule": schedule, "shuffle": _Position(shuffle), **(kept or {})}
    if selection is not None:
        more["selection"] = selection
    state = TrainingState(job, model, optimizer, more)
    change = perturb
    recorded = pure and perturb_at is None and job.device.type == "cuda" and recordable(model)
    piece = _name(model, data, recipe, job, recorded)
    asked = InBfloat16(model) if recorded else model

    def losses(rows: Tensor, epoch: int | Tensor) -> Iterator[Tensor]:
        """Those of a batch."""
        rng = streams[rows].fork(epoch)
        x, y = train.pixels(rows), train.labels[rows]
        if prepare is not None:
            x = prepare(x)
        x, target = augment(x, recipe.flip, recipe.shift, rng), y
        if change is not None:
            x = change(asked, x, y, rng.fork("perturb"))
        if mix is not None:
            x, target = mix(x, F.one_hot(y, len(data.classes)).to(x), rng.fork("mix"))
        yield from objective(asked, x, target, rng.fork("objective"))

    def backward(rows: Tensor, epoch: Tensor) -> None:
        (loss,) = losses(rows, epoch)
        loss.backward()

    replay = Replay(backward, model, job.device) if recorded else None
    with seeded(job):
        done = state.resume(piece)
        first: int = done["epochs"] if done else 0
        if first:
            job.progress(first, recipe.epochs)
        model.train()
        for epoch in range(first, recipe.epochs):
            change = perturb if perturb_at is None else perturb_at(epoch)
            order = torch.randperm(len(train), generator=shuffle).to(job.device)
            number = torch.tensor(epoch, device=job.device)
            with tf32():
                # Equal shares: no last batch is too small for batch norm.
                for batch, rows in enumerate(order.tensor_split(steps)):
                    if replay is not None:
                        replay(rows, number)
                        optimizer.step()
                    else:
                        for loss in losses(rows, epoch):
                            optimizer.zero_grad()
                            loss.backward()
                            optimizer.step()
                    schedule.step()
                    if on_step is not None:
                        on_step(epoch, batch)
            over = epoch + 1 == recipe.epochs
            if selection is not None:
                with observed(model, job):
                    over |= not selection(model, epoch)
            ended = recipe.epochs if over else epoch + 1
            job.progress(ended, recipe.epochs)
            if job.watch is not None:
                with observed(model, job):
                    job.watch(model, epoch)
            if job.scratch.due() or over:  # what follows the training may be slow, too
                state.save(piece, epochs=ended)
            if over:
                break
        if selection is not None:
            selection.put_back(model)
    return model.to(memory_format=torch.contiguous_format).eval()


@dataclass(frozen=True)
class TrainingState:
    """All that decides how the training of ``model`` goes on, torch's global generators among it, for ``job.scratch``.

    ``more`` has what else changes on the way, by name: anything with torch's ``state_dict`` and ``load_state_dict``.
    """

    job: Job
    model: nn.Module
    optimizer: torch.optim.Optimizer
    more: Mapping[str, Any] = field(default_factory=dict)

    def save(self, piece: str, **done: Any) -> None:
        """Keep the state as ``piece``, and beside it ``done``, what the caller has to know."""
        cuda = self.job.device.type == "cuda"
        parts = {"model": self.model, "optimizer": self.optimizer, **self.more}
        state = {name: part.state_dict() for name, part in parts.items()}
        random = torch.get_rng_state(), torch.cuda.get_rng_state(self.job.device) if cuda else None
        self.job.scratch.save(piece, {"state": state, "random": random, "done": done})

    def resume(self, piece: str) -> dict[str, Any] | None:
        """Take up the state that was kept last, if any, and return what the caller had to know."""
        kept = self.job.scratch.load(piece)
        if kept is None:
            return None
        for name, part in {"model": self.model, "optimizer": self.optimizer, **self.more}.items():
            part.load_state_dict(kept["state"][name])
        random, on_device = kept["random"]
        torch.set_rng_state(random)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, self.job.device)
        done: dict[str, Any] = kept["done"]
        return done


@dataclass(frozen=True)
class _Position:
    """Where a generator stands, saved as torch saves modules."""

    generator: torch.Generator

    def state_dict(self) -> dict[str, Tensor]:
        return {"position": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.generator.set_state(state["position"])


def _name(model: nn.Module, data: Dataset, recipe: Recipe, job: Job, coarse: bool) -> str:
    """What tells the training run apart from others of the same job: its start, its data, its recipe, its numbers."""
    if job.scratch.folder is None:
        return ""
    numbers = ("bfloat16",) if coarse else ()
    digest = sha256(repr((data.train.fingerprint(), recipe, job.seed, *numbers)).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return f"training-{digest.hexdigest()[:16]}"


@contextmanager
def observed(model: nn.Module, job: Job) -> Iterator[None]:
    """``model`` in eval mode; modes and generators are afterwards as they were."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with seeded(job):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def augment(x: Tensor, flip: bool, shift: int, rng: SampleRng) -> Tensor:
    """Move each image of ``x`` (B, C, H, W) by an offset of its own, black moving in, and mirror half of them."""
    height, width = x.shape[2:]
    if shift:
        padded = F.pad(x, (shift, shift, shift, shift))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2 shift + 1, 2 shift + 1, H, W)
        down, right = rng.fork("shift").integers(2 * shift + 1, 2).unbind(1)
        x = windows[torch.arange(len(x), device=x.device), :, down, right]
    if flip:
        x = torch.where(per_sample(rng.fork("flip").coins().view(-1)), x.flip(3), x)
    return x


def initialised(build: Callable[[], nn.Module], job: Job) -> nn.Module:
    """The network from ``build`` with the initial weights that belong to ``job.seed``."""
    with seeded(job):
        return build()


@contextmanager
def seeded(job: Job) -> Iterator[None]:
    """Torch's global generators (initial weights, dropout) at ``job.seed``, and afterwards as they were."""
    with torch.random.fork_rng(devices=[job.device] if job.device.type == "cuda" else []):
        torch.manual_seed(job.seed)
        yield


@contextmanager
def frozen(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """``model`` in eval mode and without gradients of its parameters, afterwards as it was.

    For attacks inside a training loop: batch statistics stay untouched and a backward pass computes the input's
    gradient alone. With ``training`` it is in training mode instead, as papers have it whose attacks go by the
    statistics of the batch and move the running ones.
    """
    before = model.training
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train(training)
    for parameter in free:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in free:
            parameter.requires_grad_(True)
        model.train(before)
