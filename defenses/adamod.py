"""AdaMod: Adam whose step sizes are held below their own running mean. Ding et al., 2019, arXiv:1910.12249."""

from collections.abc import Iterable

import torch
from torch import Tensor


class AdaMod(torch.optim.Optimizer):
    """Algorithm 1 of the paper, without weight decay.

    Args:
        betas: what is kept at each step of the mean of the gradients and of their squares.
        beta3: what is kept of the mean of the step sizes, which starts at 0.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, betas: tuple[float, float], beta3: float, eps: float = 1e-8
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "beta3": beta3, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            (beta1, beta2), beta3 = group["betas"], group["beta3"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not (state := self.state[parameter]):
                    state.update(step=0, **{name: torch.zeros_like(parameter) for name in ("mean", "square", "size")})
                state["step"] += 1
                state["mean"].lerp_(parameter.grad, 1 - beta1)
                state["square"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                rate = group["lr"] * (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
                size = rate / (state["square"].sqrt() + group["eps"])
                state["size"].lerp_(size, 1 - beta3)
                parameter.sub_(torch.minimum(size, state["size"]) * state["mean"])
