"""An attack against a served model, on some samples of a cell, and what came of it."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pandas as pd
import torch
from torch import Tensor

from bench.errors import RefereeError
from bench.measure.judgement import judge
from bench.measure.measured import records_of
from bench.models.lent import own
from bench.norms import lp_norm
from bench.oracle import Referee
from bench.oracle.quantise import eight_bit
from bench.oracle.served import Target
from bench.oracle.surrogate import Surrogate
from bench.plan.tasks import Task
from bench.protocols import Attack, FittedAttack
from bench.rng import SampleRng
from bench.rules import rules_of
from bench.scratch import Scratch


def attack_served(
    task: Task,
    target: Target,
    ids: list[int],
    device: torch.device,
    on_spent: Callable[[int], None] = lambda queries: None,
    scratch: Scratch | None = None,
    on_final: Callable[[Tensor], object] = lambda images: None,
) -> pd.DataFrame:
    """Attack the samples ``ids`` and measure what came of it.

    The attack meets the searched numbers through the oracle; clean images and final examples are judged in plain ones,
    and what the defense changes is measured against the undefended network, where there is one. Attacks with a
    surrogate are given that, or the networks that they name, and what they ask of those is counted together, for all
    images alike. What an attack that is fitted makes of any image is judged, too, misclassified or not. What a service
    that tells labels or the best classes leaves open, such as margins, is no column.
    Samples that are misclassified when clean fell at query 0 and are not attacked. ``on_final`` is given the final
    examples (B, C, H, W), as they were judged.

    Returns:
        One record for each sample, columns as in :func:`bench.measure.measured.records_of`.

    Raises:
        RefereeError: the attack broke a rule.
    """
    attack = cast(Attack, task.attack)
    cell = task.cell
    rows = torch.tensor(ids)
    labels = task.data.test.labels
    x, y = task.data.test.pixels(rows).to(device), labels[rows].to(device)
    keys = rows.to(device)
    noise = SampleRng.create(cell.seed, keys, "defense")

    clean = judge(target.plain, x, y, noise.fork("clean"))
    undefended = judge(target.undefended, x, y, noise) if target.undefended else None
    todo = clean.correct.nonzero().squeeze(1)
    saved = (cell.threat.query_budget or 0) * (len(ids) - len(todo))
    rules, surrogate = rules_of(attack), None
    if rules.surrogate:
        networks = target.sources or tuple(filter(None, [target.undefended]))
        owners = zip(networks, task.sources or (task,), strict=True)
        made_on = Surrogate([own(source.module, owner.build) for source, owner in owners])
        surrogate = replace(networks[0], module=made_on)
    referee = Referee(
        target.searched, x[todo], y[todo], cell.threat, noise[todo], quantise=cell.quantise, rules=rules,
        classes=len(task.data.classes), surrogate=surrogate, fitted=target.fitted,
        exact=target.plain if target.searched.coarse else None,
        scratch=scratch, attack=cell.attack.spec,
        on_spent=lambda spent: on_spent(saved + spent),
    )  # fmt: skip
    before = x[todo].clone()
    stream = SampleRng.create(cell.seed, keys[todo], f"attack {cell.attack.name}")
    x_adv = attack(referee.oracle, before, y[todo], cell.threat, stream) if len(todo) else before
    final = x.clone()
    final[todo] = referee.finish(x_adv)
    if not (torch.equal(x, task.data.test.pixels(rows).to(device)) and torch.equal(y, labels[rows].to(device))):
        raise RefereeError(f"{cell} has changed the clean images or the labels that it is measured by")
    after = judge(target.plain, final, y, noise.fork("final"))
    on_final(final)

    ledger = referee.ledger
    nearest = ledger.best_distance.where(ledger.best_distance.isfinite(), torch.nan)
    distance = torch.zeros_like(clean.margin).index_copy(0, todo, nearest)
    scores = target.plain.desk is None or target.plain.desk.service.tells_all
    table = {
        "first_hit": torch.zeros_like(y).index_copy(0, todo, ledger.first_hit),
        "forwards": torch.zeros_like(y).index_copy(0, todo, ledger.forwards),
        "backwards": torch.zeros_like(y).index_copy(0, todo, ledger.backwards),
        "best_margin": clean.margin.index_copy(0, todo, torch.minimum(ledger.best_margin, clean.margin[todo])),
        "invalid": torch.zeros_like(clean.correct).index_copy(0, todo, ledger.invalid),
        "unconfirmed": torch.zeros_like(y).index_copy(0, todo, ledger.unconfirmed),
        **clean.columns("clean", scores),
        **after.columns("final", scores),
        **(clean.beside(undefended) if undefended else {}),
        "norm_linf": lp_norm(final - x, "linf"),
        "norm_l2": lp_norm(final - x, "l2"),
        "rmse": lp_norm(final - x, "l2") / math.sqrt(x[0].numel()),
        "ball_violation": (lp_norm(final - x, cell.threat.norm) - cell.threat.eps).clamp(min=0),
        "box_violation": (final - final.clamp(0, 1)).abs().flatten(1).amax(dim=1),
        "best_distance": distance if rules.minimal else torch.full_like(distance, torch.nan),
    }
    if not scores:
        del table["best_margin"]
    if rules.surrogate and target.fitted is None:
        share = torch.zeros_like(clean.margin).index_fill(0, todo, 1 / max(len(todo), 1))
        table |= {"surrogate_forwards": made_on.forwards * share, "surrogate_backwards": made_on.backwards * share}
    if target.fitted is not None and not _remembers(task, target):
        table["applied_pred"] = _applied(task, target, x, y, noise.fork("applied"))
    stage = torch.full_like(y, -1).index_copy(0, todo, ledger.stage)
    names = [referee.stages[number] if number >= 0 else "" for number in stage.tolist()]
    return records_of(task.data.test, rows, table, task).assign(fell_to=names)


def _remembers(task: Task, target: Target) -> bool:
    """Whether a question more would change the model, or cost something."""
    return target.plain.desk is not None or any("stateful" in part.traits for part in task.cell.defense)


def _applied(task: Task, target: Target, x: Tensor, y: Tensor, noise: SampleRng) -> Tensor:
    """The class (B,) of what the attack, which is fitted, makes of each image of ``x``, misclassified or not."""
    attack, threat = cast(FittedAttack, task.attack), task.cell.threat
    assert target.fitted is not None
    moved = attack.apply(x.clone(), threat, {name: value.clone() for name, value in target.fitted.items()})
    moved = eight_bit(moved, x, threat, threat.eps) if task.cell.quantise else moved
    return judge(target.plain, moved, y, noise).prediction
