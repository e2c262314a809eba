"""What Square proposes next: windows of an image changed, in the way of each norm."""

from functools import lru_cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from bench.norms import TINY, box, lp_norm, per_sample, project
from bench.rng import SampleRng
from bench.threat import Norm, Threat

SMALL = 16  # windows of less than this part of an image are changed cell by cell, larger ones by a mask


class Proposals(Protocol):
    """Where a search starts, and where it may go from an incumbent; inside the ball and the box."""

    def start(self, rng: SampleRng) -> Tensor:
        """The first points (n, C, H, W)."""
        ...

    def side(self, side: int) -> int:
        """The side of the windows that are proposed where ``side`` is asked for."""
        ...

    def propose(self, incumbent: Tensor, side: int, rng: SampleRng, corner: Tensor | None = None) -> Tensor:
        """``incumbent`` (n, C, H, W) with windows of ``side`` pixels changed, at ``corner`` (n, 2) or at random."""
        ...


def proposals(x: Tensor, threat: Threat, inset: int) -> Proposals:
    """Those around ``x`` (n, C, H, W); windows leave ``inset`` rows and columns at the end of an image alone."""
    if threat.norm == "linf":
        return Linf(x, threat, inset)
    return (L1 if threat.norm == "l1" else L2)(x, threat, inset)


class Linf:
    """Proposals in the linf ball: each pixel of a window goes to one end of its range, one sign for each channel."""

    def __init__(self, x: Tensor, threat: Threat, inset: int) -> None:
        self.low, self.high = box(x, threat)
        self.inset = inset

    def start(self, rng: SampleRng) -> Tensor:
        """Vertical stripes: one sign for each channel and column."""
        _, channels, _, width = self.low.shape
        return torch.where(rng.coins(channels, 1, width), self.high, self.low)

    def side(self, side: int) -> int:
        """As asked for."""
        return side

    def propose(self, incumbent: Tensor, side: int, rng: SampleRng, corner: Tensor | None = None) -> Tensor:
        """``incumbent`` (n, C, H, W) with one new window each."""
        channels, height, width = incumbent.shape[1:]
        corner = _corners(rng, (height, width), side, self.inset) if corner is None else corner
        signs = rng.fork("signs").coins(channels)
        if side == 1:  # one proposal in eight would repeat a three-channel pixel and waste its query
            signs = self._changing(incumbent, corner, signs, rng)
        if SMALL * side * side > height * width:
            target = torch.where(signs[:, :, None, None], self.high, self.low)
            return torch.where(_window(corner, side, (height, width)), target, incumbent)
        cells = _cells(corner, side, incumbent.shape)
        low, high = (end.flatten(2).gather(2, cells) for end in (self.low, self.high))
        target = torch.where(signs[:, :, None], high, low)
        return incumbent.flatten(2).scatter(2, cells, target).view_as(incumbent)

    def _changing(self, incumbent: Tensor, corner: Tensor, signs: Tensor, rng: SampleRng) -> Tensor:
        """``signs`` (n, C), or the first of three further draws that changes the pixel at ``corner`` (n, 2)."""
        samples = torch.arange(len(incumbent), device=incumbent.device)
        pixel = samples, slice(None), corner[:, 0], corner[:, 1]
        now, low, high = incumbent[pixel], self.low[pixel], self.high[pixel]        # (n, C)
        draws = torch.cat((signs[:, None], rng.fork("more signs").coins(3, signs.shape[1])), dim=1)  # (n, 4, C)
        changes = (torch.where(draws, high[:, None], low[:, None]) != now[:, None]).any(dim=2)
        return draws[samples, changes.long().argmax(dim=1)]


class L2:
    """Proposals on the l2 sphere: energy moves from one window into another, in a two-lobed pattern."""

    norm: ClassVar[Norm] = "l2"
    power: ClassVar[int] = 2  # of a length, that is its energy

    def __init__(self, x: Tensor, threat: Threat, inset: int) -> None:
        self.x, self.threat, self.eps, self.inset = x, threat, threat.eps, inset
        self._lobes: dict[int, Tensor] = {}  # by side; copying them to a GPU at each step would wait for it

    def start(self, rng: SampleRng) -> Tensor:
        """A 5 x 5 grid of patterns, with one sign for each tile and channel and an orientation for each tile."""
        _, channels, height, width = self.x.shape
        side = max(1, min(height, width) // 5)
        tiles = min(5, height // side), min(5, width // side)
        lobes = self._bump(side)
        shape = torch.where(rng.fork("turn").coins(*tiles)[..., None, None], lobes.T, lobes)     # (n, 5, 5, s, s)
        signs = rng.fork("signs").coins(channels, *tiles).to(self.x) * 2 - 1
        grid = (signs[..., None, None] * shape[:, None]).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        delta = torch.zeros_like(self.x)
        top, left = (height - tiles[0] * side) // 2, (width - tiles[1] * side) // 2
        delta[:, :, top : top + grid.shape[2], left : left + grid.shape[3]] = grid
        return self._inside(delta)

    def side(self, side: int) -> int:
        """An odd one: see :func:`odd_side`."""
        return odd_side(side, min(self.x.shape[2:]))

    def propose(self, incumbent: Tensor, side: int, rng: SampleRng, corner: Tensor | None = None) -> Tensor:
        """``incumbent`` (n, C, H, W) with the energy of two windows, and what the box has eaten, in the first.

        Only where the first one lies can be given.
        """
        channels, height, width = incumbent.shape[1:]
        side = self.side(side)
        first = _corners(rng.fork("first"), (height, width), side, self.inset) if corner is None else corner
        second = _corners(rng.fork("second"), (height, width), side, self.inset)
        delta = incumbent - self.x
        into, out_of = _window(first, side, (height, width)), _window(second, side, (height, width))
        spare = (self.eps**self.power - lp_norm(delta, self.norm) ** self.power).clamp(min=0) / channels  # (n,)
        room = spare[:, None] + (self._energy(delta) * (into | out_of)).sum(dim=(2, 3))            # (n, C)

        cells = _cells(first, side, delta.shape)
        lobes = self._bump(side)
        turned = torch.where(rng.fork("turn").coins(1, 1), lobes.T, lobes)                         # (n, s, s)
        signs = rng.fork("signs").coins(channels).to(delta) * 2 - 1
        old = delta.flatten(2).gather(2, cells)
        new = signs[..., None] * turned.flatten(1)[:, None] + _unit(old, self.norm)
        new = _unit(new, self.norm) * self._length(room)[..., None]
        moved = delta.masked_fill(out_of, 0).flatten(2).scatter(2, cells, new).view_as(delta)
        return self._inside(moved)

    def _bump(self, side: int) -> Tensor:
        if side not in self._lobes:
            self._lobes[side] = bump(side, self.norm).to(self.x)
        return self._lobes[side]

    def _energy(self, delta: Tensor) -> Tensor:
        return delta.square()

    def _length(self, energy: Tensor) -> Tensor:
        return energy.sqrt()

    def _inside(self, delta: Tensor) -> Tensor:
        scale = self.eps / (lp_norm(delta, "l2") + TINY)
        return (self.x + delta * per_sample(scale)).clamp(0, 1)


class L1(L2):
    """The same in the l1 ball, with steeper lobes; a window gets more than there is, and the projection decides.

    Source: Croce and Hein, 2021, arXiv:2103.01208, section 4; the lobes as in the authors' code.
    """

    norm: ClassVar[Norm] = "l1"
    power: ClassVar[int] = 1

    def _energy(self, delta: Tensor) -> Tensor:
        return delta.abs()

    def _length(self, energy: Tensor) -> Tensor:
        return energy * self.x.shape[1]

    def _inside(self, delta: Tensor) -> Tensor:
        return project(self.x + delta, self.x, self.threat)


def odd_side(side: int, size: int) -> int:
    """The odd side of an l2 window, at least 3 where the image of ``size`` allows it."""
    side = max(side, 3)
    side += 1 - side % 2
    return side if side <= size else size - (1 - size % 2)


@lru_cache(maxsize=256)
def bump(side: int, norm: Norm = "l2") -> Tensor:
    """The two-lobed pattern (side, side) of unit ``norm``: one lobe up, one down, each falling off in rings."""
    half = side // 2
    lobes = [_rings(half, side, norm), -_rings(side - half, side, norm)]
    return _unit(torch.cat(lobes).view(1, 1, -1), norm).view(side, side)


def _rings(rows: int, columns: int, norm: Norm) -> Tensor:
    """A lobe (rows, columns) of unit ``norm``: the sum over the concentric rectangles j = 0, 1, ... that cover a cell.

    Of 1 / (j + 1)^2 in l2, and of 1 / (j + 1)^4 in l1.
    """
    if rows == 0:
        return torch.zeros(0, columns)
    down = (torch.arange(rows) - rows // 2).abs()
    across = (torch.arange(columns) - columns // 2).abs()
    ring = torch.maximum(down[:, None], across)
    weights = 1 / torch.arange(1, max(rows // 2, columns // 2) + 2).double() ** (4 if norm == "l1" else 2)
    lobe = weights.flip(0).cumsum(0).flip(0)[ring].float()
    return _unit(lobe.view(1, 1, -1), norm).view(rows, columns)


def _unit(values: Tensor, norm: Norm) -> Tensor:
    """(n, C, m) scaled to unit ``norm`` along the last dimension."""
    length = values.abs().sum(2, True) if norm == "l1" else values.square().sum(2, True).sqrt()
    return values / (length + TINY)


def _corners(rng: SampleRng, size: tuple[int, int], side: int, inset: int) -> Tensor:
    """Top left corners (n, 2) of windows, uniform over the image less ``inset`` rows and columns at its end."""
    rows, columns = (max(length - side + 1 - inset, 1) for length in size)
    return torch.stack((rng.fork("row").integers(rows), rng.fork("column").integers(columns)), dim=1)


def _cells(corner: Tensor, side: int, shape: torch.Size) -> Tensor:
    """Where the pixels of windows at ``corner`` (n, 2) are in flat images of ``shape`` (n, C, H, W): (n, C, side^2)."""
    _, channels, _, width = shape
    line = torch.arange(side, device=corner.device)
    cells = (corner[:, 0, None, None] + line[:, None]) * width + corner[:, 1, None, None] + line  # (n, s, s)
    return cells.flatten(1)[:, None].expand(-1, channels, -1)


def _window(corner: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """Masks (n, 1, H, W) of the windows at ``corner`` (n, 2)."""
    offset = torch.arange(max(size), device=corner.device) - corner[:, :, None]
    inside = (offset >= 0) & (offset < side)                                # (n, 2, max(H, W))
    height, width = size
    return (inside[:, 0, :height, None] & inside[:, 1, None, :width])[:, None]
