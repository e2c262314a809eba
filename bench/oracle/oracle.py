"""What an attack holds."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from bench.errors import AccessError, RefereeError
from bench.oracle.foreign import ForeignView, Order
from bench.oracle.served import ServedModel

if TYPE_CHECKING:
    from bench.oracle.referee import Referee


class Oracle:
    """What an attack meets in place of the model. It asks, and can change nothing of what is written down.

    An attack names the samples it asks about by ``rows`` (n,), their positions in the batch; ``None`` means all.
    Queries are (n, C, H, W), or (n, k, C, H, W) for k queries a sample in one call, which count in that order. So do
    the queries of a sample that is named several times. A sample that was misclassified once, or that has spent its
    budget, gets no more answers: NaN scores, label -1, zero gradients. The ball and the box are checked before anything
    is answered; attacks that search for the nearest image or roam are held to the box in their queries, and those that
    look ahead to nothing, but all to the ball and the box in what counts as success and in what they return
    (:class:`bench.oracle.Rules`).
    """

    __slots__ = ("__referee",)

    def __init__(self, referee: "Referee") -> None:
        self.__referee = referee

    @property
    def query_budget(self) -> int:
        """How many queries each sample may cost."""
        return self.__referee.query_budget

    @property
    def classes(self) -> int:
        """How many classes the data have."""
        return self.__referee.classes

    @property
    def surrogate(self) -> ServedModel:
        """The undefended network, or those that the attack names, to work on at will; it tells nothing of the target.

        Raises:
            AccessError: the attack does not declare that it works on a surrogate.
        """
        return self.__referee.surrogate

    @property
    def fitted(self) -> Mapping[str, Tensor]:
        """What the method ``fit`` of the attack has made of other images.

        Raises:
            AccessError: it has none.
        """
        return self.__referee.fitted

    def active(self) -> Tensor:
        """The rows (n,) worth asking about, to be read only; empty when the attack is over.

        The same tensor object comes back until somebody has dropped out. On a GPU it is looked at only after 16
        queries of a sample, since looking waits for the device; until then it may hold rows that get no answers.
        """
        return self.__referee.active()

    def stage(self, name: str) -> None:
        """Say which of several attacks takes its turn now; who falls from here on is written down as fallen to it."""
        self.__referee.stages.append(name)

    def keep(self, x_adv: Tensor) -> None:
        """Say that the attack whose turn it is has ended, and that all have come to ``x_adv`` (B, C, H, W) so far.

        That is what :meth:`resume` gives to a run that goes on after a kill.
        """
        self.__referee.keep(x_adv)

    def resume(self, x_adv: Tensor) -> tuple[int, Tensor]:
        """How many attacks took their turns before a kill, and what they came to: 0 and ``x_adv`` where none did.

        What they asked stands in the ledger; to be called before anything is asked.
        """
        return self.__referee.resume(x_adv)

    def scores(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits (n, K) or (n, k, K) of the queries ``x``, one query each; NaN where the sample gets no answer.

        Raises:
            AccessError: the threat grants labels only.
            ThreatViolation: a query outside the ball or the box.
        """
        self.__referee.grant("scores", "gradients")
        with torch.no_grad():
            return self.__referee.ask(x, rows)[0]

    def labels(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Predicted classes (n,) or (n, k) int64, one query each; -1 where the sample gets no answer.

        Raises:
            ThreatViolation: a query outside the ball or the box.
        """
        with torch.no_grad():
            logits, answered = self.__referee.ask(x, rows)
            return torch.where(answered, logits.nan_to_num().argmax(dim=-1), -1)

    def gradients(
        self, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor], rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (n, K), and the gradient (n, C, H, W) of ``loss(logits, y)`` (n,) for each query of ``x`` by itself.

        Costs one forward and one backward pass each. k queries a sample, ``x`` (n, k, C, H, W), have logits (n, k, K)
        and gradients (n, k, C, H, W); ``loss`` meets them as n k rows, sample after sample. A loss of m values for each
        of n queries, (n, m), has gradients (n, m, C, H, W), and costs m backward passes.

        Raises:
            AccessError: the threat grants no gradients.
            RefereeError: the served model has none to give.
            ThreatViolation: a query outside the ball or the box.
        """
        self.__referee.grant("gradients")
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            logits, answered = self.__referee.ask(x, rows)
            if not logits.requires_grad:
                raise RefereeError(
                    "the served model gives no gradients (its forward is under no_grad, or detaches); use attacks that "
                    "ask for scores or labels"
                )
            each = answered[0].numel() if len(answered) else 1
            truth = self.__referee.truth(rows).repeat_interleave(each)
            values = loss(logits.nan_to_num().flatten(0, -2), truth)
            told = answered.flatten()
            table = values.view(len(told), -1)
            columns = [torch.where(told, table[:, number], 0) for number in range(table.shape[1])]
            parts = [  # of a sum, which keeps the samples independent
                torch.autograd.grad(column.sum(), x, retain_graph=number < len(columns))[0]
                for number, column in enumerate(columns, 1)
            ]
        self.__referee.charge(rows, answered, len(parts))
        return logits.detach(), torch.stack(parts, dim=1) if values.ndim == 2 else parts[0]

    def as_module(
        self, rows: Tensor | None = None, order: Order = "ball", *, moved: bool = False, ends: bool = False
    ) -> ForeignView:
        """The oracle in the shape that foreign attacks expect: a network that maps images to logits.

        See :class:`bench.oracle.foreign.ForeignView`, which says how it knows whose image it is asked about.

        Raises:
            AccessError: in this order that could not be told.
        """
        rows = torch.arange(self.__referee.size) if rows is None else rows
        return ForeignView(self.__referee, rows.to(self.__referee.device), order, moved, ends)

    def __reduce__(self) -> NoReturn:
        raise AccessError("an attack tried to copy its oracle; queries to a copy would not count")
