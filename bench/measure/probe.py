"""A served model under audit: asked in many ways, each time as a fresh copy of what was deployed.

Probes meet copies of the model as it was deployed, so an audit leaves no trace in a stateful one; they use known
streams and seed every generator, so that noise is not taken for state or for coupling between rows.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from bench.measure.inside import optimisation, seeded
from bench.measure.isolated import Remote, examine
from bench.norms import project
from bench.oracle.served import ServedModel
from bench.rng import SampleRng
from bench.threat import Threat

REPEATS = 5     # answers compared for randomness
DRAWS = 16      # answers where they are found to be random
NOISES = 4      # answers to each question by which noise is measured, where there is some
MOVES = 8       # windows on the path of an image

EXACT = 1e-4    # relative difference between answers that should agree to the last bit
ROUNDED = 1e-3  # and between answers that were computed in another order


class Probe:
    """A model under audit, its twin, and the answers that several tests look at."""

    def __init__(
        self, served: ServedModel, twin: ServedModel | None, x: Tensor, y: Tensor, threat: Threat, seed: int
    ) -> None:
        self.served, self.x, self.y = served, x, y
        self._twin, self.has_twin = twin, twin is not None
        self.threat = replace(threat, eps=min(threat.eps, 1.0)) if threat.norm == "linf" else threat
        self.rows = torch.arange(len(x), device=x.device)
        self.streams = SampleRng.create(seed, self.rows, "audit")
        self.n = len(x)
        live = self.served.fresh()
        weights = examine(live.module).weights
        with optimisation() as seen:
            self.base = self.ask(x, model=live)                                     # (n, K)
        self.optimised = len(seen) + (live.module.optimised if isinstance(live.module, Remote) else 0)
        self.finite = self.base.isfinite().all(dim=1)
        self._live_on(live, weights)
        self.draws = torch.stack([self.base, *(self.ask(x, draw=draw) for draw in range(1, REPEATS))])
        self.random = not torch.equal(self.draws.nan_to_num(), self.draws[:1].nan_to_num().expand_as(self.draws))
        # What changes though the streams do not: noise from elsewhere, which hides all differences that are smaller.
        self.noise = 0.0
        if self.random:
            more = [self.ask(x, draw=draw) for draw in range(REPEATS, DRAWS)]
            self.draws = torch.cat((self.draws, torch.stack(more)))
            self.noise = float(difference(self.base, self.ask(x, noise=1)).amax())
            if self.noise > EXACT:
                self.noise = max(self.noise, *self._noises())
        self.votes = self.draws.nan_to_num().argmax(dim=2)                          # (draws, n)
        self.prediction = self.votes.mode(dim=0).values

    @property
    def twin(self) -> ServedModel:
        """The undefended network, for the tests that are asked only where there is one."""
        assert self._twin is not None
        return self._twin

    @cached_property
    def plain(self) -> Tensor:
        """Logits (n, K) of its twin."""
        return self.ask(self.x, model=self.twin)

    def ask(
        self,
        x: Tensor,
        rows: Tensor | None = None,
        *,
        draw: int = 0,
        noise: int | None = None,
        model: ServedModel | None = None,
    ) -> Tensor:
        """Logits (m, K) of ``x`` (m, C, H, W), images of the samples ``rows``, from a fresh copy of the model.

        Streams belong to a sample and a ``draw``; every generator starts from ``noise``, by default from ``draw``.
        """
        model = self.served.fresh() if model is None else model
        streams = self.streams.fork(draw)
        with seeded(model.module, draw if noise is None else noise, x.device):
            return model(x, streams if rows is None else streams[rows]).detach()

    def ask_exactly(self, rows: Tensor) -> Tensor:
        """Logits of the samples ``rows`` (m,) in float64."""
        module = copy.deepcopy(self.served.module).double()
        return self.ask(self.x[rows].double(), rows, model=replace(self.served, module=module))

    def path(self, x: Tensor, rows: Tensor) -> Iterator[Tensor]:
        """Candidates (m, C, H, W) from ``x`` on, each one window in the ball further than the one before.

        Windows are squares of a fifth of the image's side that go to an end of the ball, with one sign for each
        channel, as in the Square attack; in l2 each has the length of the radius before the candidate is projected.
        """
        channels, height, width = x.shape[1:]
        side = max(1, round(min(height, width) / 5))
        reach = self.threat.eps * (2 if self.threat.norm == "linf" else 1 / (side * math.sqrt(channels)))
        candidate = x
        for move in range(MOVES):
            rng = self.streams[rows].fork("path").fork(move)
            inside = []
            for name, length in (("row", height), ("column", width)):
                offset = torch.arange(length, device=x.device) - rng.fork(name).integers(length - side + 1)[:, None]
                inside.append((offset >= 0) & (offset < side))
            window = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]       # (m, 1, H, W)
            signs = rng.fork("signs").coins(channels)[:, :, None, None].to(x) * 2 - 1
            candidate = project(candidate + window * signs * reach, x, self.threat)
            yield candidate

    def _live_on(self, live: ServedModel, weights: tuple[str, ...]) -> None:
        """Ask the copy that ``live`` is many other things, then the same again, also in reverse order."""
        self.elsewhere = [other for _, other in zip(range(2), self.path(self.x, self.rows), strict=False)]
        self.others = [self.ask(other, draw=1, model=live) for other in self.elsewhere]
        self.others_alone = [self.ask(other, draw=1) for other in self.elsewhere]
        self.again = self.ask(self.x, model=live)
        self.reverse = self.rows.flip(0)
        self.reversed_again = self.ask(self.x[self.reverse], self.reverse, model=live)
        self.reversed = self.ask(self.x[self.reverse], self.reverse)
        now = examine(live.module).weights
        self.changed_weights = sum(one != other for one, other in zip(now, weights, strict=True))

    def _noises(self) -> Iterator[float]:
        """How far other generators move the answers to each question that tests compare, again and again.

        Answers of a small spread move the most, so it takes the same questions to say how far noise goes.
        """
        for number in range(2, NOISES + 1):
            yield float(difference(self.base, self.ask(self.x, noise=number)).amax())
        for number in range(2, NOISES + 2):
            for x, alone in zip(self.elsewhere, self.others_alone, strict=True):
                yield float(difference(alone, self.ask(x, draw=1, noise=number)).amax())

    def differs(self, a: Tensor, b: Tensor, tolerance: float) -> Tensor:
        """Which answers (B,) differ by more than ``tolerance`` and than noise does, or, where there is none, in class.
        """
        flipped = a.nan_to_num().argmax(dim=1) != b.nan_to_num().argmax(dim=1)
        return (difference(a, b) > max(tolerance, 2 * self.noise)) | (flipped & (self.noise <= tolerance))

    @property
    def hidden(self) -> str:
        """What noise hides from a test, for the end of a sentence."""
        if self.noise <= EXACT:
            return ""
        return f"; noise that no stream controls, up to {self.noise:.2g}, hides what is smaller"


def difference(a: Tensor, b: Tensor) -> Tensor:
    """How far two answers (B, K) lie apart, relative to the spread of the first over its classes: (B,) in l2.

    A NaN or an infinity is 1 away from every number, and 0 from another.
    """
    scale = (a - a.mean(dim=1, keepdim=True)).nan_to_num(0, 0, 0).norm(dim=1).clamp(min=1e-6)
    gap: Tensor = (a - b).nan_to_num(0, 0, 0).norm(dim=1) / scale
    return gap.where((a.isfinite() == b.isfinite()).all(dim=1), 1.0)


def lead(scores: Tensor) -> Tensor:
    """How far (B,) the best score of each row of ``scores`` (B, K) is above the second."""
    if scores.shape[1] < 2:  # nothing to lead
        return scores.new_full((len(scores),), torch.inf)
    best, second = scores.topk(2, dim=1).values.unbind(1)
    return best - second
