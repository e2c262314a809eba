"""The network of the defender's own that data defenses craft their perturbations on."""

from dataclasses import replace

import torch
from torch import nn

from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.models import resolve
from bench.protocols import Job
from bench.rng import SampleRng
from bench.training import initialised, small_images


def check_network(network: str | None) -> None:
    """Whether a defender can train ``network`` from scratch; ``None`` stands for the default.

    Raises:
        ConfigError: an unknown name, or weights that come with it.
    """
    if network is not None and resolve(network).trained:
        raise ConfigError(f"network {network!r} comes with its weights; name one that can be trained, such as resnet18")


def surrogate_job(job: Job) -> Job:
    """``job`` with a seed of its own: a learner of the same seed must not start from the defender's weights."""
    streams = SampleRng.create(job.seed, torch.zeros(1, dtype=torch.int64), "protecting network")
    return replace(job, seed=int(streams.integers(2**24)))


def surrogate(data: Dataset, network: str | None, job: Job) -> nn.Module:
    """The defender's network, untrained, on ``job.device``; ``None`` is ``cnn`` below 16 pixels, else ``resnet18``."""
    build = resolve(network or ("cnn" if small_images(data) else "resnet18"))
    return initialised(lambda: build(len(data.classes), data.train.shape, None), job).to(job.device)
