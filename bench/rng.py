"""Random numbers that belong to a sample, not to a batch.

A sample's numbers are a function of (seed, sample id, path of forks, lane) alone. No state is kept, so they do not
depend on who shares the batch, on the batch size, on the order or on the device count, and a run can resume anywhere.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def _signed(word: int) -> int:
    """A 64-bit pattern as the signed integer that torch stores it in."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >= 1 << 63 else word


# SplitMix64: the golden-ratio increment and the two multipliers of its finaliser (Steele et al., OOPSLA 2014).
_GAMMA, _M1, _M2 = _signed(0x9E3779B97F4A7C15), _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_U1, _U2 = np.uint64(_M1 & (1 << 64) - 1), np.uint64(_M2 & (1 << 64) - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64; torch shifts arithmetically, so the masks drop the copied sign bits."""
    if z.device.type == "cpu":
        return _mix_quickly(z)
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _M1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _M2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _mix_quickly(z: Tensor) -> Tensor:
    """The same by NumPy, which has unsigned integers and needs a fifth of torch's time for them."""
    words = z.reshape(-1).numpy().view(np.uint64)
    words = words ^ (words >> np.uint64(30))
    words *= _U1
    words ^= words >> np.uint64(27)
    words *= _U2
    words ^= words >> np.uint64(31)
    return torch.from_numpy(words.view(np.int64)).view(z.shape)


AHEAD = 16  # steps that a GPU draws for at once, and words of a draw that are few enough for it


@lru_cache(maxsize=1024)
def _hash(label: str) -> int:
    return _signed(int.from_bytes(blake2b(label.encode(), digest_size=8).digest(), "big"))


class _Ahead:
    """Streams at :data:`AHEAD` steps from ``first`` on, and what is drawn from them, each for all steps at once."""

    def __init__(self, keys: Tensor, first: int = 0) -> None:
        self.keys, self.first = keys, first  # (AHEAD, B)
        self._forks: dict[str, _Ahead] = {}
        self._drawn: dict[tuple[object, int], Tensor] = {}

    def fork(self, label: str) -> "_Ahead":
        """The fork of each of them."""
        if label not in self._forks:
            self._forks[label] = _Ahead(_forked(self.keys, label))
        return self._forks[label]

    def draw(self, kind: Callable[[Tensor], Tensor], lanes: int, place: int) -> Tensor:
        """What ``kind`` makes of the words (B, lanes) of the step at ``place``, in memory of its own."""
        if (kind, lanes) not in self._drawn:
            self._drawn[kind, lanes] = kind(_words(self.keys, lanes))
        return self._drawn[kind, lanes][place].clone()


@dataclass(frozen=True)
class SampleRng:
    """One independent stream of random numbers for each sample of a batch.

    ``fork`` gives a new stream for a purpose, a restart or a step; the same fork always gives the same numbers, so two
    draws that must differ need two forks. Source: counter-based generation as in Salmon et al., SC 2011, with
    SplitMix64's finaliser as the bijection.

    On a GPU, where each launch costs more than the numbers, streams that are forked for one step and then for another
    draw for the steps to come, too.
    """

    keys: Tensor    # (B,) int64
    owners: Tensor  # (B,) int64, the same in every fork of a sample's streams and unlike those of other samples
    _ahead: tuple[_Ahead, int] | None = field(default=None, kw_only=True, repr=False, compare=False)  # which step it is
    _steps: list[_Ahead | None] = field(default_factory=list, init=False, repr=False, compare=False)  # its last forks

    @classmethod
    def create(cls, seed: int, ids: Tensor, purpose: str) -> "SampleRng":
        """Streams for the samples ``ids`` (B,) int64 under ``seed``, unlike those of any other ``purpose``."""
        root = _mix(torch.tensor(_signed(seed * _GAMMA + _hash(purpose)), dtype=torch.int64, device=ids.device))
        keys = _mix(root + _mix(ids * _GAMMA + 1))
        return cls(keys, keys)

    def __len__(self) -> int:
        return self.keys.numel()

    def __getitem__(self, rows: Tensor) -> "SampleRng":
        """The streams of the samples at ``rows`` (n,), an index or a mask."""
        return SampleRng(self.keys[rows], self.owners[rows])

    def fork(self, label: str | int | Tensor) -> "SampleRng":
        """New streams for ``label``: a purpose, a step number, or (B,) int64 step numbers of each sample."""
        if self._ahead is not None and isinstance(label, str):
            ahead, place = self._ahead
            return self._at(ahead.fork(label), place)
        if isinstance(label, int) and self.keys.is_cuda and 0 <= label < 1 << 31:
            return self._at_step(label)
        return SampleRng(_forked(self.keys, label), self.owners)

    def _at_step(self, step: int) -> "SampleRng":
        if not self._steps:  # a single step is drawn for by itself
            self._steps.append(None)
            return SampleRng(_forked(self.keys, step), self.owners)
        ahead = self._steps[0]
        if ahead is None or not ahead.first <= step < ahead.first + AHEAD:
            steps = torch.arange(step, step + AHEAD, device=self.keys.device)
            ahead = self._steps[0] = _Ahead(_forked(self.keys, steps[:, None]), step)
        return self._at(ahead, step - ahead.first)

    def _at(self, ahead: _Ahead, place: int) -> "SampleRng":
        return SampleRng(ahead.keys[place], self.owners, _ahead=(ahead, place))

    def words(self, lanes: int) -> Tensor:
        """(B, lanes) int64 of uniformly random bits."""
        return self._draw(_as_they_are, lanes)

    def _draw(self, kind: Callable[[Tensor], Tensor], lanes: int) -> Tensor:
        """What ``kind`` makes of words (B, lanes)."""
        if self._ahead is None or lanes > AHEAD:  # many are worth a launch, and memory
            return kind(_words(self.keys, lanes))
        ahead, place = self._ahead
        return ahead.draw(kind, lanes, place)

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) float32, uniform on [0, 1) in steps of 2^-24."""
        return self._draw(_uniform, math.prod(shape)).view(-1, *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """(B, *shape) int64, uniform on 0 .. high - 1 (bias below high / 2^24)."""
        return (self.uniform(*shape) * high).long()

    def coins(self, *shape: int) -> Tensor:
        """(B, *shape) bool, heads with probability one half."""
        return self._draw(_coins, math.prod(shape)).view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32, standard normal by Box and Muller (1958): two values from each word."""
        size = math.prod(shape)
        words = self.words((size + 1) // 2)
        radius = torch.sqrt(-2 * torch.log(_unit(words, 40) + 2**-25))
        angle = 2 * math.pi * _unit(words, 16)
        pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=2)
        return pairs.flatten(1)[:, :size].reshape(-1, *shape)


pinned: ContextVar[int | None] = ContextVar("pinned", default=None)  # at which seed generators are held here, if any


@contextmanager
def global_generators(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Python's, NumPy's and torch's generators (a GPU's too, on such a ``device``) at ``seed``, for foreign code.

    They go on afterwards as if nothing had been drawn.
    """
    cuda = device is not None and device.type == "cuda"
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002
    token = pinned.set(seed)
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would note down a seed for GPUs not yet in use
        if cuda:
            torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            pinned.reset(token)
            random.setstate(python)
            np.random.set_state(array)  # noqa: NPY002


def _forked(keys: Tensor, label: str | int | Tensor) -> Tensor:
    word = _hash(label) if isinstance(label, str) else label
    offset = _signed(word * _M1) if isinstance(word, int) else word * _M1
    return _mix(keys + offset)


def _words(keys: Tensor, lanes: int) -> Tensor:
    lane = torch.arange(1, lanes + 1, device=keys.device)
    return _mix(keys[..., None] + lane * _GAMMA)


def _as_they_are(words: Tensor) -> Tensor:
    return words


def _uniform(words: Tensor) -> Tensor:
    return _unit(words, 40)


def _coins(words: Tensor) -> Tensor:
    return words < 0


def _unit(words: Tensor, shift: int) -> Tensor:
    """24 bits of each word, from bit ``shift`` up, as float32 in [0, 1)."""
    return ((words >> shift) & ((1 << 24) - 1)).float() * 2**-24
