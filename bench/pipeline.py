"""From the training images of a cell to what its attack meets: a released data set, or a served model."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import numerics
from bench.cell import Component
from bench.dataset import Dataset, Split
from bench.grid import Task
from bench.kept import keep_tensors, kept_tensors
from bench.models.weights import put_weights
from bench.numerics import Converted, Numerics
from bench.protocols import Job
from bench.registry import attacks, code_hash
from bench.scratch import scratch
from bench.served import ServedModel, Target
from bench.threads import training_threads

Progress = Callable[[int, int], None]


class Pipeline:
    """Builds what cells attack, on ``device``; trained networks and protected images are kept in ``folder``.

    So is the unfinished work on them and on learners, until it is done.
    """

    def __init__(self, folder: Path, device: torch.device, batch_size: int) -> None:
        self.folder, self.device, self.batch_size = folder, device, batch_size
        self._code = f"{code_hash()} torch {torch.__version__} {device.type}"  # what unfinished work must agree with
        self._last: tuple[str, nn.Module] | None = None  # neighbouring cells share their network
        self._released: tuple[str, Split] | None = None  # and their released training images

    def target(self, task: Task) -> Target:
        """What the attack of ``task`` meets."""
        mode = task.cell.numerics
        return Target(
            self.served(task, mode), self.served(task, "plain"),
            self.undefended(task, mode), self.undefended(task, "plain"),
        )  # fmt: skip

    def served(self, task: Task, mode: Numerics) -> ServedModel:
        """The deployed model of ``task``: its network in the numbers of ``mode``, its output defense around it."""
        return deploy(task, self._network(task), mode, self.device, self.batch_size)

    def undefended(self, task: Task, mode: Numerics) -> ServedModel:
        """The network of ``task`` without its output defense."""
        converted = _in_numbers(task, self._network(task), mode, self.device)
        return ServedModel(converted.module, batch_size=self.batch_size, numbers=converted.facts)

    def released(self, task: Task, progress: Progress) -> Dataset:
        """The data set of ``task`` as its data defense releases it; only the training split can differ."""
        if "data" not in task.chain:
            return task.data
        key = release_key(task)
        if self._released is None or self._released[0] != key:
            self._released = key, self._protected(task, key, progress)
        return task.data.released(self._released[1])

    def kept_release(self, task: Task) -> Split | None:
        """The released training images of ``task`` if they were made in this folder.

        Raises:
            StoreError: what is kept there is not what the defense released.
        """
        if "data" not in task.chain:
            return None
        key = release_key(task)
        kept = kept_tensors(self._path(key), key)
        return None if kept is None else Split(kept["images"], task.data.train.labels)

    def train(self, task: Task, progress: Progress) -> None:
        """Have the network of ``task`` ready: in memory, on disk, or by training it now."""
        key = _recipe_key(task)
        if self._last is not None and self._last[0] == key:
            return
        if task.architecture.trained:
            network = task.build()
        else:
            network = self._trained(task, key, progress)
        self._last = key, network.to(self.device).eval()

    def learning(self, task: Task, progress: Progress) -> AbstractContextManager[Job]:
        """What the learner of ``task`` is given; its unfinished work is dropped when the context ends well."""
        return self._job(task, task.cell.key[:32], progress)

    @contextmanager
    def _job(self, task: Task, key: str, progress: Progress) -> Iterator[Job]:
        with scratch(self.folder / "unfinished" / key, self._code) as kept, training_threads():
            yield Job(task.cell.seed, self.device, progress, scratch=kept)
            kept.clear()

    def _network(self, task: Task) -> nn.Module:
        self.train(task, lambda done, total: None)
        assert self._last is not None
        return self._last[1]

    def _trained(self, task: Task, key: str, progress: Progress) -> nn.Module:
        path = self._path(key)
        if (kept := kept_tensors(path, key)) is not None:
            network: nn.Module = task.build()
            put_weights(network, kept, path)
            return network
        recipe: Any = task.chain.get("training") or attacks.create("standard")
        released = self.released(task, progress)
        with self._job(task, key, progress) as job:
            network = recipe(task.build, released, job)
            keep_tensors(path, network.cpu().state_dict(), key)
        return network

    def _protected(self, task: Task, key: str, progress: Progress) -> Split:
        if (kept := self.kept_release(task)) is not None:
            return kept
        with self._job(task, key, progress) as job:
            protected: Split = task.chain["data"](task.data, job)
            keep_tensors(self._path(key), {"images": protected.images}, key)
        return protected

    def _path(self, key: str) -> Path:
        """Where what the recipe ``key`` made is kept."""
        return self.folder / f"{key}.safetensors"


def deploy(task: Task, network: nn.Module, mode: Numerics, device: torch.device, batch_size: int) -> ServedModel:
    """``network`` in the numbers of ``mode``, with the output defense of ``task`` around it."""
    converted = _in_numbers(task, network, mode, device)
    served, random = converted.module, False
    if (defense := task.chain.get("output")) is not None:
        served = defense(converted.module, task.data.calibration.to(device), task.cell.seed).eval()
        random = defense.random
    return ServedModel(served, random=random, batch_size=batch_size, numbers=converted.facts)


def _in_numbers(task: Task, network: nn.Module, mode: Numerics, device: torch.device) -> Converted:
    """``network`` in the numbers of ``mode``, as far as the output defense of ``task`` can work with them."""
    if mode == "plain":
        return Converted(numerics.plain(network))
    fold = not getattr(task.chain.get("output"), "needs_batch_norm", False)
    return numerics.fast(network, task.data.specimens(numerics.SPECIMENS).to(device), fold)


def data_defense(task: Task) -> Component | None:
    """The defense of ``task`` that releases training images, if there is one."""
    stages = zip(task.cell.defense, task.chain, strict=True)
    return next((component for component, stage in stages if stage == "data"), None)


def release_key(task: Task) -> str:
    """A hash of all that decides the protected training images of ``task``, which has a data defense."""
    defense = data_defense(task)
    assert defense is not None
    recipe = {"data": task.cell.data_hash, "defense": asdict(defense), "seed": task.cell.seed}
    return sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _recipe_key(task: Task) -> str:
    """A hash of all that decides the weights of the network of ``task``."""
    cell = task.cell
    early = [defense for defense, stage in zip(cell.defense, task.chain, strict=True) if stage != "output"]
    recipe: dict[str, Any] = {
        "data": cell.data_hash,
        "model": asdict(cell.model),
        "weights": cell.weights_hash,
        "defenses": [asdict(defense) for defense in early],
        "learner": getattr(attacks.create("standard"), "version", 1),
        "seed": cell.seed if not task.architecture.trained else 0,
    }
    return sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:32]
