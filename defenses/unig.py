"""UniG: scale the features before the last layer anew for each query, so that the gradients of samples look alike.

An attacker who follows score differences then probes a direction that all samples share, and not the one that hurts
the sample. Wu et al., ACM TIST 2023.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bench.dataset import Split
from bench.errors import ConfigError
from bench.protocols import Stage
from bench.registry import defenses
from bench.rng import SampleRng
from defenses.features import features_of, last_linear
from defenses.logits import device_of
from defenses.memory import Memory, turns
from defenses.streams import streams

Variant = Literal["batch-of-one", "as-released", "stateless"]

# Gradients to their derivative and their range; see the functions that begin with ``_from``.
Differences = Callable[[Tensor], tuple[Tensor, Tensor]]

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4  # of the released optimiser
STARTS = 100  # places among the stored images at which a stretch of them may begin


@defenses("unig")
@dataclass(frozen=True, kw_only=True)
class UniG:
    """Multiply the features before the last linear layer by a P in [1 - delta, 1 + delta], optimised at each query.

    P starts at 1 plus noise of deviation ``sigma``, then takes ``steps`` steps of SGD (momentum 0.9, weight decay 5e-4)
    of size ``lr`` that bring the gradients of the cross-entropy by the features closer together. The defaults are those
    for CIFAR-10; for ImageNet the authors take delta 0.1 and lr 1.

    - ``batch-of-one`` is the released defense of a service that gets one image at a time (``--combine``). The query and
      ``anchors`` stored images, a stretch that begins at random at each query, form a chain; each has a P of its own,
      and each compares with its neighbours, so only the first of them touches the query. Momentum goes on from query
      to query. Every sample has a deployment of its own here, so answers depend on its earlier queries and on nobody
      else's. The stored images are the first of the calibration split, where the authors keep training images.
    - ``as-released`` is the released defense of a batch: each row compares with its neighbours in it, and momentum goes
      on by row, whoever sits there. Figures depend on who shares the batch and on every query before. Rows that a batch
      does not fill count with P = 1.
    - ``stateless`` is ours, and weaker than either: each row compares with ``anchors`` fixed images whose P is 1, and
      momentum is forgotten. Rows that were stored before ``batch-of-one`` was the default have it under ``unig``.

    As it starts from noise and takes one step of a size that mostly ends at the bounds, it needs two controls:
    ``lr=0``, noise on the features alone, and ``sigma=0``, the optimisation alone. With both, or with delta 0, the
    answers are those of the undefended network. Decisions are not kept for certain.

    Gradients pass through the multiplication with P held fixed; how P depends on the image is left out (BPDA).

    Source:
        Wu et al., ACM TIST 2023, arXiv:2208.06228, and the released ``model/UniG.py``.

    Raises:
        ConfigError: a delta outside [0, 1], a negative sigma, lr or number of steps, or no anchors.
    """

    variant: Variant = "batch-of-one"
    delta: float = 0.5
    steps: int = 1
    lr: float = 10.0
    sigma: float = 0.5
    anchors: int = 5

    stage: ClassVar[Stage] = "output"
    random: ClassVar[bool] = True
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Wu et al., ACM TIST 2023, arXiv:2208.06228"

    def __post_init__(self) -> None:
        if not 0 <= self.delta <= 1:
            raise ConfigError(f"delta is {self.delta}; it is from 0 to 1, beyond which features change their sign")
        for name, value in {"sigma": self.sigma, "lr": self.lr, "steps": self.steps}.items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name} is {value}; it is zero or more, and finite")
        if self.anchors < 1:
            raise ConfigError(f"anchors is {self.anchors}; a row is compared with at least 1")

    @property
    def batch_dependent(self) -> bool:
        """Whether a row's answer depends on the rest of its batch."""
        return self.variant == "as-released"

    @property
    def stateful(self) -> bool:
        """Whether an answer depends on the queries before."""
        return self.variant != "stateless"

    @property
    def by_sample(self) -> bool:
        """Whether the queries before are those of the same sample alone."""
        return self.variant == "batch-of-one"

    def __call__(self, model: nn.Module, calibration: Split, seed: int) -> nn.Module:
        """The served model; all randomness comes with each query.

        Raises:
            ConfigError: a network that does not end in a linear layer, or fewer calibration images than anchors.
        """
        device = device_of(model)
        wanted = {"batch-of-one": STARTS + self.anchors - 1, "stateless": self.anchors, "as-released": 1}[self.variant]
        count = min(wanted, len(calibration))
        if count < self.anchors and self.variant != "as-released":
            raise ConfigError(
                f"anchors is {self.anchors} but there are {count} calibration images; lower it, or use "
                "variant=as-released, which needs none"
            )
        rows = torch.arange(count, device=calibration.images.device)
        x, y = calibration.pixels(rows).to(device), calibration.labels[rows].to(device)
        head = last_linear(model, x)
        if self.variant == "as-released":
            return Unified(model, head, self).eval()
        with torch.no_grad(), features_of(head) as seen:
            model(x)
        features = seen[0].float() if seen[0].dtype.itemsize < 4 else seen[0]
        if self.variant == "batch-of-one":
            return Unified(model, head, self, Stored(features, y)).eval()
        reference = Head.of(head, features).gradient(features, torch.ones_like(features), y).u
        return Unified(model, head, self, reference=reference).eval()


class Stored(NamedTuple):
    """Images that a service keeps to compare queries with: their features (S, D) and true classes (S,)."""

    features: Tensor
    classes: Tensor


class Gradient(NamedTuple):
    """What the closed form of one sample's gradient is made of."""

    u: Tensor  # (..., D), W^T (q - onehot), so that P * u is the gradient by the features
    q: Tensor  # (..., K), the probabilities


class Head(NamedTuple):
    """The last layer: logits ``features @ weight.T + bias``."""

    weight: Tensor  # (K, D)
    bias: Tensor | None

    @classmethod
    def of(cls, layer: nn.Linear, features: Tensor) -> "Head":
        """The layer's numbers where and as ``features`` are."""
        bias = None if layer.bias is None else layer.bias.detach().to(features)
        return cls(layer.weight.detach().to(features), bias)

    def logits(self, features: Tensor) -> Tensor:
        """(..., K) of ``features`` (..., D)."""
        return nn.functional.linear(features, self.weight, self.bias)

    def gradient(self, features: Tensor, scale: Tensor, classes: Tensor) -> Gradient:
        """For the cross-entropy of ``scale * features`` (..., D) with ``classes`` (...)."""
        q = self.logits(scale * features).softmax(dim=-1)
        return Gradient((q - nn.functional.one_hot(classes, q.shape[-1]).to(q)) @ self.weight, q)

    def pull(self, features: Tensor, scale: Tensor, gradient: Gradient, v: Tensor) -> Tensor:
        """The derivative (..., D) of ``v . (scale * u)`` by ``scale``, ``v`` (..., D) held fixed.

        ``u * v + f * W^T H W (scale * v)``, where ``H = diag(q) - q q^T`` is the derivative of the softmax.
        """
        z = (scale * v) @ self.weight.T                                            # (..., K)
        curved = gradient.q * (z - (gradient.q * z).sum(dim=-1, keepdim=True))     # H z
        return gradient.u * v + features * (curved @ self.weight)


class Unified(nn.Module):
    """``model`` with the input of ``head``, its last layer, scaled anew at each query.

    Rows are compared with the ``stored`` images, each query in a chain of its own, or else all with the gradients
    ``reference`` (A, D), or else with their neighbours in the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Linear,
        settings: UniG,
        stored: Stored | None = None,
        reference: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.settings, self.stored, self.reference = model, settings, stored, reference
        self._head = [head]  # in a list, since it is a part of the model already
        # The released optimiser's memory: of the rows so far (rows, D), and of each sample's chain.
        self.velocity: Tensor | None = None
        self.chains = Memory(1 + settings.anchors, head.in_features)

    def forward(self, x: Tensor, rng: SampleRng | None = None) -> Tensor:
        """Logits (B, K) of ``x`` (B, C, H, W) with the start of each P from the streams of ``rng``, one for each row.

        Raises:
            ValueError: no ``rng``, or one of another length.
        """
        drawn = streams(rng, x, "unig")

        def scaled(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
            features: Tensor = inputs[0]
            with torch.autocast(features.device.type, enabled=False):  # which would put P into bf16
                scale = self.scale(features.detach(), drawn)
            return (features * scale.to(features.dtype),)

        # For this call only: other cells serve the same network without this defense.
        with self._head[0].register_forward_pre_hook(scaled):
            logits: Tensor = self.model(x)
        return logits

    @torch.no_grad()
    def scale(self, features: Tensor, rng: SampleRng) -> Tensor:
        """P (B, D) for ``features`` (B, D), at least in float32."""
        f = features.float() if features.dtype.itemsize < 4 else features
        head = Head.of(self._head[0], f)
        classes = head.logits(f).argmax(dim=1)
        if self.stored is not None:
            return self._scale_alone(head, f, classes, self.stored, rng)
        scale = self._noise(rng, f.shape[1]).to(f)
        if self.reference is not None:
            return self._descend(head, f, classes, scale, torch.zeros_like(f), self._from_reference)[0]
        past = torch.zeros_like(f) if self.velocity is None else self.velocity
        present = torch.cat((past[: len(f)], past.new_zeros(max(0, len(f) - len(past)), f.shape[1])))
        scale, present = self._descend(head, f, classes, scale, present, _from_neighbours)
        absent = past[len(f) :]
        for _ in range(self.settings.steps):
            absent = MOMENTUM * absent + WEIGHT_DECAY  # rows without a sample count with P = 1
        self.velocity = torch.cat((present, absent))
        return scale

    def _scale_alone(self, head: Head, f: Tensor, classes: Tensor, stored: Stored, rng: SampleRng) -> Tensor:
        """P (B, D), each row optimised in a chain with stored images; the queries of a sample follow each other."""
        count = self.settings.anchors
        starts = rng.fork("stored").integers(len(stored.classes) - count + 1)
        chosen = starts[:, None] + torch.arange(count, device=f.device)                     # (B, A)
        features = torch.cat((f[:, None], stored.features.to(f)[chosen]), dim=1)            # (B, 1 + A, D)
        targets = torch.cat((classes[:, None], stored.classes[chosen]), dim=1)
        scale = self._noise(rng, *features.shape[1:]).to(f)
        for rows in turns(rng.owners):
            past = self.chains.recall(rng.owners[rows], like=f)
            scale[rows], now = self._descend(
                head, features[rows], targets[rows], scale[rows], past, _from_neighbours
            )
            self.chains.keep(rng.owners[rows], now)
        return scale[:, 0]

    def _noise(self, rng: SampleRng, *shape: int) -> Tensor:
        """Where each P (B, *shape) starts."""
        return 1 + self.settings.sigma * rng.normal(*shape)

    def _descend(
        self, head: Head, f: Tensor, classes: Tensor, scale: Tensor, velocity: Tensor, differences: Differences
    ) -> tuple[Tensor, Tensor]:
        """P and the optimiser's memory (..., D) after the steps of one query, from ``scale`` and ``velocity``."""
        low, high = 1 - self.settings.delta, 1 + self.settings.delta
        width: Tensor | None = None
        for _ in range(self.settings.steps):
            gradient = head.gradient(f, scale, classes)
            v, spread = differences(scale * gradient.u)
            width = spread if width is None else width  # the first, for all steps
            slope = head.pull(f, scale, gradient, v) / width.clamp(min=torch.finfo(f.dtype).tiny)
            velocity = MOMENTUM * velocity + WEIGHT_DECAY * scale + slope
            scale = (scale - self.settings.lr * velocity).clamp(low, high)
        return scale.clamp(low, high), velocity

    def _from_reference(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative (B, D) of each row's distances from the reference, and their common range (B, 1)."""
        assert self.reference is not None
        reference = self.reference.to(g)
        unit = nn.functional.normalize(g[:, None] - reference, dim=2, eps=torch.finfo(g.dtype).tiny)  # (B, A, D)
        high = torch.maximum(g.amax(dim=1, keepdim=True), reference.amax())
        low = torch.minimum(g.amin(dim=1, keepdim=True), reference.amin())
        return unit.sum(dim=1), high - low


def _from_neighbours(g: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative (..., R, D) of the distances between neighbours by each row of ``g``, and g's range (..., 1, 1).

    A row of its own has no neighbours and zero derivative; the released code fails there.
    """
    apart = g[..., :-1, :] - g[..., 1:, :]
    unit = nn.functional.normalize(apart, dim=-1, eps=torch.finfo(g.dtype).tiny)
    edge = torch.zeros_like(g[..., :1, :])
    both = torch.cat((unit, edge), dim=-2) - torch.cat((edge, unit), dim=-2)
    return both, g.amax(dim=(-2, -1), keepdim=True) - g.amin(dim=(-2, -1), keepdim=True)
