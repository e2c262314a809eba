"""Per-sample losses on logits, all of them minimised by an attacker who wants the true class to lose."""

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """How far each true class leads: its logit minus the largest other logit.

    Args:
        logits: raw scores (B, K), K >= 2. Probabilities give another quantity; pass logits.
        y: true classes (B,), int64.

    Returns:
        (B,) in logit units: positive = correct, negative = misclassified, 0 = tie.

    Source:
        Carlini and Wagner, 2017, arXiv:1608.04644, objective f6, sign turned and unclipped.
    """
    true = logits.gather(1, y[:, None]).squeeze(1)                # (B,)
    other = logits.scatter(1, y[:, None], -math.inf).amax(dim=1)  # (B,) best class that is not y
    return true - other


def log_likelihood(logits: Tensor, y: Tensor) -> Tensor:
    """Minus the cross-entropy of each sample: the log-probability (B,) of its true class, at most 0."""
    return -F.cross_entropy(logits, y, reduction="none")


def probability(logits: Tensor, y: Tensor) -> Tensor:
    """The softmax probability (B,) of each true class, in [0, 1]: the confidence, as long as the sample is right.

    It orders answers as :func:`log_likelihood` does; in float32 it is exactly 1 once the class leads by about 17.
    """
    return logits.softmax(dim=1).gather(1, y[:, None]).squeeze(1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "margin": margin, "ce": log_likelihood, "prob": probability,
}  # fmt: skip
