"""What a task is searched in: which numbers, and what answers in them."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from bench import engine, numerics
from bench.cuda_graphs import CudaGraphs
from bench.errors import RefereeError
from bench.measure.inside import seeded
from bench.measure.probe import ROUNDED, difference
from bench.numerics import TORCH, Converted, Engine
from bench.oracle.served import ServedModel
from bench.plan.tasks import Task
from bench.precision import COARSE, Numerics
from bench.rng import SampleRng
from bench.rules import rules_of

ALIKE = 0.75    # share of images that a defense answers alike around either library; the rest may stand at a step
WORTH = 20_000  # queries of a cell, below which converting its network takes longer than an engine saves


def mode_of(task: Task, device: torch.device) -> Numerics:
    """The numbers that the attack of ``task`` meets on ``device``: on a GPU, fast ones are coarse.

    Coarse hits have to be confirmed by asking again, and a distance, or what answers outside the ball are asked for, is
    as exact as what it was searched in.
    """
    rules = rules_of(task.attack)
    if device.type == "cuda" and (rules.minimal or rules.roams or not answers_again(task)):
        return "plain"
    return task.cell.numerics


def answers_again(task: Task) -> bool:
    """Whether the same question, asked alone of a copy, has the same answer: not of a defense that remembers queries,
    or lets the images of a batch see each other."""
    return not any(trait in part.traits for part in task.cell.defense for trait in ("stateful", "batch-dependent"))


def in_numbers(task: Task, network: nn.Module, mode: Numerics, device: torch.device) -> Converted:
    """``network`` in the numbers of ``mode``, as far as the output defense of ``task`` can work with them.

    A service computes in numbers of its own.
    """
    if mode == "plain" or task.service:
        return Converted(numerics.plain(network))
    fold = not getattr(task.chain.output, "needs_batch_norm", False)
    images = task.data.specimens(numerics.SPECIMENS).to(device)
    if why := without_engine(task, device):
        return replace(numerics.fast(network, images, fold), engine=f"{TORCH}: {why}")
    return numerics.fast(network, images, fold, _engine_of(device))


def _engine_of(device: torch.device) -> Engine | None:
    return CudaGraphs() if device.type == "cuda" else engine.installed()


def without_engine(task: Task, device: torch.device) -> str:
    """Why no engine answers for the network of ``task`` on ``device``; empty where one does."""
    defense, threat = task.chain.output, task.cell.threat
    if threat.access == "gradients":
        return "gradients are asked for"
    if defense is not None and not getattr(defense, "outside", False):
        return "the defense may look into the network, as it does not declare outside = True"
    if not answers_again(task):
        return "the defense answers a question that is asked again otherwise, so hits could not be confirmed"
    if (threat.query_budget or 0) * len(task.cell.ids) < WORTH:
        return "too few queries"
    return "" if _engine_of(device) else "openvino is not installed"


def check_outside(task: Task, searched: ServedModel, plain: ServedModel, device: torch.device) -> None:
    """Whether the output defense of ``task`` does around an engine what it does around the ``plain`` network.

    One that declares ``outside = True`` and yet works on layers, weights or hooks would be searched without its work,
    and seem the harder to beat. A solver or rounding may make much of a rounding error on few images. In bfloat16 the
    answers of honest defenses differ by 0.1 on one image in thirty.

    Raises:
        RefereeError: it does not.
    """
    if not searched.by_engine or task.chain.output is None:
        return
    x = task.data.specimens(numerics.SPECIMENS).to(device)
    streams = SampleRng.create(task.cell.seed, torch.arange(len(x), device=device), "specimens")

    def answer(model: ServedModel) -> Tensor:
        fresh = model.fresh()
        with torch.no_grad(), seeded(fresh.module, 0, x.device):
            return fresh(x, streams)

    reference = answer(plain)
    settled = difference(reference, answer(plain)) <= ROUNDED  # others draw what no seed controls
    coarse = str(searched.numbers["used"]).startswith(COARSE)
    alike = difference(reference, answer(searched))[settled] <= (numerics.BFLOAT16 if coarse else ROUNDED)
    if len(alike) and float(alike.float().mean()) < ALIKE:
        raise RefereeError(
            f"{task.cell.defense_label} declares outside = True, and answers {int((~alike).sum())} of {len(alike)} "
            f"images otherwise where {searched.numbers['engine']} answers for its network; leave outside = True away"
        )
