"""The gradients of a training's batches on a GPU, recorded once and replayed: what is small costs no launches then.

A step of a small network is some thousand short kernels, which the host needs longer to launch than the device to run.
A CUDA graph launches all of them at once.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 3  # batches of a size that are taken as they are before one is recorded: libraries choose their kernels
CHECKED = 2  # batches after those that are recorded and called, to be compared
SAME = 0.1  # share of the length of all gradients that bfloat16 explains; of two batches they have little in common
KNOWN = ("bench", "torch")  # packages whose layers do the same at each call, but for what their tensors say
_RECORDING = Lock()  # there is one stream to record on


def recordable(network: nn.Module) -> bool:
    """Whether ``network`` is made of layers that a recording repeats truly: Python of others' may change its mind."""
    return all(type(module).__module__.partition(".")[0] in KNOWN for module in network.modules())


def record(call: Callable[[], None], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """What does on ``device`` once more what ``call`` does; nothing is done yet.

    Args:
        call: reads and leaves what is always in the same memory, and has run :func:`aside`.
        pool: memory of the recordings that never run at the same time as this; its own without one.

    Raises:
        RuntimeError: the host waits for the device in it, or it does what cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with _RECORDING, torch.cuda.device(device):
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                call()
        except Exception:
            generator = torch.cuda.default_generators[device.index or 0]
            generator.graphsafe_set_state(generator.clone_state())  # else it waits for the end of the recording
            raise
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
    memory: tuple[int, ...]  # where the network was


class Replay:
    """Calls ``backward`` for batches on a GPU, from the fourth of each size on by a recording.

    A recording repeats what was done to the memory of the device and runs no Python. The first batches that it takes
    are called, too, and it is used where both leave the same. What cannot be recorded is called each time; ``refused``
    then says why.

    Args:
        backward: ``backward(rows, epoch)`` leaves the gradients of a batch in the parameters of ``model``, which have
            none; a function of its arguments, (B,) and () int64, and of memory that stays where it is. Of that it
            changes the buffers of ``model`` alone.
        model: on ``device``, a GPU.
    """

    def __init__(self, backward: Callable[[Tensor, Tensor], None], model: nn.Module, device: torch.device) -> None:
        self.backward, self.model, self.device = backward, model, device
        self.parameters, self.buffers = list(model.parameters()), list(model.buffers())
        self.calls: Counter[int] = Counter()
        self.recordings: dict[int, Recording] = {}
        self.refused = ""

    def __call__(self, rows: Tensor, epoch: Tensor) -> None:
        """Leave in the parameters the gradients of the batch ``rows`` (B,) of ``epoch`` (), both int64."""
        size = len(rows)
        self.calls[size] += 1
        if self.calls[size] == WARM_UP + 1 and not self.refused:
            self._record(rows, epoch)
        recording = self.recordings.get(size)
        if recording and recording.memory != self._memory():
            self.refused = "the network has moved in memory since it was recorded"
        if recording is None or self.refused:
            self._call(rows, epoch)
        elif self.calls[size] <= WARM_UP + CHECKED:
            self._compare(recording, rows, epoch)
        else:
            self._play(recording, rows, epoch)

    def _call(self, rows: Tensor, epoch: Tensor) -> None:
        self._clear()
        aside(lambda: self.backward(rows, epoch), self.device)

    def _play(self, recording: Recording, rows: Tensor, epoch: Tensor) -> None:
        for kept, given in zip(recording.inputs, (rows, epoch), strict=True):
            kept.copy_(given)
        recording.play()
        for parameter, gradient in zip(self.parameters, recording.gradients, strict=True):
            parameter.grad = gradient

    def _record(self, rows: Tensor, epoch: Tensor) -> None:
        inputs = rows.clone(), epoch.clone()
        self._clear()  # else it would add to these
        try:
            play = record(lambda: self.backward(*inputs), self.device)
        except RuntimeError as error:
            self.refused = str(error).partition("\n")[0][:200]
        else:
            self.recordings[len(rows)] = Recording(
                play, inputs, [parameter.grad for parameter in self.parameters], self._memory()
            )

    def _compare(self, recording: Recording, rows: Tensor, epoch: Tensor) -> None:
        """Play and call: what the call leaves counts."""
        before = [buffer.clone() for buffer in self.buffers]
        self._play(recording, rows, epoch)
        played = self._left(before)
        for buffer, value in zip(self.buffers, before, strict=True):
            buffer.copy_(value)
        self._call(rows, epoch)
        if not len(played[0]):
            self.refused = "no parameter has a gradient"
        for what, one, other in zip(("gradients", "statistics"), played, self._left(before), strict=True):
            gap, size = float((one - other).norm()), float(other.norm())
            if not gap <= SAME * size:  # NaN is not
                self.refused = f"the {what} of a recording are off by {gap:.2g}, where they are {size:.2g}"

    def _left(self, before: list[Tensor]) -> tuple[Tensor, Tensor]:
        """All gradients (n,), and how all statistics (m,) have moved from ``before``; counts do not drown these."""
        gradients = (parameter.grad for parameter in self.parameters)
        now, then = (_joined(filter(torch.is_floating_point, buffers)) for buffers in (self.buffers, before))
        return _joined(gradient for gradient in gradients if gradient is not None), now - then

    def _memory(self) -> tuple[int, ...]:
        return tuple(tensor.data_ptr() for tensor in chain(self.model.parameters(), self.model.buffers()))

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    """All values of ``tensors`` in float32, (n,)."""
    parts = [tensor.detach().float().flatten() for tensor in tensors]
    return torch.cat(parts) if parts else torch.zeros(0)
