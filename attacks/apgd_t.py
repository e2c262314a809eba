"""APGD-T: APGD towards one wrong class after the other."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from attacks.apgd import AutoPGD
from bench.losses import Loss, check_classes, log_likelihood, targeted_dlr
from bench.oracle import Oracle
from bench.ranges import Count
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Threat


@attacks("apgd-t")
@dataclass(frozen=True, kw_only=True)
class TargetedAPGD(AutoPGD):
    """APGD on the targeted difference of logits ratio, towards the ``targets`` likeliest wrong classes in turn.

    Finds most of what untargeted losses miss on robust models. A sample falls as soon as it is misclassified, whatever
    the class. Costs one forward pass for the ranks of the classes, and ``steps + 1`` forward and ``steps`` backward
    passes for each target, times ``eot``.

    Args:
        eot, wide_start: as of :class:`attacks.apgd.APGD`.
        loss: ``dlr``, which compares four classes, or for fewer ``ce``, the likelihood of the target.

    Source: Croce and Hein, 2020, arXiv:2003.01690, equation 7 and section 5.
    """

    targets: Count = 9
    loss: Literal["dlr", "ce"] = "dlr"

    def check(self, classes: int, shape: tuple[int, int, int]) -> None:
        """Whether the data have the classes that the loss compares."""
        check_classes(self.loss, classes, fewest=4)

    @property
    def most_queries(self) -> int:
        """Forward passes that a sample costs which never falls."""
        return self.eot + self.targets * self.restarts * self.run_queries

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns the point nearest to a boundary by the loss."""
        search = self.search(oracle, x, y, threat)
        for number, target in enumerate(rivals(oracle, x, y, self.targets, self.eot)):
            for restart in range(self.restarts):
                search.run(rng.fork(number).fork(restart), partial(self._loss, target))
        return search.best

    def _loss(self, target: Tensor, rows: Tensor) -> Loss:
        """What is minimised for the samples at ``rows``, in any number of draws each."""

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            aims = target[rows].repeat_interleave(len(logits) // max(len(rows), 1))
            return targeted_dlr(logits, y, aims) if self.loss == "dlr" else -log_likelihood(logits, aims)

        return loss


def rivals(oracle: Oracle, x: Tensor, y: Tensor, most: int, eot: int = 1) -> Tensor:
    """The ``most`` wrong classes with the largest logits, fewer if there are fewer: (classes, B), largest first.

    Asks about the clean images, each as many times as ``eot`` says; their mean counts.
    """
    points = x if eot == 1 else x[:, None].expand(-1, eot, *x.shape[1:])
    logits = oracle.scores(points).view(len(x), eot, -1).mean(dim=1)
    wrong = logits.nan_to_num().scatter(1, y[:, None], -torch.inf)
    return wrong.topk(min(most, logits.shape[1] - 1), dim=1).indices.T
