"""The referee in the shape that attacks of other libraries expect."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from bench.oracle.referee import Referee


class ForeignView(nn.Module):
    """A referee behind a network's call. Foreign code does not say whose image it asks about, so each image is taken
    for the sample whose clean image is nearest; a sample that gets no more answers hears its last one again."""

    def __init__(self, referee: "Referee") -> None:
        super().__init__()
        self._referee = [referee]  # in a list, so that it is not searched for parameters
        self._clean = referee._x.flatten(1)
        self._half_norms = self._clean.square().sum(dim=1) / 2
        self._last: Tensor | None = None
        self.anchor = nn.Parameter(torch.empty(0, device=referee._x.device), requires_grad=False)  # tells the device
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, K), with a graph where the threat grants gradients; its backward pass is counted."""
        referee = self._referee[0]
        flat = x.detach().flatten(1)
        rows = (flat @ self._clean.T - self._half_norms).argmax(dim=1)  # nearest in l2
        with torch.set_grad_enabled(torch.is_grad_enabled() and referee._threat.access == "gradients"):
            logits, answered = referee.ask(x, rows)
        if self._last is None:
            self._last = torch.zeros(len(self._clean), logits.shape[1], dtype=logits.dtype, device=logits.device)
        self._last[rows] = torch.where(answered[:, None], logits.detach(), self._last[rows])
        if logits.requires_grad:
            logits.register_hook(lambda _: referee.charge(rows, answered))
        return torch.where(answered[:, None], logits, self._last[rows])
