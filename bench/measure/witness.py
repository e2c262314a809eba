"""Whether a served model answers an attack as it answers anybody else who asks the same."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.measure.audit import RARE, ROUNDED, Finding, difference
from bench.oracle.served import ServedModel
from bench.rng import SampleRng, global_generators

CALLS = frozenset({1, 4, 16, 64, 256, 1024, 4096})  # of an attack, counted from 1, that are kept
FLAG = "answers-differ-in-attack"


class Witness:
    """Keeps some of the questions that an attack asks, and puts them again to copies that nobody has asked yet.

    A model whose answers depend on the question alone, and on the random streams that come with it, gives the same
    ones. One that counts its queries, or tells attacks from tests, does not.

    Raises:
        Exception: whatever copying the model raises.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = replace(model, module=copy.deepcopy(model.module))
        self._calls = 0
        self._kept: list[tuple[Tensor, SampleRng, Tensor]] = []

    def watch(self, model: ServedModel) -> ServedModel:
        """``model``, with some of its calls kept."""
        return _Watched(model.module, model.random, model.batch_size, model.numbers, self._note)

    def _note(self, x: Tensor, rng: SampleRng, logits: Tensor) -> None:
        self._calls += 1
        if self._calls in CALLS:
            self._kept.append((x.detach().clone(), rng, logits.detach().clone()))

    @torch.no_grad()
    def finding(self) -> Finding:
        """The largest share of a kept call's images that are answered otherwise by copies, whatever these draw."""
        images = max((len(x) for x, _, _ in self._kept), default=0)
        try:
            share = max((self._changed(*call) for call in self._kept), default=0.0)
        except (Exception, SystemExit) as error:  # the model's own code, which had an answer for the attack
            why = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            return Finding(FLAG, True, 1.0, RARE, images, f"its copies cannot answer what an attack asked ({why})")
        return Finding(
            FLAG, share > RARE, share, RARE, images,
            f"of {len(self._kept)} calls of an attack, up to {share:.1%} of the images are answered otherwise by "
            "copies of the model that have answered nobody yet",
        )  # fmt: skip

    def _changed(self, x: Tensor, rng: SampleRng, logits: Tensor) -> float:
        """The share of the images ``x`` that copies do not answer with ``logits``, whatever they draw."""
        again = [self._fresh(seed, x, rng) for seed in (0, 1)]
        gaps = torch.stack([difference(logits, other) for other in again])
        noise = difference(*again).amax()  # of what draws numbers that belong to no sample, which has a flag of its own
        return float((gaps.amin(dim=0) > ROUNDED + 2 * noise).float().mean())

    def _fresh(self, seed: int, x: Tensor, rng: SampleRng) -> Tensor:
        model = replace(self._model, module=copy.deepcopy(self._model.module))
        with global_generators(seed, x.device):
            return model(x, rng)


@dataclass(frozen=True)
class _Watched(ServedModel):
    note: Callable[[Tensor, SampleRng, Tensor], None] = lambda x, rng, logits: None

    def __call__(self, x: Tensor, rng: SampleRng) -> Tensor:
        logits = super().__call__(x, rng)
        self.note(x, rng, logits)
        return logits
