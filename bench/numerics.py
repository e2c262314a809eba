"""The numbers that a network computes in: plain for what is reported, fast for what is searched."""

import copy
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Numerics = Literal["plain", "fast"]


def plain(network: nn.Module) -> nn.Module:
    """``network`` as it is, frozen and in eval mode: float32, every layer by itself."""
    return network.eval().requires_grad_(False)


def fast(network: nn.Module, fold: bool = True) -> nn.Module:
    """A copy of ``network`` that answers sooner: batch-norm folded into convolutions, channels last, bf16 on a GPU.

    The logits are float32 whatever happens inside. Without ``fold``, or where torch.fx cannot trace the network, it
    keeps its batch-norms.
    """
    network = plain(copy.deepcopy(network))
    network = (fold_batch_norm(network) if fold else network).to(memory_format=torch.channels_last)
    wrapped = _Bfloat16(network) if _on_gpu(network) else _ChannelsLast(network)
    return wrapped.eval()


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """``network`` (eval mode) with each batch-norm that directly follows a convolution folded into its weights."""
    try:
        graph = fx.GraphModule(network, _Tracer().trace(network))
    except Exception:  # tracing runs the network's own Python, which may raise anything at all
        return network
    layers = dict(graph.named_modules())
    for node in graph.graph.nodes:
        layer = layers.get(node.target) if node.op == "call_module" else None
        if not isinstance(layer, nn.BatchNorm2d) or layer.running_mean is None:
            continue
        (source,) = node.all_input_nodes
        convolution = layers.get(source.target) if source.op == "call_module" else None
        if not isinstance(convolution, nn.Conv2d) or len(source.users) > 1:
            continue
        parent, _, name = str(source.target).rpartition(".")
        folded = fuse_conv_bn_eval(convolution, layer)
        setattr(graph.get_submodule(parent), name, folded)
        layers[source.target] = folded
        node.replace_all_uses_with(source)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph


class _Tracer(fx.Tracer):
    """Keeps other libraries' kinds of linear layers whole, since output defenses look for the last one."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) or super().is_leaf_module(module, name)


class _ChannelsLast(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.to(memory_format=torch.channels_last))
        return logits


class _Bfloat16(_ChannelsLast):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().forward(x).float()


def _on_gpu(network: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in network.parameters())
