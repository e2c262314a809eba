"""What single images do to a network's weights and channels: two signs of self-fitting, beside its accuracies."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AT_ONCE = 4  # images whose weight gradients are in memory together


def weight_gradient_norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The l2 norm (B,) of each sample's own gradient of the cross-entropy with respect to all parameters.

    Raises:
        RuntimeError: the network does what ``torch.func`` cannot batch.
    """
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {**weights, **buffers}, (image[None],))
        return F.cross_entropy(logits, label[None])

    def square(image: Tensor, label: Tensor) -> Tensor:
        gradients = torch.func.grad(loss)(parameters, image, label)
        return torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()

    squares: Tensor = torch.func.vmap(square, chunk_size=AT_ONCE)(x, y)
    return squares.sqrt()


@torch.no_grad()
def channel_inequality(model: nn.Module, x: Tensor) -> float:
    """How unequally the channels of each convolution answer ``x``, between 0 and 1, the mean over the convolutions.

    The Gini coefficient of the channels' mean absolute outputs: 0 where all are as large, near 1 where one dominates
    and the others are silent. NaN for a network without convolutions.
    """
    seen: list[Tensor] = []

    def note(module: nn.Module, given: object, output: Tensor) -> None:
        seen.append(gini(output.abs().mean(dim=(0, 2, 3))))

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Conv2d)]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return float(torch.stack(seen).mean()) if seen else float("nan")


def gini(values: Tensor) -> Tensor:
    """The Gini coefficient of ``values`` (n,) of 0 or more: half their mean absolute difference over their mean."""
    ranked = values.sort().values
    n = len(ranked)
    weight = 2 * torch.arange(1, n + 1, device=values.device) - n - 1
    return (weight * ranked).sum() / (n * ranked.sum()).clamp(min=1e-12)
