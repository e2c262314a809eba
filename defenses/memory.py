"""What a served model remembers of each sample by itself, as if every sample had a deployment of its own."""

from collections.abc import Iterator

import torch
from torch import Tensor


class Memory:
    """A tensor of one shape for each owner, zero until something is kept.

    Owners are those of :class:`bench.rng.SampleRng`, so memory does not depend on who shares a batch or on the order
    of the samples, only on the queries of the sample.
    """

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self._owners = torch.empty(0, dtype=torch.int64)  # ascending
        self._values = torch.empty(0, *shape)

    def recall(self, owners: Tensor, like: Tensor) -> Tensor:
        """What is known of the ``owners`` (n,), distinct: (n, *shape) in dtype and place of ``like``."""
        known = torch.cat((self._owners.to(owners), owners)).unique()
        if len(known) > len(self._owners):
            values = like.new_zeros(len(known), *self.shape)
            values[torch.searchsorted(known, self._owners.to(owners))] = self._values.to(like)
            self._owners, self._values = known, values
        return self._values[torch.searchsorted(self._owners, owners)].to(like)

    def keep(self, owners: Tensor, values: Tensor) -> None:
        """Remember ``values`` (n, *shape) of ``owners`` (n,) that were recalled."""
        self._values[torch.searchsorted(self._owners, owners)] = values


def turns(owners: Tensor) -> Iterator[Tensor]:
    """The rows (n,) of ``owners`` (B,) in order, no owner twice in one turn: its queries are answered one by one."""
    ranked, order = owners.sort(stable=True)
    place = torch.arange(len(owners), device=owners.device) - torch.searchsorted(ranked, ranked)
    turn = torch.empty_like(place).scatter_(0, order, place)
    for number in range(int(place.max()) + 1 if len(owners) else 0):
        yield (turn == number).nonzero().squeeze(1)
