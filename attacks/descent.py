"""The descent that PGD and PMA share: steps down a loss, each projected onto the ball, and the best point of all."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.losses import Loss
from bench.norms import per_sample, project, steepest
from bench.oracle import Oracle
from bench.threat import Threat


class Descent:
    """Descents of the samples ``x`` (B, C, H, W) of classes ``y`` (B,); each sample stops at its first success.

    Args:
        value: ``value(logits, y) -> (n,)``, by whose lowest value the ``best`` point (B, C, H, W) is chosen.
    """

    def __init__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, value: Loss) -> None:
        self.oracle, self.x, self.y, self.threat, self.value = oracle, x, y, threat, value
        self.best = x.clone()
        self.lowest = torch.full(x.shape[:1], torch.inf, dtype=x.dtype, device=x.device)

    def run(self, start: Tensor, steps: int, loss: Callable[[int], Loss], size: Callable[[int], float]) -> bool:
        """Take ``steps`` steps from ``start`` (B, C, H, W), and ask about where the last one ends.

        Args:
            loss: what step 0, 1, ... goes down.
            size: its length as a share of eps.

        Returns:
            Whether any sample stands; ``start`` is changed.
        """
        for step in range(steps + 1):
            rows = self.oracle.active()
            if len(rows) == 0:
                return False
            now = start[rows]
            if step < steps:
                logits, gradient = self.oracle.gradients(now, loss(step), rows)
                move = size(step) * self.threat.eps * steepest(gradient, self.threat.norm)
                start[rows] = project(now - move, self.x[rows], self.threat)
            else:
                logits = self.oracle.scores(now, rows)
            value = self.value(logits, self.y[rows]).to(self.x.dtype)
            better = value < self.lowest[rows]  # never for NaN, the answer to those who get none
            self.best[rows] = torch.where(per_sample(better), now, self.best[rows])
            self.lowest[rows] = torch.where(better, value, self.lowest[rows])
        return True
