"""A suite, split into cells; every cell is checked before any runs."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import cast

import torch

from bench.dataset import Dataset
from bench.errors import BenchError, ConfigError, RefereeError, WeightsError
from bench.models import FromFile, check_logits, resolve
from bench.models.lent import fingerprint
from bench.models.pretrained import Pretrained, head_of
from bench.models.weights import state_fingerprint
from bench.oracle import check_levels
from bench.plan.cell import Cell, Component, Source
from bench.plan.pin import pin, rewritten
from bench.plan.services import check_service
from bench.plan.suite import Grid, Suite
from bench.protection import declared_threat
from bench.protocols import (
    Architecture,
    AtOutput,
    Attack,
    Certifier,
    DataDefense,
    DatasetSource,
    Defense,
    FittedAttack,
    FittedDefense,
    Learner,
    TrainingDefense,
)
from bench.registry import attacks, datasets, defenses, models
from bench.rng import SampleRng, global_generators
from bench.service import Service, declared_by
from bench.spec import Spec, parse_chain
from bench.system.process_state import undisturbed
from bench.threat import Threat


@dataclass(frozen=True)
class Chain:
    """The defense at each stage that has one."""

    data: DataDefense | None = None
    training: TrainingDefense | None = None
    output: AtOutput | None = None


STAGES = tuple(field.name for field in fields(Chain))  # in the order in which they act


@dataclass(frozen=True)
class Task:
    """A cell and the components that it names, ready to run."""

    cell: Cell
    data: Dataset
    architecture: Architecture
    chain: Chain
    attack: Attack | Learner | Certifier
    model_dir: Path | None
    sources: tuple["Task", ...] = ()  # the networks that the attack works on, as if they were to be attacked
    classes: int | None = None  # that the network tells apart, where those are not the data's

    @property
    def trains(self) -> bool:
        """Whether a network has to be trained before anything can be attacked."""
        return not self.architecture.trained

    @property
    def trainer(self) -> Learner | TrainingDefense:
        """Who trains a network of the cell: its learner, its training defense, or the standard training."""
        if self.cell.threat.access == "training-data":
            return cast(Learner, self.attack)
        return self.chain.training or cast(Learner, attacks.create("standard"))

    @property
    def service(self) -> Service | None:
        """What the model of the cell declares, where it is a service."""
        return declared_by(self.architecture)

    def build(self) -> torch.nn.Module:
        """The network of the cell, with its weights where it comes with some."""
        return build(self.architecture, self.data, self.model_dir, self.classes)

    def pretrained(self) -> Pretrained | None:
        """What the learner of the cell starts from, if it names a source.

        Raises:
            ConfigError: no weight of the network depends on the number of classes, so nobody knows its head.
            RefereeError: the source has other weights than when it was planned.
        """
        if self.cell.threat.access != "training-data" or not self.sources:
            return None
        (source,) = self.sources
        head = head_of(
            lambda classes: build(self.architecture, self.data, self.model_dir, classes), len(self.data.classes)
        )
        if not head:
            name = self.cell.model.spec
            raise ConfigError(f"no weight of {name} depends on the number of classes; name a model that has a head")
        network = source.build()
        if weights_hash(network, source.architecture) != source.cell.weights_hash:
            raise RefereeError(f"{source.cell.model.label} gives other weights at each call; seed what it draws")
        return Pretrained(source.cell.model.spec, network.state_dict(), head)


def build(
    architecture: Architecture, data: Dataset, model_dir: Path | None, classes: int | None = None
) -> torch.nn.Module:
    """The network of ``architecture`` for images of ``data``, and for its classes where ``classes`` is no other number.

    One that comes with weights may draw, and draws the same each time.

    Of an untrained one, whoever trains it seeds the initial weights.
    """
    with global_generators(0) if architecture.trained else nullcontext():
        return architecture(classes or len(data.classes), data.test.shape, model_dir)


def weights_hash(network: torch.nn.Module, architecture: Architecture) -> str:
    """A hash of the weights that ``network`` came with, of a user's own also of what else is in it; "" for none.

    Of a service, which shows none, it is a hash of what that declares.
    """
    if said := declared_by(architecture):
        return said.identity
    if not architecture.trained:
        return ""
    return fingerprint(network) if isinstance(architecture, FromFile) else state_fingerprint(network)


class Loader:
    """Makes components from their names and keeps what is slow to make."""

    def __init__(self, data_dir: Path | None, model_dir: Path | None) -> None:
        self.data_dir, self.model_dir = data_dir, model_dir
        self._datasets: dict[str, Dataset] = {}
        self._weights: dict[tuple[str, str, int], str] = {}

    def dataset(self, text: str) -> tuple[Component, Dataset]:
        """The data set that ``text`` names."""
        source = datasets.create(text)
        if text not in self._datasets:
            self._datasets[text] = _load(text, source, self.data_dir)
        return pin(datasets.shortest(text), source, hashed=True), self._datasets[text]

    def weights_hash(
        self, text: str, architecture: Architecture, data_name: str, data: Dataset, classes: int | None = None
    ) -> str:
        """Build the network that ``text`` names once, check it against the data, and hash the weights it came with.

        A service shows none, and no plan asks it anything.
        """
        if said := declared_by(architecture):
            return said.identity
        count = classes or len(data.classes)
        if (text, data_name, count) not in self._weights:
            with torch.random.fork_rng([]):  # on the CPU
                network = build(architecture, data, self.model_dir, count)
            check_logits(network, count, data.test.shape)
            self._weights[text, data_name, count] = weights_hash(network, architecture)
        return self._weights[text, data_name, count]


def expand(suite: Suite, loader: Loader, limit: int | None = None) -> list[Task]:
    """Every cell of ``suite``, in the order that reuses networks best, each checked; equal cells come once.

    Args:
        limit: the most samples a cell gets; cells that lose some are marked ``limited``.

    Raises:
        BenchError: something in a cell makes no sense or is not there; the message says which cell.
    """
    tasks: dict[str, Task] = {}
    for grid in suite.grid:
        for model, defense, attack, seed in product(grid.model, grid.defense, grid.attack, grid.seed):
            try:
                with undisturbed(importing=True):
                    task = _task(grid, model, defense, attack, seed, loader, limit)
            except BenchError as error:
                raise type(error)(f"{grid.dataset} | {model} | {defense} | {attack}: {error}") from error
            tasks.setdefault(task.cell.key, task)
    return list(tasks.values())


def sample_ids(data: Dataset, n: int) -> tuple[int, ...]:
    """``n`` rows of the test split, ascending; a fixed choice that is nested in ``n`` and blind to the file's order."""
    order = SampleRng.create(0, torch.arange(len(data.test)), "sample ids").keys.argsort()
    return tuple(sorted(order[:n].tolist()))


def _task(
    grid: Grid, model: str, defense: str, attack_text: str, seed: int, loader: Loader, limit: int | None
) -> Task:
    data_component, data = loader.dataset(grid.dataset)
    if grid.n > len(data.test):
        raise ConfigError(f"n is {grid.n}, but {grid.dataset} has {len(data.test)} test images; lower n")
    architecture = resolve(model)
    specs = parse_chain(defense)
    made = [defenses.create(spec) for spec in specs]
    named = _by_stage([(defenses.shortest(str(spec)), made) for spec, made in zip(specs, made, strict=True)])
    chain = Chain(**{stage: component for stage, (_, component) in named.items()})  # type: ignore[arg-type]
    attack, service = attacks.create(attack_text), declared_by(architecture)
    learns, certifies = (attack.access == access for access in ("training-data", "certificate"))
    texts = {stage: text for stage, (text, _) in named.items()}
    _check_training(learns, texts, architecture, model, grid.dataset, data)
    _check_trained(chain.training, texts, model)
    if certifies:
        _check_certified(service, texts, model)
        threat = Threat(cast(Certifier, attack).norm, 0.0, "certificate")
    elif learns:
        threat = declared_threat(chain.data) if chain.data else Threat("linf", 0.0, "training-data")
    else:
        threat = _served_threat(grid, cast(Attack, attack))
    if service:
        check_service(service, chain.output, cast(Attack, attack), grid.quantise)
    n = min(grid.n, limit or grid.n)
    ids = sample_ids(data, n)
    if not len(data.train) + len(data.calibration):
        _check_fitted(attack, chain.output, grid.dataset)
    for part in (chain.training, attack):
        if part is not None and hasattr(part, "check"):
            part.check(len(data.classes), data.test.shape)
    if grid.quantise and threat.asks:
        check_levels(data.test.pixels(torch.tensor(ids)), threat)
    cell = Cell(
        dataset=data_component,
        model=pin(models.shortest(model), architecture, hashed=service is None),
        defense=tuple(pin(*part) for part in named.values()),
        attack=pin(attacks.shortest(attack_text), attack),
        threat=threat,
        ids=ids,
        seed=seed,
        numerics=grid.numerics,
        quantise=grid.quantise,
        data_hash=data.fingerprint,
        weights_hash=loader.weights_hash(model, architecture, grid.dataset, data),
        limited=n < grid.n,
    )
    return _sourced(Task(cell, data, architecture, chain, attack, loader.model_dir), grid.dataset, loader)


def _sourced(task: Task, dataset: str, loader: Loader) -> Task:
    """``task`` with the networks and the attack that its own attack names, if it names any."""
    sources = [_source(task, text, dataset, loader) for text in getattr(task.attack, "sources", ())]
    replays = _replayed(task) if getattr(task.attack, "replays", "") else None
    if not sources and replays is None:
        return task
    models = tuple(Source(source.cell.model, source.cell.weights_hash) for source in sources)
    if any(source in models[:number] for number, source in enumerate(models)):
        raise ConfigError("the attack names one source twice; name each once")
    told = {"from": " + ".join(source.model.spec for source in models)} if models else {}
    attack = rewritten(task.cell.attack, told | ({"attack": replays.spec} if replays else {}))
    cell = replace(task.cell, attack=attack, sources=models, replays=replays)
    sourced = replace(task, cell=cell, sources=tuple(sources))
    if (pretrained := sourced.pretrained()) is not None:
        pretrained.give(task.build(), head=sources[0].classes is None)  # complains where it does not fit
    return sourced


def _source(task: Task, text: str, dataset: str, loader: Loader) -> Task:
    """The network ``text``, as if it were to be attacked in place of that of ``task``."""
    architecture = resolve(text)
    if declared_by(architecture):
        raise ConfigError(f"the source {text} is a service, on which no examples can be made; name a network")
    learns = task.cell.threat.access == "training-data"
    if learns and not architecture.trained:
        raise ConfigError(
            f"the source {text} has no weights to start from; name them, as in {text.partition('(')[0]}(weights=FILE)"
        )
    _check_training(False, {}, architecture, text, dataset, task.data)
    classes = getattr(task.attack, "source_classes", None) if learns else None
    try:
        weights = loader.weights_hash(text, architecture, dataset, task.data, classes)
    except WeightsError as error:
        hint = "; or say with classes=100 how many classes it tells apart" if learns and classes is None else ""
        raise WeightsError(f"{error}{hint}") from error
    if weights and weights == task.cell.weights_hash:
        raise ConfigError(f"the source {text} is the attacked network itself; name another, or leave from= out")
    cell = replace(
        task.cell, model=pin(models.shortest(text), architecture, hashed=True), defense=(), weights_hash=weights,
        seed=task.cell.seed + (not architecture.trained),
    )  # fmt: skip
    return Task(cell, task.data, architecture, Chain(), task.attack, task.model_dir, classes=classes)


def _replayed(task: Task) -> Component:
    """The attack whose examples that of ``task`` takes."""
    text = task.attack.replays  # type: ignore[union-attr]  # the caller has looked
    made = attacks.create(text)
    if task.cell.threat.norm not in getattr(made, "norms", ()):
        raise ConfigError(f"attack={text} does not work in {task.cell.threat.norm}; change norm or attack")
    if hasattr(made, "check"):
        made.check(len(task.data.classes), task.data.test.shape)
    return pin(attacks.shortest(text), made)


def _by_stage(named: Iterable[tuple[str, Defense]]) -> dict[str, tuple[str, Defense]]:
    """Defenses by stage, in the order in which they act."""
    by_stage: dict[str, tuple[str, Defense]] = {}
    for text, component in named:
        if component.stage in by_stage:
            raise ConfigError(
                f"{by_stage[component.stage][0]} and {text} both act at the {component.stage} stage; "
                "a chain holds one defense for each stage"
            )
        by_stage[component.stage] = text, component
    return {stage: by_stage[stage] for stage in STAGES if stage in by_stage}


def _check_training(
    learns: bool, texts: dict[str, str], architecture: Architecture, model: str, dataset: str, data: Dataset
) -> None:
    """Whether what this cell trains, if anything, can be trained; ``texts`` names its defenses by stage."""
    late = [texts[stage] for stage in ("training", "output") if stage in texts]
    if learns and late:
        raise ConfigError(f"a learner trains a network of its own, so {late[0]} has no say; use data defenses or none")
    early = [texts[stage] for stage in ("data", "training") if stage in texts]
    if architecture.trained and (learns or early):
        raise ConfigError(
            f"{'the learner' if learns else early[0]} needs a network to train, but {model} comes with its weights; "
            "name an untrained model, such as resnet20 without weights"
        )
    if not architecture.trained and len(data.train) == 0:
        raise ConfigError(f"{model} has no weights and {dataset} no training images; give weights or training images")


def _check_trained(training: TrainingDefense | None, texts: dict[str, str], model: str) -> None:
    """Whether the training defense can train ``model``."""
    only = getattr(training, "trains", "")
    if only and Spec.parse(model).name != only:
        raise ConfigError(f"{texts['training']} trains the model {only} alone, not {model}; name that")


def _check_certified(service: Service | None, texts: dict[str, str], model: str) -> None:
    """Whether a certifier can prove something of what it meets, a network that answers alike whenever it is asked."""
    if service:
        raise ConfigError(f"a certifier asks a network thousands of times, and {model} is a service; name a network")
    if "output" in texts:
        raise ConfigError(
            f"a certifier proves something of a network alone, so {texts['output']} has no say; use data or training "
            "defenses, or none"
        )


def _check_fitted(attack: object, output: object, dataset: str) -> None:
    """Whether nothing has to learn on ``dataset``, which has test images alone."""
    if isinstance(attack, FittedAttack):
        raise ConfigError(
            f"this attack is fitted on other images than it attacks, and {dataset} has none; add training images"
        )
    if isinstance(output, FittedDefense):
        raise ConfigError(
            f"this output defense is trained on images that are not asked about, and {dataset} has none; add training "
            "images"
        )


def _load(text: str, source: DatasetSource, data_dir: Path | None) -> Dataset:
    """Call a data source, which may be a user's, and see that it gives a data set."""
    try:
        data: object = source(data_dir)
    except TypeError as error:
        if ".py:" not in text:
            raise
        raise ConfigError(f"data set {text!r}: {error}; it is called with the data folder") from error
    except SystemExit as error:
        raise ConfigError(f"data set {text!r} exits ({error}) where it is to give a data set") from error
    except BenchError:
        raise
    except Exception as error:
        if ".py:" not in text:
            raise
        raise ConfigError(f"data set {text!r} fails ({type(error).__name__}: {error}); mend its file") from error
    if not isinstance(data, Dataset):
        raise ConfigError(f"data set {text!r} gave a {type(data).__name__}; return a bench.dataset.Dataset")
    return data


def _served_threat(grid: Grid, attack: Attack) -> Threat:
    if grid.norm not in attack.norms:
        known = ", ".join(sorted(attack.norms))
        raise ConfigError(f"this attack works in {known}, not in {grid.norm}; change norm or attack")
    return Threat(grid.norm, grid.eps, attack.access, grid.queries)
