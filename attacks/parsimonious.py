"""Parsimonious: which blocks to raise and which to lower, by lazy greedy search from coarse to fine."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.scored import Scored
from bench.errors import ConfigError
from bench.losses import WITH_DLR
from bench.norms import box, per_sample
from bench.oracle import Oracle
from bench.registry import attacks
from bench.rng import SampleRng
from bench.threat import Access, Norm, Threat

BASE, MEASURE, RECHECK = 0, 1, 2  # what a sample asks: the image as it is, a block's gain, the best block's gain again


@attacks("parsimonious")
@dataclass(frozen=True, kw_only=True)
class Parsimonious(Scored):
    """Parsimonious attack (Moon et al., ICML 2019), also called ECO, untargeted, in linf.

    Every block of one channel is either raised or lowered by eps; all start low. Groups of blocks are searched one
    after another. First those that are low are measured, and raised from the best on as long as that lowers the loss;
    then those that are high, in the same way. A gain measured before other blocks moved only ranks the block: it is
    asked again, and the block moves if it still beats the next one's old gain. After all groups, blocks split into
    four and are shuffled.

    Costs one query for each group, for each gain and for each gain asked again. Every sample goes its own way, one
    query at a time, so queries after its first misclassified one are never asked.

    Args:
        block: side of the first blocks, a power of two; 32 is usual for ImageNet.
        group: blocks in a group.
        grid: side of the grid that blocks are cut from, where the image has more pixels; spread over it as in
            nearest-neighbour upsampling. 256 is usual for ImageNet.
        first: whether the best of the measured blocks moves only if that lowers the loss (``improving``) or in any case
            (``reference``, as in the authors' code).
        loss: what is minimised, ``margin``, ``ce`` (the log-likelihood) or ``dlr``, which no scale of scores moves.

    Source: arXiv:1905.06635, algorithms 1 to 3; one insertion and one deletion a group, as in the authors' code.
    """

    block: int = 4
    group: int = 64
    grid: int | None = None
    first: Literal["improving", "reference"] = "improving"
    loss: Literal["margin", "ce", "dlr"] = "margin"

    access: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[Norm]] = frozenset({"linf"})
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Moon et al., 2019, arXiv:1905.06635"

    def __post_init__(self) -> None:
        if self.block < 1 or self.block & (self.block - 1):
            raise ConfigError(f"block is {self.block}; use a power of two, so that blocks split into whole blocks")
        if self.group < 1:
            raise ConfigError(f"group is {self.group}; a group has at least one block")
        if self.grid is not None and self.grid < 1:
            raise ConfigError(f"grid is {self.grid}; it has at least one row")
        if self.first not in ("improving", "reference"):
            raise ConfigError(f"first is {self.first!r}; use improving or reference")
        if self.loss not in WITH_DLR:
            raise ConfigError(f"loss is {self.loss!r}; use one of {', '.join(WITH_DLR)}")

    def __call__(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, rng: SampleRng) -> Tensor:
        """See :class:`bench.protocols.Attack`; returns each sample's incumbent."""
        plan = _Plan(x, rng, self.block, self.group, self.grid, oracle.query_budget)
        loss, limit = WITH_DLR[self.loss], torch.inf if self.first == "reference" else 0.0

        final, rows = torch.zeros_like(x, dtype=torch.bool), torch.arange(len(x), device=x.device)
        (low, high), labels, search = box(x, threat), y, _Search.start(x, plan.width)
        for _ in range(oracle.query_budget):
            active = oracle.active()
            if len(active) == 0:
                break
            if active is not rows:  # gather anew only when somebody has dropped out
                final[rows] = search.up
                stay = torch.searchsorted(rows, active)
                labels, low, high, search = labels[stay], low[stay], high[stay], search[stay]
                rows = active
            group = _Group(plan, rows, search.group)
            candidate = torch.where(search.asked(group), high, low)
            value = loss(oracle.scores(candidate, rows), labels).to(x)
            search = search.learn(value, group, limit)
        final[rows] = search.up
        low, high = box(x, threat)
        return torch.where(final, high, low)


class _Plan:
    """The groups of blocks that each sample goes through, in as many rounds as the budget can reach.

    A block is named by its first value, a position in the flattened image.
    """

    def __init__(self, x: Tensor, rng: SampleRng, block: int, group: int, grid: int | None, budget: int) -> None:
        channels, *lengths = x.shape[1:]
        self.shape = x.shape[1:]
        places = (torch.arange(length, device=x.device) for length in lengths)
        self.cells = [place * min(grid or n, n) // n for place, n in zip(places, lengths, strict=True)]  # on the grid

        orders: list[Tensor] = []
        groups: list[tuple[int, int, int]] = []  # first column of the order, blocks, side
        side, left, column = block, budget, 0
        while left > 0:
            edges = [torch.searchsorted(cell // side, (cell // side).unique()) for cell in self.cells]
            channel = torch.arange(channels, device=x.device)[:, None, None]
            names = ((channel * lengths[0] + edges[0][:, None]) * lengths[1] + edges[1]).flatten()
            used = 0
            while used < len(names) and left > 0:
                size = min(group, len(names) - used)
                groups.append((column + used, size, side))
                used, left = used + size, left - size - 1  # each block is measured at least once, after the base
            orders.append(names[rng.fork(len(orders)).words(len(names)).argsort(dim=1)[:, :used]])
            side, column = max(side // 2, 1), column + used
        self.order = torch.cat(orders, dim=1)                                            # (B, T)
        self.first, self.size, self.side = torch.tensor(groups, device=x.device).unbind(dim=1)
        self.width = max(size for _, size, _ in groups)


class _Group:
    """The blocks of the groups ``number`` (n,) of the samples ``rows`` (n,), each in a slot."""

    def __init__(self, plan: _Plan, rows: Tensor, number: Tensor) -> None:
        number = number.clamp(max=len(plan.first) - 1)
        self.plan, self.slots, self.side = plan, torch.arange(plan.width, device=rows.device), plan.side[number]
        columns = plan.first[number][:, None] + self.slots
        self.blocks = plan.order[rows[:, None], columns.clamp(max=plan.order.shape[1] - 1)]  # (n, G)
        self.filled = self.slots < plan.size[number][:, None]                            # (n, G)

    def mask(self, slot: Tensor) -> Tensor:
        """The values (n, C, H, W) of the blocks in ``slot`` (n,)."""
        channels, height, width = self.plan.shape
        block = self.blocks.gather(1, slot[:, None])                                     # (n, 1)

        def along(cells: Tensor, place: Tensor) -> Tensor:
            strips = cells // self.side[:, None]                                         # (n, H) or (n, W)
            return strips == strips.gather(1, place)

        rows = along(self.plan.cells[0], block // width % height)
        columns = along(self.plan.cells[1], block % width)
        channel = torch.arange(channels, device=slot.device) == block // (height * width)  # (n, C)
        return channel[:, :, None, None] & rows[:, None, :, None] & columns[:, None, None]


@dataclass(frozen=True, kw_only=True)
class _Search:
    """Where each of n samples is in its search."""

    up: Tensor        # (n, C, H, W) bool, the values raised
    base: Tensor      # (n,), loss of the image that they make
    gain: Tensor      # (n, G), what moving each block of the group would change; inf outside the queue
    slot: Tensor      # (n,) int64, the block asked about
    stage: Tensor     # (n,) int64, BASE, MEASURE or RECHECK
    deleting: Tensor  # (n,) bool, lowering blocks, after raising them
    group: Tensor     # (n,) int64

    @classmethod
    def start(cls, x: Tensor, width: int) -> "_Search":
        """Before the first query of the images ``x``, with all values low."""
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return cls(
            up=torch.zeros_like(x, dtype=torch.bool), base=torch.zeros_like(x[:, 0, 0, 0]),
            gain=x.new_full((len(x), width), torch.inf), slot=count, stage=count, deleting=count > 0, group=count,
        )  # fmt: skip

    def __getitem__(self, kept: Tensor) -> "_Search":
        return replace(self, **{name: part[kept] for name, part in vars(self).items()})

    def asked(self, group: _Group) -> Tensor:
        """The values (n, C, H, W) that the next query raises."""
        return self.up ^ (group.mask(self.slot) & per_sample(self.stage != BASE))

    def learn(self, value: Tensor, group: _Group, limit: float) -> "_Search":
        """The search after an answer, at its next query.

        Args:
            value: (n,), the loss of the query.
            limit: a gain below it lets the best of the measured blocks move.
        """
        starting, measuring, rechecking = (self.stage == stage for stage in (BASE, MEASURE, RECHECK))
        change = value - self.base
        change = torch.where(change.isfinite(), change, torch.inf)  # a block without an answer leaves the queue

        # The queue after the answer, and who has measured all that is to be measured.
        here = group.slots == self.slot[:, None]
        others = torch.where(here, torch.inf, self.gain)
        settled = rechecking & (change <= others.amin(dim=1))
        queued = measuring | (rechecking & ~settled)
        gain = torch.where(here & queued[:, None], change[:, None], others)
        wanted = group.filled & (self._high(self.up, group) == self.deleting[:, None])
        later = wanted & (group.slots > self.slot[:, None])
        measured = measuring & ~later.any(dim=1)

        # A block may move: the best one when all are measured, or the one asked again.
        best_gain, best = gain.min(dim=1)
        picked = measured & (best_gain < limit)
        moved = picked | (settled & (change <= 0))
        up = self.up ^ (group.mask(torch.where(picked, best, self.slot)) & per_sample(moved))
        base = torch.where(starting | (settled & moved), value, torch.where(picked, self.base + best_gain, self.base))
        useless = (measured | settled) & ~moved  # and so is what ranks below
        leaves = useless[:, None] | (picked[:, None] & (group.slots == best[:, None]))
        gain = torch.where(leaves, torch.inf, gain)

        # What to ask next.
        best_gain, best = gain.min(dim=1)
        again = (measured | rechecking) & (best_gain < torch.inf)
        over = (measured | rechecking) & ~again
        high = self._high(up, group)
        raised, lowered = group.filled & high, group.filled & ~high
        insert = starting & lowered.any(dim=1)
        delete = ((starting & ~insert) | (over & ~self.deleting)) & raised.any(dim=1)
        done = over & ~delete
        ahead = torch.where(insert[:, None], lowered, torch.where(delete[:, None], raised, later))
        return _Search(
            up=up,
            base=base,
            gain=gain,
            slot=torch.where(again, best, ahead.long().argmax(dim=1)),  # the first slot ahead
            stage=torch.where(done, BASE, torch.where(again, RECHECK, MEASURE)),
            deleting=(self.deleting | delete) & ~done,
            group=self.group + done,
        )

    def _high(self, up: Tensor, group: _Group) -> Tensor:
        """Which blocks of the group (n, G) are raised."""
        return up.flatten(1).gather(1, group.blocks)
