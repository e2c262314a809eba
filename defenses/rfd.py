"""RFD: Gaussian noise on the features of a hidden layer, drawn anew for each query. Nguyen et al., ICLR 2024."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bench.dataset import Split
from bench.errors import ConfigError
from bench.protocols import Stage
from bench.registry import defenses
from bench.rng import SampleRng
from defenses.logits import device_of
from defenses.streams import streams


class Published(NamedTuple):
    """Where noise was published for a network, told by its class and by its weights outside of linear layers."""

    network: str
    kind: str
    weights: int
    layer: str
    sigma: float | None  # none where only the place is known


# Deviations and layers as in the README of Random Logit Scaling's code, the layer of ResNet-20 as in that of RFD.
PUBLISHED = (
    Published("VGG-16", "VGG", 14_714_688, "features.28", 0.35),
    Published("ResNet-18 for 32 pixels", "ResNet", 11_168_832, "layer4", 2.5),
    Published("WideResNet-28-10", "WideResNet", 36_472_784, "block3", 0.7),
    Published("ResNet-50", "ResNet", 23_508_032, "layer4", 3.0),
    Published("ResNet-20", "ResNet", 269_072, "layer3", None),
)


@defenses("rfd")
@dataclass(frozen=True, kw_only=True)
class RandomizedFeatures:
    """Add noise of deviation ``sigma`` to what ``layer`` gives, drawn anew for each query.

    ``layer`` is the name of a module, as ``named_modules`` has it or what that ends in: ``layer4``, ``features.28``.
    Layer and deviation belong to a network. Without them, they are the published ones: of VGG-16 without batch-norm
    (the last convolution, 0.35), ResNet-18 for small images (``layer4``, 2.5), WideResNet-28-10 (``block3``, 0.7),
    ResNet-50 (``layer4``, 3), and of ResNet-20 the layer alone (``layer3``). All others need both.

    Source:
        Nguyen et al., ICLR 2024, arXiv:2310.00567; deviations from the README of Random Logit Scaling's code.

    Raises:
        ConfigError: a negative ``sigma``; when it meets a network, one that is not known, or has no such layer.
    """

    layer: str = ""
    sigma: float | None = None

    stage: ClassVar[Stage] = "output"
    random: ClassVar[bool] = True
    needs_batch_norm: ClassVar[bool] = True  # else the noise of a convolution would lie behind the batch-norm
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Nguyen et al., ICLR 2024, arXiv:2310.00567"

    def __post_init__(self) -> None:
        if self.sigma is not None and not 0 <= self.sigma < math.inf:
            raise ConfigError(f"sigma is {self.sigma}; a standard deviation is zero or more, and finite")

    def __call__(self, model: nn.Module, calibration: Split, seed: int) -> nn.Module:
        """The served model; nothing is tuned, and all randomness comes with each query.

        Raises:
            ConfigError: no published layer or deviation for this network, or ``layer`` is none that it runs.
        """
        known = published(model)
        sigma = self.sigma if self.sigma is not None or known is None else known.sigma
        ending = self.layer or (known.layer if known else "")
        if not ending or sigma is None:
            names = ", ".join(each.network for each in PUBLISHED if each.sigma is not None)
            raise ConfigError(
                f"rfd knows no {'layer' if not ending else 'sigma'} for this network, only for {names}; "
                f"write rfd(layer={ending or 'NAME'}, sigma=...)"
            )
        return NoisyFeatures(model, named(model, ending, calibration), sigma).eval()


class NoisyFeatures(nn.Module):
    """``model`` with noise on what its module ``layer`` gives."""

    def __init__(self, model: nn.Module, layer: str, sigma: float) -> None:
        super().__init__()
        self.model, self.layer, self.sigma = model, layer, sigma

    def forward(self, x: Tensor, rng: SampleRng | None = None) -> Tensor:
        """Logits (B, K) of ``x`` (B, C, H, W) under the noise that the streams of ``rng`` give, one for each row.

        Raises:
            ValueError: no ``rng``, or one of another length.
        """
        drawn = streams(rng, x, "rfd")

        def noisy(_: nn.Module, __: tuple[Any, ...], features: Tensor) -> Tensor:
            return features + drawn.normal(*features.shape[1:]).to(features) * self.sigma

        # For this call only: other cells serve the same network without this defense.
        with self.model.get_submodule(self.layer).register_forward_hook(noisy):
            logits: Tensor = self.model(x)
        return logits


def published(model: nn.Module) -> Published | None:
    """What is published for ``model``, wherever in it the network is; nothing where it is another network."""
    kinds = {type(module).__name__ for module in model.modules()}
    layers = [module for module in model.modules() if not isinstance(module, nn.Linear)]
    weights = sum(weight.numel() for layer in layers for weight in layer.parameters(recurse=False))
    return next((each for each in PUBLISHED if each.kind in kinds and each.weights == weights), None)


def named(model: nn.Module, ending: str, calibration: Split) -> str:
    """The full name of the one module of ``model`` whose name is ``ending`` or ends in it.

    Raises:
        ConfigError: there is none, or more than one, or it does not give one tensor for each calibration image.
    """
    names: list[str] = [name for name, _ in model.named_modules() if name]
    found = [name for name in names if name == ending] or [name for name in names if name.endswith(f".{ending}")]
    if len(found) != 1:
        given = f"{len(found)} modules are named so ({', '.join(found[:4])})" if found else "no module is named so"
        raise ConfigError(f"layer is {ending!r}, and {given}; this network has {', '.join(names[:12])}")
    if len(calibration):
        outputs = _outputs(model, found[0], calibration.subset(slice(1)))
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or len(outputs[0]) != 1:
            raise ConfigError(
                f"layer {found[0]!r} does not give one tensor for an image when the network answers: it ran "
                f"{len(outputs)} times; name one that runs once"
            )
    return found[0]


def _outputs(model: nn.Module, layer: str, images: Split) -> list[object]:
    """What the module ``layer`` of ``model`` gives, each time that it runs, when it is asked about ``images``."""
    seen: list[object] = []
    with torch.no_grad(), model.get_submodule(layer).register_forward_hook(lambda *call: seen.append(call[2])):
        model(images.to(device_of(model)).pixels())
    return seen
