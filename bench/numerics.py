"""The numbers that a network computes in: plain for what is reported, fast for what is searched.

Fast numbers are used only where they have been compared with plain ones on real images; wherever anything speaks
against them, the network is served as it is.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bench.precision import COARSE

# By default torch rounds what a GPU's convolutions multiply to the 10 bits of TF32; plain is float32 to the last bit.
torch.backends.cudnn.allow_tf32 = False

SPECIMENS = 32  # images that fast and plain numbers are compared on
WATCHED = 2  # images that show which layers follow which
REPEATS = 1e-5  # the largest difference between two plain answers, as a share of the spread of all logits
FLOAT32 = 1e-3  # the largest that another order of float32 sums explains
ENGINE = 1e-4  # and of an engine, which might round to 10 bits without a word
BFLOAT16 = 0.1  # the largest that bfloat16 explains
TORCH = "torch"  # whose forward answers where no engine does


class Engine(Protocol):
    """What answers for networks in place of torch's own forward, in the numbers that they compute in."""

    @property
    def name(self) -> str:
        """It, and of another library its version."""
        ...

    def __call__(self, network: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
        """What gives the logits (B, K) of frozen ``network``, as it is now, to images (B, C, H, W) like ``images``.

        Raises:
            Exception: it cannot.
        """
        ...


@dataclass(frozen=True)
class Converted:
    """A network in the numbers that attacks search in.

    ``used`` says which, ``difference`` is the largest that was seen between a logit of its and a plain one, and
    ``reason`` says why it is not in faster ones, where something spoke against them. ``engine`` is what answers; where
    that is torch's own forward, it may say why.
    """

    module: nn.Module
    used: str = "float32"
    difference: float = 0.0
    reason: str = ""
    engine: str = TORCH

    @property
    def facts(self) -> dict[str, Any]:
        """What a row remembers of it, as plain values."""
        return {"used": self.used, "difference": self.difference, "reason": self.reason, "engine": self.engine}


def plain(network: nn.Module) -> nn.Module:
    """``network`` as it is, frozen and in eval mode: float32, every layer by itself."""
    network.eval()  # a user's own train() may return nothing
    for parameter in network.parameters():  # scripted networks have no requires_grad_ of their own
        parameter.requires_grad_(False)
    return network


@contextmanager
def tf32() -> Iterator[None]:
    """While open, a GPU's convolutions may round to TF32, as the steps of a training bear it; a CPU's never do."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def fast(network: nn.Module, images: Tensor, fold: bool = True, engine: Engine | None = None) -> Converted:
    """A copy of ``network`` that answers sooner: batch-norm folded into convolutions, channels last, bf16 on a GPU, and
    an ``engine`` in place of torch's forward.

    Each of these is kept only where the logits of ``images`` agree with plain ones, asked twice, since a network may
    draw numbers of its own. What cannot be copied, or answers differently each time, is served in plain numbers.

    Args:
        network: logits (B, K) from images (B, C, H, W); left as it was.
        images: real images (B, C, H, W) in [0, 1], on its device. Without any, the copy is in plain numbers.
        fold: whether batch-norms may be folded; not for defenses that work on them.
        engine: answers wherever no gradient is asked for; not for defenses that look into networks.
    """
    network.eval()
    try:
        reference = plain(copy.deepcopy(network))
    except Exception as error:  # copying runs the network's own Python, which may raise anything at all
        return Converted(plain(network), reason=f"it cannot be copied ({_named(error)})")
    with torch.no_grad(), torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        try:
            logits, again = reference(images.clone()), reference(images.clone())  # it may write into them
            spread, noise = float(logits.max() - logits.min()), _distance(logits, again)
        except Exception as error:
            return Converted(plain(copy.deepcopy(network)), reason=f"it fails on real images ({_named(error)})")
        if not noise <= REPEATS * spread:  # NaN is not
            return Converted(plain(copy.deepcopy(network)), reason=f"its answers to one question differ by {noise:.2g}")
        reason = ""
        for folded in (True, False) if fold else (False,):
            try:
                converted = _convert(network, images, folded)
                found = [_distance(logits, converted.module(images.clone())) for _ in range(2)]
            except Exception as error:
                reason = reason or f"faster precision fails ({_named(error)})"
                continue
            if max(found) <= (BFLOAT16 if images.is_cuda else FLOAT32) * spread:
                converted = replace(converted, difference=max(found), reason=reason)
                return _by(engine, converted, reference, images, spread) if engine else converted
            reason = reason or f"faster precision changes its logits by {max(found):.2g}"
    return Converted(plain(copy.deepcopy(network)), reason=reason)


def fold_batch_norm(network: nn.Module, images: Tensor) -> int:
    """Fold into its convolution, in place, each batch-norm of ``network`` that is all a convolution's output goes to.

    The network is watched while it answers ``images`` (B, C, H, W); its own Python stays as it is. Layers that run more
    than once, carry hooks or parametrizations, or are of a kind of their own are left alone.

    Returns:
        How many were folded.
    """
    seen = _Watch()
    with torch.no_grad(), seen:
        network(images.clone())
    layers = [module for module in network.modules() if not hooked(module) and not module.training]
    convolutions = {id(layer.weight): layer for layer in layers if type(layer) is nn.Conv2d}
    norms = {id(layer.running_mean): layer for layer in layers if type(layer) is nn.BatchNorm2d}
    pairs = []
    for statistics, given in seen.norms:
        weight = seen.convolution_of.get(given)
        followed = len(seen.uses[given]) == 1
        once = seen.calls[statistics] == 1 and weight is not None and seen.calls[weight] == 1
        if statistics in norms and weight in convolutions and followed and once:
            pairs.append((convolutions[weight], norms[statistics]))
    for convolution, norm in pairs:
        fused = fuse_conv_bn_eval(convolution, norm)
        convolution.weight, convolution.bias = fused.weight, fused.bias
        for parent in list(network.modules()):
            for name, child in parent._modules.items():
                if child is norm:
                    setattr(parent, name, nn.Identity())
    return len(pairs)


def _convert(network: nn.Module, images: Tensor, folded: bool) -> Converted:
    """A copy of ``network`` in the fastest numbers that its device has, not yet compared with anything."""
    module = plain(copy.deepcopy(network))
    count = fold_batch_norm(module, images[:WATCHED]) if folded else 0
    module.to(memory_format=torch.channels_last)
    wrapped = InBfloat16(module) if images.is_cuda else _ChannelsLast(module)
    numbers = COARSE if images.is_cuda else "float32"
    return Converted(wrapped.eval(), f"{numbers}, channels last" + (f", {count} batch-norms folded" if count else ""))


def _by(
    engine: Engine, converted: Converted, reference: nn.Module, images: Tensor, spread: float
) -> Converted:
    """``converted`` with ``engine`` answering if that agrees with ``reference``, asked twice, with others in between
    and in two sizes."""
    questions = images, images[:1], images.flip(0), images
    try:
        module = _Answered(converted.module, engine(_settled(converted.module), images)).eval()
        found = [_distance(reference(asked.clone()), module(asked.clone())) for asked in questions]
    except Exception as error:  # the network's own Python may raise anything when it is traced
        why = f"{engine.name} fails ({_named(error)})"
    else:
        if all(gap <= (BFLOAT16 if images.is_cuda else ENGINE) * spread for gap in found):  # NaN is not
            return replace(converted, module=module, difference=max(found), engine=engine.name)
        why = f"{engine.name} changes its logits by {max(found):.2g}"
    return replace(converted, engine=f"{TORCH}: {why}")


def _distance(logits: Tensor, others: Tensor) -> float:
    """The largest difference of two logits; infinite for another shape, NaN only where there is one."""
    return float((logits - others).abs().max()) if logits.shape == others.shape else float("inf")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def hooked(module: nn.Module) -> bool:
    """Whether anything beside its own forward happens when ``module`` is called."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


class _Watch(TorchFunctionMode):
    """While open, notes what becomes of the output of each convolution. Tensors go by their ``id`` and are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[int, list[Callable[..., Any]]] = defaultdict(list)  # of a tensor, what it was given to
        self.calls: dict[int, int] = defaultdict(int)  # of a weight or running mean, how often it was used
        self.convolution_of: dict[int, int] = {}  # output: weight
        self.norms: list[tuple[int, int]] = []  # running mean, input
        self._kept: list[Any] = []  # a tensor that is freed would leave its id to another

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func`` and note what it was given."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # others only look, as x.dim() does
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._kept.append((given, result))
            for tensor in given:
                self.uses[id(tensor)].append(func)
                self.calls[id(tensor)] += 1
            if func is F.conv2d and len(args) > 1:  # as layers call it
                self.convolution_of[id(result)] = id(args[1])
            elif func is F.batch_norm and len(args) > 1:
                self.norms.append((id(args[1]), id(args[0])))
        return result


class _ChannelsLast(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.to(memory_format=torch.channels_last))
        return logits


class InBfloat16(_ChannelsLast):
    """``network`` with its products and convolutions in bfloat16; weights, statistics and logits stay float32.

    Weights are cast anew at each call: a cache would hold those of an earlier step of a training.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The logits (B, K) of images (B, C, H, W)."""
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            return super().forward(x).float()


def _settled(network: nn.Module) -> nn.Module:
    """``network``, in a copy with those weights cast that autocast would cast at each forward, to the same numbers."""
    if not isinstance(network, InBfloat16):
        return network
    settled = copy.deepcopy(network)
    for module in settled.modules():
        if type(module) in (nn.Conv2d, nn.Linear) and not hooked(module):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.bfloat16)
    return settled


class _Answered(nn.Module):
    """``network``, answered for by an engine as long as nobody asks for a gradient."""

    def __init__(self, network: nn.Module, answers: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self._answers = network, answers

    def forward(self, x: Tensor) -> Tensor:
        if (x.requires_grad and torch.is_grad_enabled()) or x.dtype != torch.float32:
            logits: Tensor = self.network(x)
            return logits
        return self._answers(x)
