"""What a model says of images when its answers count: in plain float32, random ones by a majority."""

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from bench.losses import margin
from bench.oracle.served import ServedModel
from bench.rng import SampleRng

VOTES = 16  # fresh evaluations of a random model; the majority is its prediction


class Judgement:
    """What a model says of images: its majority class, whether that is right, its margin, and the share of votes.

    ``logits`` and ``probabilities`` (B, K) are means over the votes; ``confidence`` is that in the majority class.
    """

    def __init__(self, logits: Tensor, y: Tensor) -> None:  # logits (votes, B, K)
        logits = logits.float()
        votes = logits.nan_to_num().argmax(dim=2)
        counts = one_hot(votes, logits.shape[2]).sum(dim=0)  # (B, K)
        self.prediction = counts.argmax(dim=1)
        self.correct = self.prediction == y
        self.share = (votes == y).float().mean(dim=0)
        self.margin = torch.stack([margin(one, y) for one in logits]).mean(dim=0)
        self.logits = logits.mean(dim=0)
        self.probabilities = logits.softmax(dim=2).mean(dim=0)
        self.confidence = self.probabilities.gather(1, self.prediction[:, None]).squeeze(1)
        self.nll = -_log_mean_exp(logits.log_softmax(dim=2).gather(2, y.expand(len(logits), -1)[..., None]))[:, 0]
        self.brier = (self.probabilities - one_hot(y, logits.shape[2])).square().sum(dim=1)

    @property
    def accuracy(self) -> float:
        """The share of images it gets right."""
        return float(self.correct.float().mean())

    def columns(self, when: str, scores: bool = True) -> dict[str, Tensor]:
        """What is recorded of each sample (B,), its names starting with ``when``; without ``scores``, of its class."""
        kept = {
            "pred": self.prediction, "margin": self.margin, "share": self.share,
            "confidence": self.confidence, "nll": self.nll, "brier": self.brier,
        }  # fmt: skip
        kept = kept if scores else {"pred": self.prediction, "share": self.share}
        return {f"{when}_{name}": values for name, values in kept.items()}

    def beside(self, undefended: "Judgement") -> dict[str, Tensor]:
        """What is recorded of each sample (B,) beside the ``undefended`` network."""
        return {
            "twin_pred": undefended.prediction,
            "logit_change": (self.logits - undefended.logits).norm(dim=1),
            "probability_change": (self.probabilities - undefended.probabilities).abs().sum(dim=1) / 2,
        }


def _log_mean_exp(values: Tensor) -> Tensor:
    """The logarithm of the mean over the first dimension of what ``values`` are the logarithms of."""
    return values.logsumexp(dim=0) - math.log(len(values))


@torch.no_grad()
def judge(model: ServedModel, x: Tensor, y: Tensor, rng: SampleRng) -> Judgement:
    """What ``model`` says of the images ``x`` (B, C, H, W) of classes ``y`` (B,); its streams come from ``rng``."""
    votes = VOTES if model.random else 1
    return Judgement(torch.stack([model(x, rng.fork(vote)) for vote in range(votes)]), y)
