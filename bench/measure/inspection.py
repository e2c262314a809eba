"""What belongs to a served model whatever attacks it: what a query costs, and what probing it shows."""

import copy
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from hashlib import sha256
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.measure.audit import audit, confirm
from bench.measure.gradients import gradient_findings
from bench.measure.probe import ROUNDED, difference
from bench.oracle.served import ServedModel, Target
from bench.plan.tasks import Task
from bench.rng import SampleRng, global_generators

INSPECTED = 256  # images that a served model is probed with
PAID = 32  # and a service, where each question has its price
ROUNDS = 6  # of timing, the first to warm up


class Inspector:
    """Measures what belongs to a served model whatever attacks it: the ``cost`` of a query, and what probing it shows.

    It looks at each model under each threat once, however many attacks meet it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: dict[Any, tuple[dict[str, float], list[dict[str, Any]]]] = {}

    def __call__(self, task: Task, target: Target) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Figures, and findings of :mod:`bench.measure.audit` as plain values."""
        cell = task.cell
        parts = tuple((part.spec, part.version) for part in (cell.model, *cell.defense))
        model = cell.data_hash, parts, cell.weights_hash, cell.numerics, cell.seed
        key = *model, cell.threat.norm, cell.threat.eps, cell.threat.access == "gradients", cell.ids[:INSPECTED]
        if key not in self._seen:
            self._seen[key] = self._inspect(task, target, f"audit {sha256(repr(key).encode()).hexdigest()[:16]}")
        return self._seen[key]

    def _inspect(self, task: Task, target: Target, scope: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
        cell, desk = task.cell, target.plain.desk
        rows = torch.tensor(cell.ids[: PAID if desk else INSPECTED])
        x, y = task.data.test.pixels(rows).to(self._device), task.data.test.labels[rows].to(self._device)
        declared = {trait for component in (cell.model, *cell.defense) for trait in component.traits}
        if "stateful" in cell.model.traits:  # nobody can reset a service, so that its memory looks like randomness
            declared.add("random")
        with desk.asking(scope, fresh=True) if desk else nullcontext():
            findings = audit(target.plain, target.undefended, x, y, cell.threat, cell.seed, declared)
        findings += confirm(findings, declared)
        if cell.threat.access == "gradients" and target.undefended is not None:
            findings += gradient_findings(target.plain, target.undefended, x, y, cell.threat, cell.seed)
        figures = {}
        if desk:  # of which there is no copy here, to be timed or to be asked for the first time
            figures["probes"] = float(desk.asked(scope))
            return figures, [asdict(finding) for finding in findings]
        with suppress(Exception):  # the model's own code fails; the audit says of what
            rng = SampleRng.create(cell.seed, rows.to(self._device), "cost")
            figures["cost"], _ = relative_cost(target, x, rng)
        if "stateful" in declared:
            with suppress(Exception):
                figures["false_alarms"] = false_alarms(target.plain, x, SampleRng.create(cell.seed, rows, "alarms"))
        return figures, [asdict(finding) for finding in findings]


@torch.no_grad()
def false_alarms(model: ServedModel, x: Tensor, rng: SampleRng) -> float:
    """The share of the clean images ``x`` (n, C, H, W) that ``model``, which has met nobody yet, answers otherwise in a
    stream of them, each asked once, than as the first of its queries."""
    rng = SampleRng(rng.keys.to(x.device), rng.owners.to(x.device))

    def ask(rows: Tensor) -> Tensor:
        with global_generators(0, x.device):
            return replace(model, module=copy.deepcopy(model.module))(x[rows], rng[rows])

    every = torch.arange(len(x), device=x.device)
    alone = torch.cat([ask(row) for row in every.split(1)])
    return float((difference(alone, ask(every)) > ROUNDED).float().mean())


@torch.no_grad()
def relative_cost(target: Target, x: Tensor, rng: SampleRng) -> tuple[float, float]:
    """The time of a query over that of the same query without the defense, and its seconds for all of ``x``.

    Of a target that has an undefended network. Both are medians of a few forwards of ``x`` (n, C, H, W).
    """

    def seconds(model: ServedModel) -> float:
        started = time.perf_counter()
        model(x, rng)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - started

    assert target.undefended_searched is not None
    rounds = [(seconds(target.searched), seconds(target.undefended_searched)) for _ in range(ROUNDS)]
    defended, undefended = (median(times) for times in zip(*rounds[1:], strict=True))
    return defended / undefended, defended
