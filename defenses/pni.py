"""PNI, parametric noise injection: Gaussian noise on weights, whose strengths are trained against an adversary.

He, Rakin and Fan, CVPR 2019.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.ascent import ascend, total_cross_entropy, uniform
from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.norms import project
from bench.numerics import hooked
from bench.oracle.surrogate import Surrogate
from bench.protocols import Job, Stage
from bench.ranges import Count, Positive, Radius
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Threat
from bench.training import Recipe, fit, frozen
from defenses.streams import streams

STRENGTH = 0.25     # of the noise before training, times the deviation of a layer's weights
LARGEST = 1 << 26   # numbers that are drawn at a time


@defenses("pni")
@dataclass(frozen=True, kw_only=True)
class ParametricNoiseInjection:
    """Serve with noise on the weights of all convolutions and linear layers, of a network that was trained with it.

    The noise of a layer has the deviation of its weights, times a strength that is trained as the weights are, by the
    mean of two cross-entropies: of clean images and of those that ``steps`` steps of projected gradient ascent find
    around them. The ascent aims at what the network takes the clean images for. Weights decay, strengths do not.

    - ``random=False`` serves the same network without its noise, which tells what the noise does from what the
      adversarial training does.
    - A training draws one noise for the images of a batch, as released; when it serves, each image of each query has
      its own, so that no image's answer depends on others.
    - It goes on from the network that it defends, by the recipe of the data set; the published training begins with
      random weights, and has no adversary in its first 5 of 160 epochs.

    Args:
        eps: radius of the ascent.
        rel_step: size of its steps as a share of ``eps``; released are steps of 0.01 within 0.031.
        epochs: of training; as the data set suggests, unless given.

    Source:
        He, Rakin and Fan, CVPR 2019, arXiv:1811.09310, equations 2 to 6; the released code, noise on weights layer by
        layer.
    """

    eps: Radius = 8 / 255
    steps: Count = 7
    rel_step: Positive = 0.32
    epochs: Count | None = None
    random: bool = True

    stage: ClassVar[Stage] = "output"
    serving: ClassVar[tuple[str, ...]] = ("random",)
    needs_batch_norm: ClassVar[bool] = True  # weights that have taken in a batch-norm have other deviations
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "He, Rakin and Fan, CVPR 2019, arXiv:1811.09310"

    def fit(self, model: Surrogate, data: Dataset, job: Job) -> Mapping[str, Tensor]:
        """The weights, the statistics and the strengths, and the mean ``strength`` of the layers.

        Raises:
            ConfigError: no training images, or a network whose layers cannot be given noise.
        """
        network = with_noise(copy.deepcopy(model.originals[0])).requires_grad_(True).to(job.device)
        check_drawing(network, data.train.subset(slice(3)).to(job.device).pixels())
        recipe, strengths = Recipe.for_dataset(data, epochs=self.epochs), [layer.strength for layer in noisy(network)]
        own = {id(strength) for strength in strengths}
        optimizer = recipe.build_optimizer(weight for weight in network.parameters() if id(weight) not in own)
        optimizer.add_param_group({"params": strengths, "weight_decay": 0.0})
        fit(network, data, recipe, job, objective=self.losses, optimizer=optimizer)
        mean = torch.stack([strength.detach().abs() for strength in strengths]).mean()
        return {**network.state_dict(), "strength": mean}

    def losses(self, model: nn.Module, x: Tensor, y: Tensor, rng: SampleRng) -> Iterator[Tensor]:
        """The mean of the losses of a batch and of what the adversary makes of it."""
        batch = rng[torch.zeros(1, dtype=torch.int64, device=x.device)]  # for all of its images the same noise
        with drawing(model, batch.fork("clean")):
            logits = model(x)
        x_adv = self.perturb(model, x, logits.argmax(1), rng, batch)
        with drawing(model, batch.fork("adversarial")):
            attacked = model(x_adv)
        yield 0.5 * F.cross_entropy(logits, y) + 0.5 * F.cross_entropy(attacked, y)

    def perturb(self, model: nn.Module, x: Tensor, taken_for: Tensor, rng: SampleRng, batch: SampleRng) -> Tensor:
        """Images (B, C, H, W) of a high loss in the ball around ``x``; each step has noise of its own."""
        threat, step = Threat("linf", self.eps, "gradients"), 0
        loss = total_cross_entropy(model, taken_for)

        def under_noise(x_adv: Tensor) -> Tensor:
            nonlocal step
            step += 1
            with drawing(model, batch.fork(step)):
                return loss(x_adv)

        with frozen(model):
            start = project(x + uniform(x, self.eps, rng), x, threat)
            return ascend(under_noise, start, x, threat, self.steps, self.rel_step * self.eps)

    def __call__(self, model: nn.Module, calibration: Split, seed: int, fitted: Mapping[str, Tensor]) -> nn.Module:
        """The served model: the network with the weights that are ``fitted``.

        Raises:
            ConfigError: the network is not of the kind that they were trained for.
        """
        weights = {name: value for name, value in fitted.items() if name != "strength"}
        served = copy.deepcopy(model)
        place = next((name for name, part in served.named_modules() if _takes(part, weights)), None)
        if place is None:
            raise ConfigError("pni was trained for another network than this; train it again")
        network = with_noise(served.get_submodule(place))
        network.load_state_dict(weights)
        if place:
            served.set_submodule(place, network)
        return Noisy(served if place else network, random=self.random).requires_grad_(False).eval()


class NoisyLayer(nn.Module):
    """A convolution or a linear layer whose weights have noise while it is given streams to draw it from."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.strength = nn.Parameter(torch.full((), STRENGTH, device=layer.weight.device))
        self.apply_weights = convolution(layer) if isinstance(layer, nn.Conv2d) else linear
        self.rng: SampleRng | None = None
        self.asked = False

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of ``x`` (B, ...): with one noise for all of it, or one for each of B streams.

        Raises:
            ConfigError: what comes is not one row for each image.
        """
        self.asked = True
        if self.rng is None:
            return self.apply_weights(x, self.weight[None], self.bias)
        if len(self.rng) not in (1, len(x)):
            raise ConfigError(f"pni draws for each image, and a layer has {len(x)} rows for {len(self.rng)} images")
        deviation = self.strength * self.weight.detach().std()
        if len(self.rng) == 1:
            return self.apply_weights(x, self.weight + deviation * self._drawn(self.rng), self.bias)
        parts = torch.arange(len(x), device=x.device).split(max(1, LARGEST // self.weight.numel()))
        return torch.cat([
            self.apply_weights(x[part], self.weight + deviation * self._drawn(self.rng[part]), self.bias)
            for part in parts
        ])  # fmt: skip

    def _drawn(self, rng: SampleRng) -> Tensor:
        """Noise (B, *shape of the weight) of deviation 1."""
        return rng.normal(*self.weight.shape).to(self.weight)


Apply = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # to x (B, ...) weights (1 or B, ...), and a bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` (B, ..., D) times weights (1 or B, K, D)."""
    if len(weight) == 1:
        return F.linear(x, weight[0], bias)
    out = torch.einsum("b...d,bkd->b...k", x, weight)
    return out if bias is None else out + bias


def convolution(layer: nn.Conv2d) -> Apply:
    """What ``layer`` does, for any weights.

    Raises:
        ConfigError: it pads with something else than zeros.
    """
    if layer.padding_mode != "zeros":
        raise ConfigError(f"pni knows convolutions that pad with zeros, and this one's is {layer.padding_mode!r}")
    return partial(convolve, stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *, groups: int, **settings: Any) -> Tensor:
    """``x`` (B, C, H, W) convolved with weights (1 or B, K, C / groups, ...); those of each image are groups of it."""
    if len(weight) == 1:
        return F.conv2d(x, weight[0], bias, groups=groups, **settings)
    count = len(x)
    flat = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), groups=groups * count, **settings)
    out = flat.view(count, -1, *flat.shape[2:])
    return out if bias is None else out + bias[:, None, None]


def with_noise(network: nn.Module) -> nn.Module:
    """``network``, in place, with all of its convolutions and linear layers as :class:`NoisyLayer`.

    Raises:
        ConfigError: it has none, or some that do more than torch's own.
    """
    places = list(network.named_modules(remove_duplicate=False))  # one layer may act in several
    found = {part: name for name, part in places if isinstance(part, nn.Conv2d | nn.Linear)}
    if not found or network in found:
        raise ConfigError("pni puts noise on convolutions and linear layers inside a network, and this has none")
    for part, name in found.items():
        if type(part) not in (nn.Conv2d, nn.Linear) or hooked(part):
            raise ConfigError(
                f"pni puts noise on nn.Conv2d and nn.Linear as torch has them, and {name} is {type(part).__name__}, or "
                "has hooks; use a network of plain layers"
            )
    layers = {part: NoisyLayer(part) for part in found}
    for name, part in places:
        if part in layers:
            network.set_submodule(name, layers[part])
    return network


def check_drawing(network: nn.Module, x: Tensor) -> None:
    """Whether each layer of ``network``, when it answers about images ``x`` (B, C, H, W), draws for each of them.

    Raises:
        ConfigError: it does not: a layer is run past, or mixes images.
    """
    for count in (2, 3):  # a layer that is given something else than images has as many rows of it both times
        rng = SampleRng.create(0, torch.arange(min(count, len(x)), device=x.device), "check")
        with torch.no_grad(), drawing(network, rng):
            network(x[:count])


def noisy(network: nn.Module) -> list[NoisyLayer]:
    """Its layers with noise."""
    return [part for part in network.modules() if isinstance(part, NoisyLayer)]


@contextmanager
def drawing(network: nn.Module, rng: SampleRng) -> Iterator[None]:
    """Within, the layers of ``network`` draw their noise from ``rng``: one stream for all images, or one for each.

    Raises:
        ConfigError: at the end, where the network has not asked one of them, which was without noise then.
    """
    layers = noisy(network)
    for number, layer in enumerate(layers):
        layer.rng, layer.asked = rng.fork(number), False
    try:
        yield
    finally:
        for layer in layers:
            layer.rng = None
    if idle := [tuple(layer.weight.shape) for layer in layers if not layer.asked]:
        raise ConfigError(
            f"pni puts noise on layers when they are called, and the network answers without calling {len(idle)} of "
            f"{len(layers)} (weights {idle[0]}); use a network that calls its layers"
        )


def _takes(part: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Whether ``part`` has just these ``weights``, strengths aside."""
    return set(part.state_dict()) == {name for name in weights if not name.endswith(".strength")}


class Noisy(nn.Module):
    """``model`` under new noise for each row, or under none."""

    def __init__(self, model: nn.Module, *, random: bool) -> None:
        super().__init__()
        self.model, self.random = model, random

    def forward(self, x: Tensor, rng: SampleRng | None = None) -> Tensor:
        """Logits (B, K) of ``x`` (B, C, H, W), where it is random under the noise of the streams of ``rng``.

        Raises:
            ValueError: it is random, and there is no ``rng``, or one of another length.
        """
        if not self.random:
            return cast(Tensor, self.model(x))
        with drawing(self.model, streams(rng, x, "pni")):
            return cast(Tensor, self.model(x))
