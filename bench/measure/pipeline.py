"""From the training images of a cell to what its attack meets: a released data set, or a served model."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bench import numerics
from bench.dataset import Dataset, Split
from bench.errors import ConfigError, RefereeError, ServiceError
from bench.measure.diagnostics import Watch
from bench.measure.fitting import around, as_tensors, fit_defense, to_fit
from bench.measure.isolated import Deployment, in_own_process
from bench.measure.keys import defense_key, fit_key, learner_key, recipe_key, release_key
from bench.measure.probe import ROUNDED, difference
from bench.measure.search import check_outside, in_numbers, mode_of
from bench.models.lent import Contents, changes, contents, own, restore_shared, some
from bench.models.pretrained import Pretrained
from bench.models.weights import put_weights
from bench.oracle.served import ServedModel, Target, as_module
from bench.oracle.surrogate import Surrogate
from bench.plan.tasks import Task, weights_hash
from bench.precision import Numerics
from bench.protection import check_release, declared_threat
from bench.protocols import FittedAttack, FittedDefense, Job, ServiceModel
from bench.registry import code_hash
from bench.scratch import Scratch, scratch, sweep
from bench.service import Asked, Desk, Journal
from bench.system.claims import Held, claim
from bench.system.sealed import keep_tensors, kept_tensors
from bench.system.threads import training_threads
from bench.training import initialised

Progress = Callable[[int, int], None]
COMPARED = 64  # training images on which a trained network and its stored weights must agree


class _Network(NamedTuple):
    key: str
    module: nn.Module
    contents: Contents  # as it was made


class Pipeline:
    """Builds what cells attack, on ``device``; trained networks, protected images and fits are kept in ``folder``.

    So is the unfinished work on them and on learners, until it is done. Output defenses of users' own files are served
    from a process of their own, and with ``isolate`` all are, but for attacks that need gradients through them. Every
    service is asked at one desk, whose journal is there, too; all of its questions may cost ``max_cost``.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        batch_size: int,
        *,
        isolate: bool = False,
        max_cost: float = math.inf,
    ) -> None:
        self._max_cost = max_cost
        self.folder, self.device, self.batch_size, self.isolate = folder, device, batch_size, isolate
        self._code = f"{code_hash()} torch {torch.__version__} {device.type}"  # what unfinished work must agree with
        self._last: _Network | None = None  # neighbouring cells share their network
        self._released: tuple[str, Split] | None = None  # and their released training images
        self._desks: dict[str, Desk] = {}

    @contextmanager
    def serving(self, task: Task) -> Iterator[Target]:
        """What the attack of ``task`` meets, each model with a network of its own.

        Raises:
            RefereeError: when the context ends, the network of ``task`` or its data are not what they were.
        """
        mode = mode_of(task, self.device)
        fitted = self.fitted(task, lambda done, total: None)
        sources = tuple(self.undefended(source, "plain") for source in task.sources)
        with self._lending(task), self._defended(task, mode) as (searched, plain):
            check_outside(task, searched, plain, self.device)
            bare = task.service and task.chain.output is None  # there is nothing behind it
            fast, undefended = (None if bare else self.undefended(task, each) for each in (mode, "plain"))
            yield Target(searched, plain, fast, undefended, sources, self.isolates(task), fitted)

    @contextmanager
    def bare(self, task: Task) -> Iterator[ServedModel]:
        """The network of ``task`` by itself in plain numbers, in which what is proven of it holds.

        Raises:
            RefereeError: when the context ends, the network of ``task`` or its data are not what they were.
        """
        with self._lending(task):
            yield self.undefended(task, "plain")

    @contextmanager
    def _lending(self, task: Task) -> Iterator[None]:
        """Have the network of ``task`` ready to be copied, and see afterwards that it and the data are what they were.
        """
        self.train(task, lambda done, total: None)
        assert self._last is not None
        try:
            with _unchanged(task, self._last.module, self._last.contents):
                yield
        except BaseException:
            self._last = None  # the next cell makes its own
            raise
        self.check_data(task)

    def isolates(self, task: Task) -> bool:
        """Whether the output defense of ``task`` is served from a process of its own, which reaches no service."""
        if task.service:
            return False
        theirs = any(part.stage == "output" and part.of_a_file for part in task.cell.defense)
        return (theirs or (self.isolate and task.chain.output is not None)) and task.cell.threat.access != "gradients"

    @contextmanager
    def _defended(self, task: Task, mode: Numerics) -> Iterator[tuple[ServedModel, ServedModel]]:
        """The deployed model of ``task`` in the numbers of ``mode``, which attacks search in, and in plain ones."""
        defense = task.chain.output
        if defense is None or not self.isolates(task):
            yield self.served(task, mode), self.served(task, "plain")
            return
        modes: tuple[Numerics, ...] = (mode, "plain")
        searched, plain = (in_numbers(task, self._own_network(task), each, self.device) for each in modes)
        deployment = Deployment(
            defense, (searched.module, plain.module), task.data.calibration, task.cell.seed, self.batch_size,
            self.device, task.cell.defense_label, self.fitted_defense(task),
        )  # fmt: skip
        with in_own_process(deployment) as modules:
            one, other = (
                ServedModel(module, defense.random, self.batch_size, converted.facts)
                for module, converted in zip(modules, (searched, plain), strict=True)
            )
            yield one, other

    def served(self, task: Task, mode: Numerics) -> ServedModel:
        """The deployed model of ``task``: its network in the numbers of ``mode``, its output defense around it."""
        fitted, network = self.fitted_defense(task), self._own_network(task)
        return deploy(task, network, mode, self.device, self.batch_size, self.desk(task), fitted)

    def undefended(self, task: Task, mode: Numerics) -> ServedModel:
        """The network of ``task`` without its output defense."""
        converted = in_numbers(task, self._own_network(task), mode, self.device)
        return ServedModel(
            converted.module, batch_size=self.batch_size, numbers=converted.facts, desk=self.desk(task)
        )

    def desk(self, task: Task) -> Desk | None:
        """Where the service that is the model of ``task`` is asked; ``None`` for a network."""
        if task.service is None:
            return None
        key = recipe_key(task)
        if key not in self._desks:
            journal = Journal(self.folder / f"{key}.journal.jsonl", asdict(task.cell.model))
            line = cast(ServiceModel, task.architecture).line()
            self._desks[key] = Desk(line, len(task.data.classes), journal, self._max_cost)
        return self._desks[key]

    @property
    def journals(self) -> list[Journal]:
        """What has been asked of each service that this run has met."""
        return [desk.journal for desk in self._desks.values()]

    def try_services(self, tasks: Iterable[Task]) -> None:
        """Ask each service of ``tasks`` about two grey images, once for all runs here, before slow work starts.

        Raises:
            ConfigError: it does not answer as it declares.
        """
        for key, task in {recipe_key(task): task for task in tasks if task.service}.items():
            desk = self.desk(task)
            assert desk is not None
            try:
                with self._asking(desk, key, "trial"):
                    desk.logits(torch.full((2, *task.data.test.shape), 0.5))
            except Held:  # by a run that has tried it
                continue
            except ServiceError as error:
                raise ConfigError(f"{task.cell.model.spec}: {error}") from None

    @contextmanager
    def _asking(self, desk: Desk, key: str, scope: str) -> Iterator[None]:
        """Be the only run on this folder that asks this service.

        Raises:
            Held: another one is at it.
        """
        with claim(self.folder / f"{key}.journal.lock"):
            desk.journal.refresh()
            with desk.asking(scope):
                yield
            desk.journal.forget(scope)

    def released(self, task: Task, progress: Progress) -> Dataset:
        """The data set of ``task`` as its data defense releases it; only the training split can differ."""
        if task.chain.data is None:
            return task.data
        key = release_key(task.cell)
        if self._released is None or self._released[0] != key:
            self._released = key, self._protected(task, key, progress)
        return task.data.released(self._released[1])

    def kept_release(self, task: Task) -> Split | None:
        """The released training images of ``task`` if they were made in this folder.

        Raises:
            StoreError: what is kept there is not what the defense released.
        """
        if task.chain.data is None:
            return None
        key = release_key(task.cell)
        kept = kept_tensors(self._path(key), key)
        return None if kept is None else Split(kept["images"], task.data.train.labels)

    def train(self, task: Task, progress: Progress) -> None:
        """Have the network of ``task`` ready: in memory, on disk, or by training it now."""
        key = recipe_key(task)
        if self._last is not None and self._last.key == key:
            return
        if task.architecture.trained:
            desk = self.desk(task)
            network = Asked(desk.logits) if desk else task.build()
            if weights_hash(network, task.architecture) != task.cell.weights_hash:
                raise RefereeError(f"{task.cell.model.label} gives other weights at each call; seed what it draws")
        else:
            network = self._trained(task, key, progress)
        network = numerics.plain(network.to(self.device))
        self._last = _Network(key, network, contents(network))

    def fitted(self, task: Task, progress: Progress) -> Mapping[str, Tensor] | None:
        """What the attack of ``task`` was fitted to, by now if not before; ``None`` for one that is not fitted.

        Raises:
            RefereeError: it has come to something else than tensors, or has changed data that other cells share.
        """
        if not isinstance(task.attack, FittedAttack):
            return None
        attack, cell = task.attack, task.cell

        def fit(job: Job) -> Mapping[str, Tensor]:
            model = Surrogate([self.undefended(owner, "plain").module for owner in task.sources or (task,)])
            made = to_fit(attack).fit(model.eval(), task.data.lent(), cell.threat.free, job)
            return as_tensors(made, cell.attack.label)

        return self._kept(task, fit_key(task), progress, fit)

    def fitted_defense(self, task: Task, progress: Progress = lambda done, total: None) -> Mapping[str, Tensor] | None:
        """What the output defense of ``task`` has learned, by now if not before; ``None`` for one that is not trained.

        Raises:
            RefereeError: it has learned something else than tensors, or has changed data that other cells share.
        """
        defense = task.chain.output
        if not isinstance(defense, FittedDefense):
            return None

        def fit(job: Job) -> Mapping[str, Tensor]:
            network, released = self.undefended(task, "plain").module, self.released(task, progress)
            return fit_defense(defense, network, released.lent(), job, task.cell.defense_label)

        return self._kept(task, defense_key(task), progress, fit)

    def _kept(
        self, task: Task, key: str, progress: Progress, fit: Callable[[Job], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """What ``fit`` has come to for ``task`` under this ``key``, here or in an earlier run."""
        if (kept := kept_tensors(self._path(key), key)) is not None:
            return kept
        with self._job(task, key, progress) as job:
            made = fit(job)
            self.check_data(task)
            keep_tensors(self._path(key), made, key)
        return made

    def learning(self, task: Task, progress: Progress) -> AbstractContextManager[Job]:
        """What the learner of ``task`` is given; its unfinished work is dropped when the context ends well."""
        return self._job(task, learner_key(task), progress, task.pretrained())

    @contextmanager
    def attacking(self, task: Task, positions: Sequence[int]) -> Iterator[Scratch]:
        """What is kept while the samples of ``task`` at ``positions`` are attacked; dropped when it ends well.

        Nothing for a model whose answers depend on what it was asked before.
        """
        if any("stateful" in part.traits for part in (task.cell.model, *task.cell.defense)):
            yield Scratch()
            return
        with scratch(self.folder / "unfinished" / f"{learner_key(task)}-{_piece(positions)}", self._code) as kept:
            yield kept
            kept.clear()

    @contextmanager
    def asking(self, task: Task, positions: Sequence[int]) -> Iterator[Callable[[], Mapping[str, float]]]:
        """Ask a service about the samples of ``task`` at ``positions``; gives figures of it so far.

        Raises:
            Held: another run asks it.
        """
        desk, scope = self.desk(task), f"{task.cell.key[:16]}-{_piece(positions)}"
        with self._asking(desk, recipe_key(task), scope) if desk else nullcontext():
            yield lambda: {"asked": float(desk.asked(scope))} if desk else {}

    def sweep(self, done: Iterable[Task]) -> None:
        """Drop unfinished work that nothing can go on from; learners and attacks of cells that are ``done`` need none.
        """
        ended = {learner_key(task) for task in done}

        def finished(key: str) -> bool:
            return key.partition("-")[0] in ended or self._path(key).exists()

        sweep(self.folder / "unfinished", self._code, finished)

    @contextmanager
    def _job(self, task: Task, key: str, progress: Progress, start: Pretrained | None = None) -> Iterator[Job]:
        sample = initialised(task.build, Job(task.cell.seed))
        with scratch(self.folder / "unfinished" / key, self._code) as kept, training_threads():
            with _unchanged(task, sample, contents(sample)):
                yield Job(task.cell.seed, self.device, progress, scratch=kept, pretrained=start)
            kept.clear()

    def _own_network(self, task: Task) -> nn.Module:
        """A copy of the network of ``task``, to be changed at will."""
        self.train(task, lambda done, total: None)
        assert self._last is not None
        return own(self._last.module, task.build)

    def check_data(self, task: Task) -> None:
        """Whether the data set of ``task``, which other cells share, is what it was.

        Raises:
            RefereeError: it is not.
        """
        if replace(task.data).fingerprint != task.cell.data_hash:  # a new object, which has no hash yet
            raise RefereeError(f"{task.cell} has changed images or labels of the data set that other cells share")

    def _trained(self, task: Task, key: str, progress: Progress) -> nn.Module:
        path = self._path(key)
        if (kept := kept_tensors(path, key)) is not None:
            stored: nn.Module = task.build()
            put_weights(stored, kept, path)
            return stored
        recipe: Any = task.trainer
        released = self.released(task, progress)
        with self._job(task, key, progress) as job:
            watch = _diagnostics(task, released, job)
            looked_at = replace(job, watch=watch, note=watch.note) if watch else job
            learned = as_module(recipe(task.build, released.lent(), looked_at), _trainer(task))
            seen = task.data.train.pixels(slice(COMPARED))
            fresh = partial(initialised, task.build, Job(task.cell.seed))
            network = kept_weights(learned.cpu().eval(), fresh, seen, _trainer(task))
            self.check_data(task)
            if watch is not None and watch.epochs:
                keep_tensors(self._curves(key), watch.columns(), key)
            keep_tensors(path, network.state_dict(), key)
        return network

    def curves(self, task: Task) -> list[dict[str, float]]:
        """What was seen after each epoch when the network of ``task`` was trained here by a training defense.

        Raises:
            StoreError: what is kept of it is not what was written.
        """
        if task.chain.training is None:
            return []
        key = recipe_key(task)
        columns = kept_tensors(self._curves(key), key) or {}
        lines = zip(*(values.tolist() for values in columns.values()), strict=True)
        return [dict(zip(columns, line, strict=True)) for line in lines]

    def _protected(self, task: Task, key: str, progress: Progress) -> Split:
        if (kept := self.kept_release(task)) is not None:
            return kept
        defense = task.chain.data
        assert defense is not None
        with self._job(task, key, progress) as job:
            protected = check_release(defense(task.data.lent(), job), task.data.train, declared_threat(defense))
            self.check_data(task)
            keep_tensors(self._path(key), {"images": protected.images}, key)
        return protected

    def has_network(self, task: Task) -> bool:
        """Whether the network of ``task`` has been trained here."""
        return self.has(recipe_key(task))

    def has(self, key: str) -> bool:
        """Whether what the recipe ``key`` makes is kept here."""
        return self._path(key).is_file()

    def made_for(self, task: Task) -> list[Path]:
        """The files of the trained network and the released images of ``task`` and of what its attack and its output
        defense were fitted to, as far as they were made here.
        """
        keys = [recipe_key(task)] if task.trains else []
        keys += [release_key(task.cell)] if task.chain.data else []
        keys += [fit_key(task)] if isinstance(task.attack, FittedAttack) else []
        keys += [defense_key(task)] if isinstance(task.chain.output, FittedDefense) else []
        return [self._path(key) for key in keys if self.has(key)]

    def files(self, key: str) -> list[Path]:
        """Where what the recipe ``key`` makes is kept, and what was seen of a training; some may not be there."""
        return [self._path(key), self._curves(key)]

    def making(self, key: str) -> AbstractContextManager[None]:
        """Hold the claim of whoever makes what the recipe ``key`` makes here, on behalf of a worker elsewhere.

        Raises:
            Held: another process has it.
        """
        return claim(self.folder / "unfinished" / f"{key}.lock")  # that of its scratch

    def _path(self, key: str) -> Path:
        """Where what the recipe ``key`` made is kept."""
        return self.folder / f"{key}.safetensors"

    def _curves(self, key: str) -> Path:
        """Where what was seen of the training ``key`` is kept."""
        return self.folder / f"{key}.curves"


@contextmanager
def _unchanged(task: Task, network: nn.Module, before: Contents) -> Iterator[None]:
    """Whether all that decides the answers of ``network`` is afterwards what it was ``before``, however it ends.

    What its class and its file share with other networks is put back where it is not.

    Raises:
        RefereeError: it is not.
    """
    try:
        yield
    finally:
        now = contents(network)
        if changed := changes(before, now):
            restore_shared(before, now)
            raise RefereeError(f"{task.cell} has changed the network that other cells share: {some(changed)}")


def kept_weights(network: nn.Module, build: Callable[[], nn.Module], x: Tensor, trainer: str) -> nn.Module:
    """A network from ``build`` with the weights of ``network``: what is kept, and what a later run will find.

    Args:
        x: images (n, C, H, W) in [0, 1] on which the two are compared.
        trainer: the name of whoever trained it, for complaints.

    Raises:
        RefereeError: it does not answer as ``network`` does, which then has more to it than weights.
    """
    bare = build().eval()
    try:
        bare.load_state_dict(network.state_dict())
        with torch.no_grad():
            gap = float(difference(network(x.clone()), bare(x.clone())).amax())
    except (RuntimeError, ValueError, TypeError) as error:
        raise RefereeError(
            f"{trainer} returned another network than it was given to train ({error}); train the one from build()"
        ) from error
    if gap > ROUNDED:
        raise RefereeError(
            f"{trainer} returned a network that answers otherwise than its weights do (by {gap:.2g} of the "
            "logits): a hook, an attribute or a layer around it would be lost when it is kept; train weights alone"
        )
    return bare


def _diagnostics(task: Task, released: Dataset, job: Job) -> Watch | None:
    """Who looks at the training of ``task``: nobody where no training defense says in which ball it trains."""
    eps = getattr(task.chain.training, "eps", None)
    return Watch(released.lent(), eps, job) if isinstance(eps, float) and 0 < eps <= 1 else None


def _trainer(task: Task) -> str:
    return next((part.label for part in task.cell.defense if part.stage == "training"), "the standard training")


def deploy(
    task: Task,
    network: nn.Module,
    mode: Numerics,
    device: torch.device,
    batch_size: int,
    desk: Desk | None = None,
    fitted: Mapping[str, Tensor] | None = None,
) -> ServedModel:
    """``network``, of a service what asks at ``desk``, in the numbers of ``mode``, with the output defense of ``task``
    around it, which has learned what is ``fitted`` where it was trained."""
    converted = in_numbers(task, network, mode, device)
    served, random = converted.module, task.service is not None and task.service.random
    if (defense := task.chain.output) is not None:
        calibration = task.data.calibration.clone().to(device)
        served = around(defense, converted.module, calibration, task.cell.seed, fitted, task.cell.defense_label)
        random = defense.random
    return ServedModel(served, random=random, batch_size=batch_size, numbers=converted.facts, desk=desk)


def _piece(positions: Sequence[int]) -> str:
    """A name for these samples of a cell, ascending: where they begin, and which they are where some are left out."""
    whole = positions[-1] - positions[0] + 1 == len(positions)
    begin = f"{positions[0]:06d}"
    return begin if whole else f"{begin}-{sha256(repr(list(positions)).encode()).hexdigest()[:8]}"
