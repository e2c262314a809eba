"""The referee in the shape that attacks of other libraries expect."""

from typing import TYPE_CHECKING, Literal, NoReturn

import torch
from torch import Tensor, nn

from bench.errors import AccessError, ThreatViolation
from bench.norms import per_sample, project
from bench.oracle.balls import apart, distances, inside

if TYPE_CHECKING:
    from bench.oracle.referee import Referee

Order = Literal["batch", "sample", "ball"]


class Over(Exception):
    """None of the samples that a view stands for gets any more answers."""


class ForeignView(nn.Module):
    """A referee behind a network's call, for the samples ``rows`` (n,) of its batch, in that order.

    Foreign code does not say whose image it asks about, so ``order`` does:

    - ``batch``: each call holds the n images in their order, or that several times over;
    - ``sample``: each call holds several images of the first sample, then as many of the second, and so on;
    - ``ball``: images come as they like, and each belongs to the sample whose ball it is in. Balls must not touch.

    With one sample all are the same, and all is certain. A sample that gets no more answers hears its last one again,
    whatever is asked about it; its gradients are zero, which some libraries turn into NaN images.

    Args:
        moved: move images into ball and box before they are asked about, for attacks whose probes leave them.
        ends: raise :class:`Over` once nobody gets answers.

    Raises:
        AccessError: whose image is asked about could not be told.
    """

    def __init__(self, referee: "Referee", rows: Tensor, order: Order, moved: bool, ends: bool) -> None:
        super().__init__()
        self._referee = [referee]  # in a list, so that it is not searched for parameters
        self._rows, self._order, self._moved, self._ends = rows.clone(), order, moved, ends
        self._clean = referee.images(rows)
        self._seen: Tensor | None = None
        self._last: Tensor | None = None
        self.latest = self._clean.clone()  # (n, C, H, W), the last image of each sample that was answered
        self.anchor = nn.Parameter(torch.empty(0, device=rows.device), requires_grad=False)  # tells the device
        self.eval()
        if order == "ball" and len(rows) > 1:
            threat = referee.threat
            if len(apart(self._clean, threat.norm, threat.eps)) > 1:
                raise AccessError(
                    f"{referee.attack}: {threat} balls touch, so whose image is asked about cannot be told; "
                    "give the order of its calls, or its samples one at a time (as_module(rows, order))"
                )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, K), with a graph where the threat grants gradients; its backward pass is counted."""
        referee = self._referee[0]
        self._look(referee)
        if x.requires_grad:
            x = x.view_as(x)  # a node of its own, for the hook
            x.register_hook(Tensor.contiguous)  # libraries call view() on gradients, whatever order numbers came in
        at = self._whose(x.detach(), referee)
        rows, clean = self._rows[at], self._clean[at]
        if self._moved:
            x = project(x, clean, referee.threat)
        x = torch.where(per_sample(referee.live[rows]), x, clean)
        with torch.set_grad_enabled(torch.is_grad_enabled() and referee.threat.access == "gradients"):
            logits, answered = referee.ask(x, rows)
        if logits.requires_grad:
            logits.register_hook(lambda _: referee.charge(rows, answered))
        return torch.where(answered[:, None], logits, self._remember(x.detach(), logits.detach(), answered, at)[at])

    def _remember(self, x: Tensor, logits: Tensor, answered: Tensor, at: Tensor) -> Tensor:
        """The last answer (n, K) of each sample, now that these were given."""
        number = torch.where(answered, torch.arange(len(x), device=x.device), -1)
        newest = torch.full_like(self._rows, -1).scatter_reduce(0, at, number, "amax")
        told, chosen = newest >= 0, newest.clamp(min=0)
        last = logits.new_zeros(len(self._rows), logits.shape[1]) if self._last is None else self._last
        if len(x):
            last = torch.where(told[:, None], logits[chosen], last)
            self.latest = torch.where(per_sample(told), x[chosen], self.latest)
        self._last = last
        return last

    def _look(self, referee: "Referee") -> None:
        """See whether anybody is left, whenever the referee has looked."""
        active = referee.active()
        if self._ends and active is not self._seen:
            self._seen = active
            if not torch.isin(self._rows, active).any():
                raise Over

    def _whose(self, x: Tensor, referee: "Referee") -> Tensor:
        """The positions in ``rows`` of the samples that the images ``x`` (N, C, H, W) belong to."""
        n = len(self._rows)
        if x.shape[1:] != self._clean.shape[1:]:
            raise ThreatViolation(
                f"{referee.attack} asked about images {tuple(x.shape[1:])}; expected {tuple(self._clean.shape[1:])}"
            )
        positions = torch.arange(n, device=x.device)
        if n == 1:
            return positions.expand(len(x))
        if self._order == "ball":
            return self._by_ball(x, referee)
        times, rest = divmod(len(x), n)
        if rest:
            raise AccessError(
                f"{referee.attack} asked about {len(x)} images of {n} samples, so whose they are cannot be told; "
                "give its samples one at a time (as_module(rows, order))"
            )
        return positions.repeat(times) if self._order == "batch" else positions.repeat_interleave(times)

    def _by_ball(self, x: Tensor, referee: "Referee") -> Tensor:
        """Nearest in l2 is quick and nearly always right; being in the ball proves it, since no two balls touch."""
        norm, eps = referee.threat.norm, referee.threat.eps
        flat, clean = x.flatten(1), self._clean.flatten(1)
        at = (flat @ clean.T - clean.square().sum(dim=1) / 2).argmax(dim=1)
        astray = (~inside(x, self._clean[at], norm, eps)).nonzero().squeeze(1)
        if len(astray):
            at[astray] = distances(x[astray], self._clean, norm).argmin(dim=1)
            if not inside(x[astray], self._clean[at[astray]], norm, eps).all():
                raise ThreatViolation(
                    f"{referee.attack} asked about an image outside every {referee.threat} ball or the box [0, 1], so "
                    "whose it is cannot be told; project every query"
                )
        return at

    def __reduce__(self) -> NoReturn:
        raise AccessError("an attack tried to copy the network that it attacks; queries to a copy would not count")
