"""Whether a served model answers an attack as it answers anybody else who asks the same."""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.measure.finding import RARE, Finding
from bench.measure.isolated import Remote, untouched
from bench.measure.judgement import VOTES
from bench.measure.probe import ROUNDED, difference
from bench.oracle.served import ServedModel
from bench.rng import SampleRng, global_generators

CALLS = frozenset({1, 4, 16, 64, 256, 1024, 4096})  # of an attack, counted from 1, that are kept
FINAL = frozenset({2, 2 * VOTES})  # of who judges clean images and then final examples: those about the latter
FLAG = "answers-differ-in-attack"


class Witness:
    """Keeps some of the questions that a model is asked, and puts them again to copies that nobody has asked yet.

    A model whose answers depend on the question alone, and on the random streams that come with it, gives the same
    ones. One that counts its queries, remembers images, or tells attacks from tests, does not. Copies of a model in a
    process of its own are made in a new one.

    Args:
        calls: those that are kept, counted from 1.
        what: what they are, in the evidence.

    Raises:
        Exception: whatever copying the model raises.
    """

    def __init__(
        self, model: ServedModel, calls: Collection[int] = CALLS, what: str = "calls of an attack"
    ) -> None:
        remote = isinstance(model.module, Remote)
        self._model = model if remote else replace(model, module=copy.deepcopy(model.module))  # as it was deployed
        self._kept_calls, self._what = calls, what
        self._calls = 0
        self._kept: list[tuple[Tensor, SampleRng, Tensor]] = []

    def watch(self, model: ServedModel) -> ServedModel:
        """``model``, with some of its calls kept."""
        return _Watched(model.module, model.random, model.batch_size, model.numbers, note=self._note)

    def _note(self, x: Tensor, rng: SampleRng, logits: Tensor) -> None:
        self._calls += 1
        if self._calls in self._kept_calls:
            self._kept.append((x.detach().clone(), rng, logits.detach().clone()))

    @torch.no_grad()
    def finding(self) -> Finding:
        """The largest share of a kept call's images that are answered otherwise by copies, whatever these draw."""
        images = max((len(x) for x, _, _ in self._kept), default=0)
        try:
            with untouched(self._model.module) as module:
                model = replace(self._model, module=module)
                share = max((_changed(model, *call) for call in reversed(self._kept)), default=0.0)  # the latest first
        except (Exception, SystemExit) as error:  # the model's own code, which had an answer before
            why = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            return Finding(FLAG, True, 1.0, RARE, images, f"its copies cannot answer {self._what} ({why})")
        return Finding(
            FLAG, share > RARE, share, RARE, images,
            f"of {len(self._kept)} {self._what}, up to {share:.1%} of the images are answered otherwise by "
            "copies of the model that have answered nobody yet",
        )  # fmt: skip


def _changed(model: ServedModel, x: Tensor, rng: SampleRng, logits: Tensor) -> float:
    """The share of the images ``x`` that copies of ``model`` do not answer with ``logits``, whatever they draw."""
    again = [_copy_answers(model, seed, x, rng) for seed in (0, 1)]
    gaps = torch.stack([difference(logits, other) for other in again])
    noise = difference(*again).amax()  # of what draws numbers that belong to no sample, which has a flag of its own
    return float((gaps.amin(dim=0) > ROUNDED + 2 * noise).float().mean())


def _copy_answers(model: ServedModel, seed: int, x: Tensor, rng: SampleRng) -> Tensor:
    with global_generators(seed, x.device):
        return replace(model, module=copy.deepcopy(model.module))(x, rng)


@dataclass(frozen=True)
class _Watched(ServedModel):
    note: Callable[[Tensor, SampleRng, Tensor], None] = lambda x, rng, logits: None

    def __call__(self, x: Tensor, rng: SampleRng) -> Tensor:
        logits = super().__call__(x, rng)
        self.note(x, rng, logits)
        return logits
