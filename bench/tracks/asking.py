"""Shards of cells whose attack asks a served model, measured."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from bench.declarations import is_entangled
from bench.measure.attacked import attack_served
from bench.measure.isolated import untouched
from bench.measure.measured import Measured
from bench.measure.witness import FINAL, Witness
from bench.oracle.served import Target
from bench.plan.tasks import Task
from bench.rules import rules_of
from bench.scratch import Scratch
from bench.system.process_state import seed_globals
from bench.tracks.track import Progress, Tools

ROOM = 2**24  # values of the images that are attacked at once, for the memory of attacks: 5,461 images of CIFAR


@contextmanager
def measure(task: Task, positions: Sequence[int], tools: Tools, progress: Progress) -> Iterator[Measured]:
    """The samples of a cell at ``positions``, whose attack asks a served model; see :class:`bench.tracks.track.Track`.
    """
    for needed in (*task.sources, task):
        tools.pipeline.train(needed, progress.epochs)
    tools.pipeline.fitted_defense(task, progress.epochs)
    tools.pipeline.fitted(task, progress.epochs)
    seed_globals(task.cell.seed)  # after what only the first shard has to do, so that it matters to none
    with tools.pipeline.attacking(task, positions) as kept, tools.pipeline.asking(task, positions) as asked:
        measured = _measured(task, positions, tools, progress, kept)
        yield measured._replace(figures={**measured.figures, **asked()})


def _measured(
    task: Task, positions: Sequence[int], tools: Tools, progress: Progress, kept: Scratch
) -> Measured:
    ids, opens = [task.cell.ids[position] for position in positions], positions[0] == 0
    tables: list[pd.DataFrame] = []
    finals: list[Tensor] = []

    def keep_final(images: Tensor) -> None:
        if tools.examples:
            finals.append(images.cpu())

    figures: dict[str, float] = {}
    findings: list[dict[str, Any]] = []
    with tools.pipeline.serving(task) as target, ExitStack() as held:
        deployed = _unasked(target, held) if opens else target
        witnesses = _witnesses(task, target) if opens else ()
        together = at_once(task, len(ids), tools.batch_size)
        for first in range(0, len(ids), together):
            part = ids[first : first + together]
            met = target if first or not witnesses else _watched(target, *witnesses)
            told = partial(progress.queries, first)
            tables.append(attack_served(task, met, part, tools.pipeline.device, told, kept, keep_final))
        if opens:
            figures, findings = tools.inspect(task, deployed)
            learned = tools.pipeline.fitted_defense(task)
            figures = {**figures, **_numbers("fit", target.fitted), **_numbers("defense", learned)}
            findings = [*findings, *_testimony(witnesses)]  # after all have been asked
    training = tools.pipeline.curves(task) if opens else ()
    isolated = None if task.chain.output is None else target.isolated
    records, examples = pd.concat(tables, ignore_index=True), torch.cat(finals) if finals else None
    return Measured(records, figures, findings, target.numbers, training, isolated, examples)


def at_once(task: Task, samples: int, batch_size: int) -> int:
    """How many of ``samples`` an attack works on at once, whatever a forward takes, which is ``batch_size`` images.

    As many as memory allows: then a forward is full until fewer are left than it takes, and each step of the attack
    costs its time once. No more than a forward takes where what comes of a sample depends on those beside it, where a
    service is asked, and where all that gradients need is kept until a batch has been answered.
    """
    attack = task.attack
    if getattr(attack, "whole_set", False):
        return samples
    entangled = is_entangled(attack, task.architecture, task.chain.output)
    if entangled or task.service or task.cell.threat.access == "gradients" or rules_of(attack).surrogate:
        return batch_size
    return max(batch_size, ROOM // math.prod(task.data.test.shape))


def _numbers(of: str, fitted: Mapping[str, Tensor] | None) -> dict[str, float]:
    """What an attack or a defense that was fitted says of that in single numbers, named by what they are ``of``."""
    return {f"{of}_{name}": float(value) for name, value in (fitted or {}).items() if value.ndim == 0}


def _unasked(target: Target, held: ExitStack) -> Target:
    """``target`` with a copy of its plain model that the attack cannot ask, to be probed; itself if there is none."""
    with suppress(Exception):  # copying runs the model's own code
        return replace(target, plain=replace(target.plain, module=held.enter_context(untouched(target.plain.module))))
    return target


def _witnesses(task: Task, target: Target) -> tuple[Witness, ...]:
    """Who watches the attack, and the judgement of its examples; nobody where answers are said to depend on earlier
    queries, or cannot be had twice, as those of a service."""
    if task.service or any("stateful" in defense.traits for defense in task.cell.defense):
        return ()
    with suppress(Exception):  # copying runs the model's own code
        return Witness(target.searched), Witness(target.plain, FINAL, "judgements of final examples")
    return ()


def _watched(target: Target, attack: Witness, judgement: Witness) -> Target:
    return replace(target, searched=attack.watch(target.searched), plain=judgement.watch(target.plain))


def _testimony(witnesses: Sequence[Witness]) -> list[dict[str, Any]]:
    """What the witness has seen who has seen most."""
    found = [witness.finding() for witness in witnesses]
    return [asdict(max(found, key=lambda finding: finding.statistic))] if found else []
