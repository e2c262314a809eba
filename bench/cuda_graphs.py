"""CUDA graphs as the engine that answers for a network on a GPU: the same kernels, launched all at once.

A small network on few images leaves a GPU waiting for the launch of each of its kernels. A graph holds all launches of
one forward of so many images; batches of other sizes are cut up or padded to these. Nothing of CUDA is touched before a
network is converted.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.errors import ConfigError
from bench.replay import aside, record

SIZES = (16, 64, 256, 1024)  # images of a graph
VALUES = 2**23    # pixels times channels that the images of a graph may have, for its memory's sake
FULL = 0.7        # a share of a graph that is worth its time
ALWAYS = 64       # images up to which padding costs next to no time
WARM_UP = 2       # forwards before a recording, in which libraries choose their kernels
SAME = 0.02       # largest difference that another order of bfloat16 sums explains, as a share of a logit's own spread
FLOAT32 = 1e-6    # and of float32 sums, as a share of the largest logit, where a network makes no difference of images

Record = Callable[[nn.Module, Tensor], tuple[Tensor, Callable[[], None]]]
"""Of a network and images (B, C, H, W): logits (B, K), and what computes them anew, where they are, from whatever lies
where the images are."""

aten = torch.ops.aten
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
COPYING = {aten.copy_.default, aten._to_copy.default}


@dataclass(frozen=True)
class CudaGraphs:
    """Records networks, by what ``recorder`` makes for each of them."""

    recorder: "Callable[[], Record] | None" = None  # a GPU's
    name: str = "CUDA graphs"

    def __call__(self, network: nn.Module, images: Tensor) -> "Recorded":
        """A copy of ``network``, recorded for batches of a few sizes and compared with itself in each of them.

        Args:
            network: logits (B, K) from images (B, C, H, W), frozen, in eval mode, on the device of ``images``.
            images: some that it is tried on.

        Raises:
            Exception: it cannot be recorded: the host waits for the device in its Python, or there is no memory.
        """
        network = copy.deepcopy(network)
        with torch.no_grad(), _Watch():  # type: ignore[no-untyped-call]
            network(images.clone())
        most = VALUES // images[0].numel()
        sizes = tuple(size for size in SIZES if size <= most) or SIZES[:1]
        recorded = Recorded(network, sizes, images.shape[1:], self.recorder or Cuda)
        for size in reversed(sizes):  # the largest first, in whose memory the others have room
            many = images[torch.arange(size, device=images.device) % len(images)]
            with torch.no_grad():
                expected = network(many.clone())
                answers = [recorded(each) for each in (many, many.flip(0), many)]
            gap = max(float((expected - answer).abs().max()) for answer in (answers[0], answers[1].flip(0), answers[2]))
            own = float((expected.amax(dim=0) - expected.amin(dim=0)).max())  # what tells one image from another
            if not gap <= SAME * own + FLOAT32 * float(expected.abs().max()):  # NaN is not
                raise ConfigError(f"a recording of {size} images answers otherwise by {gap:.2g}")
        return recorded


class Recorded:
    """Logits (B, K) from images (B, C, H, W), for one question at a time and streams that follow each other.

    It never changes, so a copy is it itself; in another process it is recorded anew.
    """

    def __init__(
        self, network: nn.Module, sizes: tuple[int, ...], shape: torch.Size, recorder: Callable[[], Record]
    ) -> None:
        self._made_of = network, sizes, shape, recorder
        self._alone, self._record = Lock(), recorder()
        self._graphs: dict[int, _Graph] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Answer ``x``; images of another shape are the network's own, who is asked in the usual way."""
        network, sizes, shape, _ = self._made_of
        with self._alone, torch.no_grad():
            if x.shape[1:] != shape:
                logits: Tensor = network(x)
                return logits
            answers = [self._graph(len(part), x)(part) for part in x.split(batches(len(x), sizes))]
            return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _graph(self, count: int, like: Tensor) -> "_Graph":
        network, sizes, _, _ = self._made_of
        size = next(size for size in sizes if count <= size)
        if size not in self._graphs:
            self._graphs[size] = _Graph(network, like, size, self._record)
        return self._graphs[size]

    def __deepcopy__(self, memo: object) -> "Recorded":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorded, self._made_of


def batches(count: int, sizes: tuple[int, ...]) -> list[int]:
    """How many of ``count`` images each graph answers, given the ``sizes`` that there are, ascending.

    Whole graphs first; what is left goes into one graph where that is small or well filled, else into smaller ones.
    """
    parts = []
    while count:
        padded = next((size for size in sizes if count <= size), None)
        if padded is not None and (padded <= max(ALWAYS, sizes[0]) or count >= FULL * padded):
            break
        parts.append(max(size for size in sizes if size <= count))
        count -= parts[-1]
    return [*parts, count] if count or not parts else parts


class _Graph:
    """A recorded forward of ``size`` images, of which only the first may be asked about."""

    def __init__(self, network: nn.Module, like: Tensor, size: int, record: Record) -> None:
        with torch.inference_mode(False):
            x = torch.zeros(size, *like.shape[1:], dtype=like.dtype, device=like.device)
            self._x = x.to(memory_format=torch.channels_last)
            self._logits, self._replay = record(network, self._x)

    def __call__(self, x: Tensor) -> Tensor:
        self._x[: len(x)].copy_(x)
        self._replay()
        return self._logits[: len(x)].clone()


class Cuda:
    """Records on a GPU. What it records has one pool of memory, since nothing of it runs at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """See :data:`Record`.

        Raises:
            RuntimeError: what the network does cannot be recorded.
        """
        logits = x  # until there are some

        def forward() -> None:
            nonlocal logits
            logits = network(x)

        for _ in range(WARM_UP):
            aside(forward, x.device)
        play = record(forward, x.device, self._pool)
        return logits, play


class _Watch(TorchDispatchMode):
    """While open, refuses what makes the host wait for the device: a recording that fails may disturb other work."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``.

        Raises:
            ConfigError: the host would wait.
        """
        if func is aten.index.Tensor:
            waits = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        else:
            waits = bool(WAITING & set(func.tags))
        if waits:
            raise ConfigError(f"its Python depends on values ({func})")
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if len({tensor.device for tensor in tensors if tensor.ndim or func in COPYING}) > 1:
            raise ConfigError(f"it takes tensors from one device to another ({func})")
        return result
