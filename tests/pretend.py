"""A pretended GPU: the code runs on the CPU, and what a real one would refuse or wait for is refused or counted.

The device's memory is a set of storages. A tensor lives where its storage does; ``x.device`` and ``x.is_cuda`` say so,
tensors are made there by ``device=`` and moved by ``.to``, and whatever an operation makes of them is there, too. An
operation on tensors of both sides raises :class:`MixedDevices`, as on CUDA: numbers without dimensions and indices are
let pass. What makes the host wait for the device (reading a value, a shape that depends on values, a copy) is counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench import replay

GPU = torch.device("cuda", 0)

aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
READING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten._unique2.default, aten.unique_dim.default, aten.bincount.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
FREE = {aten.detach.default, aten.empty.memory_format, aten._unsafe_view.default}  # no kernels
PURGE = 500  # operations between two counts of the memory in use


class MixedDevices(RuntimeError):
    """What a real GPU would refuse."""


class PretendedGPU:
    """What is on the device, how often the host has waited for it (``waits``, by reason), its ``peak`` in bytes, and
    its ``launches``, one for each operation that is more than another view of what is there."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.peak = self.launches = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._operations = 0

    @property
    def waited(self) -> int:
        """How often the host has waited, for whatever reason."""
        return self.waits.total()

    def holds(self, x: Tensor) -> bool:
        """Whether ``x`` is on the device."""
        found = self._storages.get(x.untyped_storage()._cdata)
        return found is not None and not found[0].expired()

    def put(self, x: Tensor) -> None:
        """Take the memory of ``x`` for the device's."""
        storage = x.untyped_storage()
        self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def measure(self) -> None:
        """Count the memory in use, and forget what is not."""
        self._storages = {key: kept for key, kept in self._storages.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))

    def tick(self) -> None:
        """Another operation."""
        self._operations += 1
        if self._operations % PURGE == 0:
            self.measure()


class _Operations(TorchDispatchMode):
    """Where results live, and what may not meet."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu, self.making = gpu, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():  # so that looking at a tensor is no call
            inputs = list(_tensors((args, kwargs)))
            there = [self.gpu.holds(value) for value in inputs]
            if any(there):
                self._watch(func, args, inputs, there)
            result = func(*args, **kwargs)
            if any(there) or self.making:
                self.gpu.launches += not func.is_view and func not in FREE
                for value in _tensors(result):
                    if not self.gpu.holds(value):
                        self.gpu.put(value)
            return result

    def _watch(self, func: Any, args: Any, inputs: list[Tensor], there: list[bool]) -> None:
        """Refuse what has tensors of both sides, and count what the host waits for."""
        gpu, indexing = self.gpu, func in INDEXING
        gpu.tick()
        if any(value.ndim and not held for value, held in zip(inputs, there, strict=True)):
            values = there[-1] or not inputs[-1].ndim or func is aten.index.Tensor
            if func is not aten.copy_.default and not (indexing and there[0] and values):
                where = (f"{'device' if held else 'host'} {tuple(x.shape)}"
                         for x, held in zip(inputs, there, strict=True))  # fmt: skip
                raise MixedDevices(f"{func}: {', '.join(where)}")
            gpu.waits["index of the host" if indexing else "copy_"] += 1
        if indexing and any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1])):
            gpu.waits["mask"] += 1
        elif func in READING:
            gpu.waits[str(func)] += 1


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


class _Calls(TorchFunctionMode):
    """What Python sees: where tensors are, and how they get there and back."""

    def __init__(self, gpu: PretendedGPU, operations: _Operations) -> None:
        super().__init__()
        self.gpu, self.operations = gpu, operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        special = SPECIAL.get(func)
        if special is not None:
            return special(self, func, *args, **kwargs)
        if not _is_gpu(kwargs.get("device")):
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise MixedDevices(f"{func.__name__}: a generator of the host draws for the device")
        if func in (torch.tensor, torch.as_tensor):
            self.gpu.waits["tensor of host values"] += 1
        self.operations.making, before = True, self.operations.making
        try:
            made = func(*args, **{**kwargs, "device": "cpu"})
        finally:
            self.operations.making = before
        self.gpu.put(made)
        return made

    def device(self, func: Any, x: Tensor) -> torch.device:
        return GPU if self.gpu.holds(x) else torch.device("cpu")

    def is_cuda(self, func: Any, x: Tensor) -> bool:
        return self.gpu.holds(x)

    def is_cpu(self, func: Any, x: Tensor) -> bool:
        return not self.gpu.holds(x)

    def to(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *kwargs.values()]
        like = next((value for value in given if isinstance(value, Tensor)), None)
        place = next((value for value in given if isinstance(value, str | torch.device)), None)
        dtype = next((value for value in given if isinstance(value, torch.dtype)), None)
        if like is not None:
            place, dtype = self.device(None, like), like.dtype
        layout = kwargs.get("memory_format") or torch.preserve_format
        moved: Tensor = func(x, dtype or x.dtype, memory_format=layout)
        here, there = self.gpu.holds(x), self.gpu.holds(x) if place is None else _is_gpu(place)
        if here == there:
            return moved
        self.gpu.waits["to the device" if there else "to the host"] += 1
        with torch._C.DisableTorchFunction():
            return _Copied.apply(moved, self.gpu if there else None)  # type: ignore[no-any-return]

    def cpu(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.to(torch.Tensor.to, x, "cpu")

    def cuda(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.to(torch.Tensor.to, x, GPU)

    def numpy(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.gpu.holds(x):
            raise MixedDevices(f"{func}: NumPy cannot read the device")
        return func(x, *args, **kwargs)

    def tolist(self, func: Any, x: Tensor) -> Any:
        self.gpu.waits["tolist"] += self.gpu.holds(x)
        return func(x)

    def deepcopy(self, func: Any, x: Tensor, memo: Any) -> Tensor:
        """It copies the storage, which operations do not see."""
        waits = self.gpu.waits.copy()
        copied: Tensor = func(x, memo)
        if self.gpu.holds(x):
            self.gpu.put(copied)
            self.gpu.waits = waits
        return copied

    def one_hot(self, func: Any, y: Tensor, num_classes: int = -1) -> Tensor:
        """On the host it looks at the labels, on the device it does not."""
        if not self.gpu.holds(y) or num_classes < 0:
            self.gpu.waits["one_hot"] += self.gpu.holds(y)
            return func(y, num_classes)
        return y.new_zeros(*y.shape, num_classes).scatter_(-1, y[..., None], 1)


class _Copied(torch.autograd.Function):
    """A copy on the other side, ``gpu``'s or the host's; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gpu: PretendedGPU | None) -> Tensor:
        ctx.gpu = gpu
        return _other_side(x, gpu)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        raise MixedDevices("a gradient goes from one side to the other; nothing here needs that")


def _other_side(x: Tensor, gpu: PretendedGPU | None) -> Tensor:
    with torch.utils._python_dispatch._disable_current_modes():
        copied = x.detach().clone(memory_format=torch.preserve_format)
    if gpu is not None:
        gpu.put(copied)
    return copied


SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.Tensor.device.__get__: _Calls.device, torch.Tensor.is_cuda.__get__: _Calls.is_cuda,
    torch.Tensor.is_cpu.__get__: _Calls.is_cpu, torch.Tensor.to: _Calls.to, torch.Tensor.cpu: _Calls.cpu,
    torch.Tensor.cuda: _Calls.cuda, torch.Tensor.numpy: _Calls.numpy, torch.Tensor.__array__: _Calls.numpy,
    torch.Tensor.tolist: _Calls.tolist, torch.Tensor.__deepcopy__: _Calls.deepcopy,
    torch.nn.functional.one_hot: _Calls.one_hot,
}  # fmt: skip


def _is_gpu(place: Any) -> bool:
    return place is not None and torch.device(place).type == "cuda"


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """A GPU at :data:`GPU`, as long as the context is open."""
    gpu = PretendedGPU()
    operations = _Operations(gpu)
    nothing, autocast = torch.zeros(16, dtype=torch.uint8), torch.autocast
    stand_ins = {
        "get_rng_state": lambda *_: nothing, "set_rng_state": lambda *_: None, "manual_seed": lambda *_: None,
        "synchronize": lambda *_: None,
    }  # fmt: skip
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch, "autocast", lambda _, *args, **how: autocast("cpu", *args, **how)))
        stack.enter_context(mock.patch("bench.training.InBfloat16", side_effect=lambda model: model))
        stack.enter_context(mock.patch.object(replay, "aside", lambda call, device: call()))
        refusal = mock.Mock(side_effect=RuntimeError("a pretended GPU records nothing"))
        stack.enter_context(mock.patch.object(replay, "record", refusal))
        stack.enter_context(operations)
        stack.enter_context(_Calls(gpu, operations))
        yield gpu
