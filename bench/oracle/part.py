"""The oracle as one of several attacks in turn meets it."""

from collections.abc import Callable, Mapping
from typing import NoReturn

import torch
from torch import Tensor

from bench.errors import AccessError
from bench.oracle.oracle import Oracle
from bench.oracle.served import ServedModel


class Part(Oracle):
    """The samples that still stand, under numbers of their own, for an attack that is to know no others.

    It asks ``oracle``, whose ledger goes on: what it asks about is what others will have asked about before them.

    Args:
        rows: some of those that ``oracle.active()`` gave, (n,), in that order.
        budget: the most queries that the attack is told it may ask for each sample; ``None`` for all there are.
    """

    __slots__ = ("_budget", "_mine", "_oracle", "_ours", "_rows", "_theirs", "_whole")

    def __init__(self, oracle: Oracle, rows: Tensor, budget: int | None = None) -> None:
        self._oracle, self._rows, self._budget = oracle, rows.clone(), budget
        self._theirs: Tensor | None = None  # what the oracle said of who is left, those of us, also in our numbers
        self._ours = self._mine = rows
        self._whole = len(rows) == len(oracle.active())  # then all who are left are of us, and no GPU is waited for

    @property
    def query_budget(self) -> int:
        """See :attr:`Oracle.query_budget`."""
        return min(self._oracle.query_budget, self._budget or self._oracle.query_budget)

    @property
    def classes(self) -> int:
        """See :attr:`Oracle.classes`."""
        return self._oracle.classes

    @property
    def surrogate(self) -> ServedModel:
        """See :attr:`Oracle.surrogate`."""
        return self._oracle.surrogate

    @property
    def fitted(self) -> Mapping[str, Tensor]:
        """See :attr:`Oracle.fitted`."""
        return self._oracle.fitted

    def active(self) -> Tensor:
        """See :meth:`Oracle.active`."""
        theirs = self._oracle.active()
        if theirs is not self._theirs:
            self._theirs, self._ours = theirs, theirs if self._whole else theirs[torch.isin(theirs, self._rows)]
            self._mine = torch.searchsorted(self._rows, self._ours)
        return self._mine

    def stage(self, name: str) -> None:
        """See :meth:`Oracle.stage`."""
        self._oracle.stage(name)

    def keep(self, x_adv: Tensor) -> None:
        """Nothing: a part is kept by who has divided."""

    def resume(self, x_adv: Tensor) -> tuple[int, Tensor]:
        """See :meth:`keep`."""
        return 0, x_adv

    def scores(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """See :meth:`Oracle.scores`."""
        return self._oracle.scores(x, self._theirs_of(rows))

    def labels(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """See :meth:`Oracle.labels`."""
        return self._oracle.labels(x, self._theirs_of(rows))

    def gradients(
        self, x: Tensor, loss: Callable[[Tensor, Tensor], Tensor], rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Oracle.gradients`."""
        return self._oracle.gradients(x, loss, self._theirs_of(rows))

    def as_module(self, *args: object, **kwargs: object) -> NoReturn:
        """Foreign attacks take no turns."""
        raise AccessError("an attack that takes turns with others asks by scores, labels and gradients alone")

    def _theirs_of(self, rows: Tensor | None) -> Tensor:
        if rows is None:
            return self._rows
        return self._ours if rows is self._mine and self._theirs is not None else self._rows[rows]
