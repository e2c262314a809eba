"""Gradient ascent on the loss of each image, for what trains or is diagnosed; attacks that judge go by the oracle."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.norms import project, steepest
from bench.rng import SampleRng
from bench.threat import Threat


def uniform(x: Tensor, radius: float, rng: SampleRng) -> Tensor:
    """Noise (B, C, H, W) for the images ``x``, each value uniform within ``radius`` of zero."""
    return (2 * rng.uniform(*x.shape[1:]) - 1) * radius


def total_cross_entropy(model: nn.Module, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss that attacks climb: the cross-entropies of ``y`` (B,), as a sum, which keeps the samples independent."""
    return lambda x: F.cross_entropy(model(x), y, reduction="sum")


def input_gradients(model: nn.Module, x: Tensor, y: Tensor, *, create_graph: bool = False) -> Tensor:
    """The gradient (B, C, H, W) of each sample's cross-entropy with respect to its image.

    With ``create_graph`` it can be differentiated further, down to the parameters.
    """
    x = x.detach().requires_grad_(True)
    (gradients,) = torch.autograd.grad(total_cross_entropy(model, y)(x), x, create_graph=create_graph)
    return gradients


def alignment(here: Tensor, there: Tensor) -> Tensor:
    """The cosine (B,) between the gradients (B, C, H, W) of each sample at two points.

    Source:
        Andriushchenko and Flammarion, 2020, arXiv:2007.02617, equation 4.
    """
    return F.cosine_similarity(here.flatten(1), there.flatten(1), dim=1)


def ascend(
    loss: Callable[[Tensor], Tensor], start: Tensor, x: Tensor, threat: Threat, steps: int, size: float
) -> Tensor:
    """Where ``steps`` steps of ``size`` up ``loss`` lead from ``start``, each projected onto ball and box around ``x``.

    Args:
        loss: a number for a batch of images (B, C, H, W), the sum over the samples.
        start, x: (B, C, H, W).
        size: of a step in the threat's norm, on the pixel scale.
    """
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(x_adv), x_adv)
        x_adv = project(x_adv.detach() + size * steepest(gradient, threat.norm), x, threat)
    return x_adv


def pgd(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng, steps: int, rel_step: float) -> Tensor:
    """``x`` after projected gradient ascent on its cross-entropy, from a uniformly random point of the linf ball.

    Source:
        Madry et al., 2018, arXiv:1706.06083, section 2.1.
    """
    start = project(x + uniform(x, threat.eps, rng), x, threat)
    return ascend(total_cross_entropy(model, y), start, x, threat, steps, rel_step * threat.eps)
