"""Per-sample losses on logits, all of them minimised by an attacker who wants the true class to lose."""

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from bench.errors import ConfigError

TINY = 1e-12  # keeps logits that are all equal from dividing by zero


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


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """The margin over the gap between the best and the third class (B,), which no scale and no shift of logits moves.

    Args:
        logits: raw scores (B, K), K >= 3. Of a logit that leads alone it says at most 1.

    Source:
        Croce and Hein, 2020, arXiv:2003.01690, equation 6, the difference of logits ratio, sign turned.
    """
    best = logits.topk(3, dim=1).values
    return margin(logits, y) / (best[:, 0] - best[:, 2] + TINY)


def unit_margin(logits: Tensor, y: Tensor) -> Tensor:
    """The margin (B,) of the logits at unit length, which no scale moves; a shift does, other than :func:`dlr`.

    Args:
        logits: raw scores (B, K), K >= 2; so it is for data of two classes, where :func:`dlr` says nothing.
    """
    length: Tensor = logits.norm(dim=1)
    return margin(logits, y) / (length + TINY)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """How far the true class leads the class ``target`` (B,), over the gap of the best to the next but one (B,).

    Args:
        logits: raw scores (B, K), K >= 4: the gap ends at the mean of the third and the fourth logit, so that it
            does not vanish as ``target`` rises to the first.

    Source:
        Croce and Hein, 2020, arXiv:2003.01690, equation 7, sign turned.
    """
    best = logits.topk(4, dim=1).values
    lead = (logits.gather(1, y[:, None]) - logits.gather(1, target[:, None])).squeeze(1)
    return lead / (best[:, 0] - (best[:, 2] + best[:, 3]) / 2 + TINY)


def probability_margin(logits: Tensor, y: Tensor) -> Tensor:
    """The margin (B,) of the softmax probabilities, in [-1, 1].

    Source:
        Xie et al., 2024, arXiv:2411.15210, the probability margin loss, sign turned.
    """
    return margin(logits.softmax(dim=1), y)


def check_classes(loss: str, classes: int, fewest: int = 3) -> None:
    """Refuse data of fewer ``classes`` than the difference of logits ratio needs.

    Raises:
        ConfigError: ``loss`` is ``dlr`` and there are not ``fewest`` classes.
    """
    if loss == "dlr" and classes < fewest:
        raise ConfigError(f"loss=dlr compares {fewest} classes, and the data have {classes}; use loss=ce")


Loss = Callable[[Tensor, Tensor], Tensor]  # logits (n, K) and labels (n,) to what is minimised (n,)

LOSSES: dict[str, Loss] = {"margin": margin, "ce": log_likelihood, "prob": probability}  # of any number of classes
WITH_DLR: dict[str, Loss] = {**LOSSES, "dlr": dlr}  # for attacks that hold data against check_classes
SCORES: dict[str, Loss] = {**WITH_DLR, "unit": unit_margin}  # and for those that need no gradient
