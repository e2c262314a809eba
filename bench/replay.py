"""The gradients of a training's batches on a GPU, recorded once and replayed: what is small costs no launches then.

A step of a small network is some thousand short kernels, which the host needs longer to launch than the device to run.
A CUDA graph launches all of them at once.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WARM_UP = 3  # batches of a size that are taken as they are before one is recorded: libraries choose their kernels
KNOWN = ("bench", "torch")  # packages whose layers do the same at each call, but for what their tensors say


class InBfloat16(nn.Module):
    """``network`` with its products and convolutions in bfloat16; weights, statistics and logits stay float32.

    Weights are cast anew at each call: a cache would hold those of an earlier step where another autocast is around.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """The logits (B, K) of images (B, C, H, W)."""
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            logits: Tensor = self.network(x)
        return logits.float()


def recordable(network: nn.Module) -> bool:
    """Whether ``network`` is made of layers that a recording repeats truly: Python of others' may change its mind."""
    return all(type(module).__module__.partition(".")[0] in KNOWN for module in network.modules())


def record(call: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What does on ``device`` once more what ``call`` does; nothing is done yet.

    Raises:
        RuntimeError: the host waits for the device in it, or it does what cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        call()
    return graph.replay


def aside(call: Callable[[], None], device: torch.device) -> None:
    """``call`` on a stream of its own, as what is to be recorded has to have run."""
    here, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        call()
    here.wait_stream(stream)


@dataclass(frozen=True)
class Recording:
    """What ``play`` reads and leaves, always in the same memory."""

    play: Callable[[], None]
    inputs: tuple[Tensor, ...]
    gradients: list[Tensor | None]


class Replay:
    """Calls ``backward`` for batches on a GPU, from the fourth of each size on by a recording.

    A recording repeats what was done to the memory of the device and runs no Python. What cannot be recorded is called
    each time; ``refused`` then says why.

    Args:
        backward: ``backward(rows, epoch)`` leaves in ``parameters``, which have none, the gradients of a batch; a
            function of its arguments, (B,) and () int64, and of memory that stays where it is.
        parameters: all that it gives gradients to.
        device: of all of them, a GPU.
    """

    def __init__(
        self, backward: Callable[[Tensor, Tensor], None], parameters: Iterable[nn.Parameter], device: torch.device
    ) -> None:
        self.backward, self.parameters, self.device = backward, list(parameters), device
        self.calls: Counter[int] = Counter()
        self.recordings: dict[int, Recording] = {}
        self.refused = ""

    def __call__(self, rows: Tensor, epoch: Tensor) -> None:
        """Leave in the parameters the gradients of the batch ``rows`` (B,) of ``epoch`` (), both int64."""
        size = len(rows)
        self.calls[size] += 1
        if self.calls[size] > WARM_UP and size not in self.recordings and not self.refused:
            self._record(rows, epoch)
        if recording := self.recordings.get(size):
            for kept, given in zip(recording.inputs, (rows, epoch), strict=True):
                kept.copy_(given)
            recording.play()
            for parameter, gradient in zip(self.parameters, recording.gradients, strict=True):
                parameter.grad = gradient
        else:
            self._clear()
            aside(lambda: self.backward(rows, epoch), self.device)

    def _record(self, rows: Tensor, epoch: Tensor) -> None:
        inputs = rows.clone(), epoch.clone()
        self._clear()  # else it would add to these
        try:
            play = record(lambda: self.backward(*inputs), self.device)
        except RuntimeError as error:
            self.refused = str(error).partition("\n")[0][:200]
        else:
            self.recordings[len(rows)] = Recording(play, inputs, [parameter.grad for parameter in self.parameters])

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
