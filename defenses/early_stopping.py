"""Early stopping: the epoch that withstands an attack on held-out images best, and no more once it has collapsed."""

import copy
from typing import Any

import torch
from torch import nn

from bench.ascent import pgd
from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.protocols import Job
from bench.rng import SampleRng
from bench.threat import Threat
from bench.training import frozen

HELD_OUT = 512  # images of the calibration split that are looked at
STEPS, REL_STEP = 10, 0.25  # of the attack
COLLAPSE = 0.2  # of accuracy lost since the best epoch


class EarlyStopping:
    """Chooses the epoch of the highest accuracy under PGD on held-out images, the earliest of equals.

    The training ends once this accuracy has fallen by ``COLLAPSE``. The images are the first of the calibration split,
    where the code of Wong et al. takes a batch that it trains on.

    Source:
        Wong et al., 2020, arXiv:2001.03994, section 5.4; Rice et al., 2020, arXiv:2002.11569, section 3.

    Raises:
        ConfigError: the data set has no calibration images.
    """

    def __init__(self, data: Dataset, eps: float, job: Job) -> None:
        rows = torch.arange(min(HELD_OUT, len(data.calibration)))
        if not len(rows):
            raise ConfigError(f"data set {data.name!r} has no calibration images, which early stopping looks at")
        self.x = data.calibration.pixels(rows).to(job.device)
        self.y = data.calibration.labels[rows].to(job.device)
        self.rng = SampleRng.create(job.seed, rows.to(job.device), "early stopping")
        self.threat = Threat("linf", eps, "gradients")
        self.seen = self.accuracy = -1.0  # after the last epoch, and after the best one
        self.weights: dict[str, Any] = {}

    def __call__(self, model: nn.Module, epoch: int) -> bool:
        """Look at ``model`` after ``epoch``; whether it has not collapsed."""
        with frozen(model):
            x_adv = pgd(model, self.x, self.y, self.threat, self.rng.fork(epoch), STEPS, REL_STEP)
            self.seen = float((model(x_adv).argmax(1) == self.y).float().mean())
        if self.seen > self.accuracy:
            self.accuracy, self.weights = self.seen, copy.deepcopy(model.state_dict())
        return self.seen >= self.accuracy - COLLAPSE

    def put_back(self, model: nn.Module) -> None:
        """Give ``model`` the weights of the best epoch."""
        model.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """The best epoch so far."""
        return {"accuracy": self.accuracy, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.accuracy, self.weights = state["accuracy"], state["weights"]
