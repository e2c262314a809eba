"""Random numbers that belong to a sample, not to a batch.

A sample's numbers are a function of (seed, sample id, path of forks, lane) alone. No state is kept, so they do not
depend on who shares the batch, on the batch size, on the order or on the device count, and a run can resume anywhere.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
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


@lru_cache(maxsize=1024)
def _hash(label: str) -> int:
    return _signed(int.from_bytes(blake2b(label.encode(), digest_size=8).digest(), "big"))


@dataclass(frozen=True)
class SampleRng:
    """One independent stream of random numbers for each sample of a batch.

    ``fork`` gives a new stream for a purpose, a restart or a step; the same fork always gives the same numbers, so two
    draws that must differ need two forks. Source: counter-based generation as in Salmon et al., SC 2011, with
    SplitMix64's finaliser as the bijection.
    """

    keys: Tensor    # (B,) int64
    owners: Tensor  # (B,) int64, the same in every fork of a sample's streams and unlike those of other samples

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
        word = _hash(label) if isinstance(label, str) else label
        offset = _signed(word * _M1) if isinstance(word, int) else word * _M1
        return SampleRng(_mix(self.keys + offset), self.owners)

    def fan(self, *labels: str) -> "SampleRng":
        """The forks of every label of ``labels``, one after another: (labels * B) streams, in the launches of one."""
        keys = torch.cat([self.keys + _signed(_hash(label) * _M1) for label in labels])
        return SampleRng(_mix(keys), self.owners.repeat(len(labels)))

    def words(self, lanes: int) -> Tensor:
        """(B, lanes) int64 of uniformly random bits."""
        lane = torch.arange(1, lanes + 1, device=self.keys.device)
        return _mix(self.keys[:, None] + lane * _GAMMA)

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) float32, uniform on [0, 1) in steps of 2^-24."""
        return _unit(self.words(math.prod(shape)), 40).view(-1, *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """(B, *shape) int64, uniform on 0 .. high - 1 (bias below high / 2^24)."""
        return integers(self.words(math.prod(shape)), high).view(-1, *shape)

    def coins(self, *shape: int) -> Tensor:
        """(B, *shape) bool, heads with probability one half."""
        return coins(self.words(math.prod(shape))).view(-1, *shape)

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


def integers(words: Tensor, high: int) -> Tensor:
    """Of each of ``words`` an int64, uniform on 0 .. high - 1, as :meth:`SampleRng.integers` gives."""
    return (_unit(words, 40) * high).long()


def coins(words: Tensor) -> Tensor:
    """Of each of ``words`` a bool, as :meth:`SampleRng.coins` gives."""
    return words < 0


def _unit(words: Tensor, shift: int) -> Tensor:
    """24 bits of each word, from bit ``shift`` up, as float32 in [0, 1)."""
    return ((words >> shift) & ((1 << 24) - 1)).float() * 2**-24
