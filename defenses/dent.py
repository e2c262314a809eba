"""DENT: refit the scales and shifts of the batch-norms to each query, until the network is sure of its answer.

Wang et al., 2021, arXiv:2105.08714.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from bench.dataset import Split
from bench.errors import ConfigError
from bench.protocols import Stage
from bench.registry import added, defenses
from defenses.adamod import AdaMod

Variant = Literal["per-sample", "as-released", "online"]

FLOOR = 1e-5  # added to probabilities under the logarithm, as in DENT's own code
# Whose settings: those in AAA's code, which AAA was compared with, or those that DENT's own code was published with.
PRESETS: dict[str, dict[str, Any]] = {
    "aaa": {"variant": "per-sample", "lr": 1e-3},
    "paper": {"variant": "as-released", "lr": 6e-3},
}


@defenses("dent")
@dataclass(frozen=True, kw_only=True)
class DENT:
    """Give each row its own copy of all batch-norm scales and shifts, and lower the entropy of its answer with them.

    ``steps`` steps of size ``lr``, from the trained values at every call. Costs ``steps`` forward and backward passes
    beside the forward pass that answers.

    The preset ``aaa`` has the settings of AAA's code, which figures beside AAA belong to: Adam, lr 0.001, the entropy
    alone. ``paper`` has those of DENT's own ``dent.yaml``: AdaMod (betas 0.99 and 0.999, beta3 0.6), lr 0.006, and the
    entropy less that of the mean prediction of the batch, which keeps the rows from all becoming sure of one class; in
    a batch of one that difference is 0, and nothing is adapted. Its authors serve batches of 128.

    - ``per-sample``: running statistics; each row lowers its own entropy, which is the released defense asked about
      one image at a time.
    - ``as-released``: running statistics; the rows lower their mean entropy. Adam forgets the factor 1 / B but for the
      1e-8 that it adds to the root of its second moment, which sure rows with their small gradients feel. So answers
      depend on how many share the batch, not on who: on the digits, 256 rows move a logit by 0.015 at most and 0.0002
      in the median, where DENT itself moves it by 0.6.
    - ``online``: the statistics of the query batch, and the mean entropy; answers depend on everybody in it. Another
      public code, UniG's, compares with this one.

    Decisions are not kept for certain. Without steps the answers are those of the undefended network, save online.

    Gradients pass through the adapted network with the adapted values held fixed; how they depend on the image is left
    out (BPDA).

    Source:
        arXiv:2105.08714 and its public code (``dent.yaml``, ``dent.py``); settings and variants also as in the public
        codes of AAA (``dent.py``) and UniG.

    Raises:
        ConfigError: a negative number of steps or lr, or the preset ``paper`` for rows by themselves.
    """

    variant: Variant | None = None
    steps: int = 6
    lr: float | None = None
    preset: Literal["aaa", "paper"] = added("aaa")

    stage: ClassVar[Stage] = "output"
    random: ClassVar[bool] = False
    needs_batch_norm: ClassVar[bool] = True
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Wang et al., 2021, arXiv:2105.08714"

    def __post_init__(self) -> None:
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, value in {"steps": self.steps, "lr": self.lr}.items():
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"{name} is {value}; it is zero or more, and finite")
        if self.preset == "paper" and self.variant == "per-sample":
            raise ConfigError("preset=paper adapts nothing in a batch of one; use variant=as-released or preset=aaa")

    @property
    def batch_dependent(self) -> bool:
        """Whether a row's answer depends on the rest of its batch."""
        return self.variant != "per-sample"

    def __call__(self, model: nn.Module, calibration: Split, seed: int) -> nn.Module:
        """The served model; nothing is tuned beforehand.

        Raises:
            ConfigError: a network without batch-norms that scale and shift.
        """
        return Adapted(model, self).eval()


class Adapted(nn.Module):
    """``model`` with batch-norm scales and shifts that are fitted to each query."""

    def __init__(self, model: nn.Module, settings: DENT) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        # A plain list: they are parts of the model already.
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine]
        if not self._norms:
            raise ConfigError(
                "dent adapts the scales and shifts of BatchNorm layers, and this network has none; use a network with "
                "BatchNorm, such as resnet20"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of ``x`` (B, C, H, W)."""
        if self.settings.steps == 0 and self.settings.variant != "online":  # the same sums in another order else
            return self.model(x)  # type: ignore[no-any-return]
        return self._answer(x, self._adapt(x.detach()))

    @torch.enable_grad()  # whoever asks may have switched gradients off
    def _adapt(self, x: Tensor) -> list[Tensor]:
        """The scale and the shift (B, C) of each layer in turn, fitted to ``x``."""
        trained = (part for norm in self._norms for part in (norm.weight, norm.bias))
        affine = [part.detach().expand(len(x), -1).clone().requires_grad_(True) for part in trained]
        assert self.settings.lr is not None
        paper = self.settings.preset == "paper"
        optimizer: torch.optim.Optimizer = torch.optim.Adam(affine, lr=self.settings.lr)
        if paper:
            optimizer = AdaMod(affine, lr=self.settings.lr, betas=(0.99, 0.999), beta3=0.6)
        share = 1 / len(x) if self.settings.batch_dependent else 1.0
        for _ in range(self.settings.steps):
            logits = self._answer(x, affine)
            loss = doubt(logits) if paper else share * entropy(logits).sum()
            gradients = torch.autograd.grad(loss, affine, allow_unused=True)  # a layer may be there for training only
            for values, gradient in zip(affine, gradients, strict=True):
                values.grad = gradient
            optimizer.step()
        return [values.detach() for values in affine]

    def _answer(self, x: Tensor, affine: list[Tensor]) -> Tensor:
        pairs = zip(affine[::2], affine[1::2], strict=True)
        by_layer = {id(norm.weight): pair for norm, pair in zip(self._norms, pairs, strict=True)}
        with _RowWise(by_layer, online=self.settings.variant == "online"):
            logits: Tensor = self.model(x)
        return logits


class _RowWise(TorchFunctionMode):
    """While open, batch-norms scale and shift each row by values of its own, found by the ``id`` of their weight.

    It steps in where layers call :func:`torch.nn.functional.batch_norm`. So it serves every kind of batch-norm layer,
    those with an activation inside, too, and leaves the network, which other cells share, as it is.
    """

    def __init__(self, affine: dict[int, tuple[Tensor, Tensor]], online: bool) -> None:
        super().__init__()
        self.affine, self.online = affine, online

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or what stands in for it."""
        called = self.batch_norm if func is F.batch_norm else func
        return called(*args, **(kwargs or {}))

    def batch_norm(
        self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        """Of ``x`` (B, C, ...), under the names of :func:`torch.nn.functional.batch_norm`."""
        scale, shift = self.affine.get(id(weight), (weight, bias))
        if self.online:
            # Unlike F.batch_norm, it takes a single value, too, and gives 0.
            normal: Tensor = torch.native_batch_norm(x, None, None, None, None, True, momentum, eps)[0]
        elif running_mean is None or running_var is None or scale is weight:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        else:
            normal = (x - _spread(running_mean, x)) * _spread((running_var + eps).rsqrt(), x)
        if scale is not None and shift is not None:
            normal = normal * _spread(scale, x) + _spread(shift, x)
        return normal.to(x.dtype)


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """``values`` (C,) or (B, C), to broadcast over ``x`` (B, C, ...)."""
    return values.reshape(-1, x.shape[1], *(1,) * (x.ndim - 2))


def doubt(logits: Tensor) -> Tensor:
    """The mean entropy (), in nats, of the predictions ``logits`` (B, K), less the entropy of their mean."""
    p = logits.softmax(dim=1)
    mean = p.mean(dim=0)
    return (mean * (mean + FLOOR).log()).sum() - (p * (p + FLOOR).log()).sum(dim=1).mean()


def entropy(logits: Tensor) -> Tensor:
    """The entropy (B,), in nats, of the predictions ``logits`` (B, K)."""
    return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)
