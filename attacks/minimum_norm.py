"""What minimum-norm attacks from labels share: one query at a time for every sample, each in a phase of its own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.norms import project
from bench.oracle import Oracle
from bench.rng import SampleRng
from bench.threat import Threat


class Search(ABC):
    """Where the search of each active sample stands: tensors with one row for each.

    ``x`` (n, C, H, W) are the clean images, ``y`` (n,) their classes, and ``rng`` one stream for each. ``u`` is the
    misclassified image that the search stands on, and the clean image until one is found.
    """

    def __init__(self, x: Tensor, y: Tensor, rng: SampleRng) -> None:
        self.x, self.y, self.rng = x, y, rng
        self.u = x

    @abstractmethod
    def query(self, number: int) -> Tensor:
        """The next query (n, C, H, W) of each sample, its ``number``-th, counted from 0."""

    @abstractmethod
    def learn(self, query: Tensor, wrong: Tensor) -> None:
        """Take the answers to ``query``: whether each was misclassified (n,)."""

    def keep(self, rows: Tensor) -> None:
        """Forget all samples but those at ``rows`` (n,)."""
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor | SampleRng):
                setattr(self, name, value[rows])

    def noise(self, number: int) -> Tensor:
        """An image (n, C, H, W) uniform on the box for each sample, another for each ``number``."""
        return self.rng.fork("start").fork(number).uniform(*self.x.shape[1:]).to(self.x)


def run(search: Search, oracle: Oracle, threat: Threat) -> Tensor:
    """Ask one query for each active sample at a time until the budgets end; returns ``u``, moved into the ball.

    A query without an answer counts as classified right.
    """
    x, u = search.x, search.x.clone()
    rows = torch.arange(len(x), device=x.device)
    for number in range(oracle.query_budget):
        active = oracle.active()
        if len(active) == 0:
            break
        if active is not rows:  # gather anew only when somebody has dropped out
            u[rows] = search.u
            search.keep(torch.searchsorted(rows, active))
            rows = active
        query = search.query(number)
        labels = oracle.labels(query, rows)
        search.learn(query, (labels != search.y) & (labels >= 0))
    u[rows] = search.u
    return project(u, x, threat)


def pick(phase: Tensor, options: Sequence[Tensor]) -> Tensor:
    """Each sample's own of the ``options``, (n, ...) each: the one at the number ``phase`` (n,)."""
    chosen = options[0]
    for number, option in enumerate(options[1:], start=1):
        chosen = torch.where((phase == number).view(-1, *[1] * (option.ndim - 1)), option, chosen)
    return chosen
