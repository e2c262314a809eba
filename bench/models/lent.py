"""What components are lent: a network of their own, and what of ours has changed in their hands."""

import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from hashlib import sha256
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.errors import RefereeError
from bench.system.user_code import PREFIX

NUMBERS = (int, float, complex, bool)
PLAIN = (*NUMBERS, str, bytes, type(None))
BEHAVIOUR = (FunctionType, classmethod, staticmethod, property)  # what of a class decides how its networks answer
VALUES = (*PLAIN, Tensor, np.ndarray)                              # and so do values that all of them share
Place = type | ModuleType                                          # where such values are
Contents = Mapping[str | tuple[Place, str], Any]
STORES = frozenset({"_parameters", "_buffers", "_modules"})      # attributes of a module, looked at one by one
MODULE = frozenset(vars(nn.Module()))                            # attributes of every module


def fingerprint(network: nn.Module) -> str:
    """A hash of what decides the answers of ``network`` beside its classes: the same in every process and folder.

    Tensors and numbers among its parameters, buffers and attributes and in a user's own classes and modules, such as a
    table that is loaded where it is defined, and the code of compiled parts.
    """
    digest = sha256()
    for name, value in contents(network).items():
        if isinstance(name, str) and name.rpartition(".")[2] not in MODULE:
            digest.update(repr((name, _numbers(value))).encode())
    for place in _places(network):
        for key, value in sorted(_values_in(place).items()):
            digest.update(repr((place.__name__.partition(".")[2], key, _numbers(_value(value, {})))).encode())
    for part in network.modules():
        if isinstance(part, torch.jit.ScriptModule) and hasattr(part, "code"):
            digest.update(part.code.encode())
    return digest.hexdigest()


def own(network: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """A copy of ``network`` that shares no tensor and no part with it.

    What cannot be copied is built again and given the same weights.

    Args:
        build: makes the network anew, with whatever weights.

    Raises:
        RefereeError: it can be neither copied nor built again.
    """
    for make in (partial(copy.deepcopy, network), partial(_again, network, build)):
        try:
            made = make()
        except Exception:  # copying and building run the network's own code, which may raise anything
            continue
        if not _share(network, made):
            return made
    raise RefereeError(
        f"{type(network).__name__} can be neither copied nor built again, so its cells would share it; "
        "let it be copied by copy.deepcopy, or make a new one at each call"
    )


def contents(network: nn.Module) -> Contents:
    """All that decides the answers of ``network``, to be compared with what is there later.

    Parameters, buffers, hooks and other attributes of each part by name, the functions of their classes, and what the
    classes and modules of a user's own code hold of numbers and tensors, which all networks of theirs share.
    """
    found: dict[str | tuple[Place, str], Any] = {}
    for name, part in network.named_modules():
        tensors = dict((*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)))
        attributes = {key: value for key, value in vars(part).items() if key not in STORES}
        values = {key: _value(value, {}) for key, value in {**attributes, **tensors}.items()}
        parts = {key: _Same(value) for key, value in part.named_children()}
        found |= {f"{name}.{key}".lstrip("."): value for key, value in {**values, **parts}.items()}
        for kind in type(part).__mro__:
            found |= {(kind, key): _Same(value) for key, value in vars(kind).items() if isinstance(value, BEHAVIOUR)}
    for place in _places(network):
        found |= {(place, key): _Shared(value) for key, value in _values_in(place).items()}
    return found


def changes(before: Contents, now: Contents) -> list[str]:
    """The names under which two :func:`contents` differ, those of what networks share with its class or module."""
    return [
        name if isinstance(name, str) else f"{name[0].__name__.rpartition('.')[2]}.{name[1]}"
        for name in _changed(before, now)
    ]


def restore_shared(before: Contents, now: Contents) -> None:
    """Give the classes and modules in ``now`` what they held ``before``, for networks that are not made yet."""
    for name in _changed(before, now):
        if not isinstance(name, str):
            if name in before:
                setattr(*name, before[name].held)
            else:
                delattr(*name)


def _changed(before: Contents, now: Contents) -> list[str | tuple[Place, str]]:
    missing = object()
    return [name for name in {**before, **now} if before.get(name, missing) != now.get(name, missing)]


def some(names: list[str]) -> str:
    """The first of ``names``, in a sentence."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


class _Same:
    """Equal to what holds the very same object, and to nothing else."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held

    __hash__ = None  # type: ignore[assignment]  # compared and never looked up


class _Shared:
    """Equal to what has the same value; ``held`` is that value, in memory of its own."""

    def __init__(self, value: Any) -> None:
        self.held = value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)
        self._value = _value(value, {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shared) and bool(self._value == other._value)

    __hash__ = None  # type: ignore[assignment]


class _Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    learns: bool
    digest: str


def _value(value: Any, seen: dict[int, Any]) -> Any:
    """``value`` as something that stays as it is when ``value`` changes; ``seen`` has what is being looked at."""
    if isinstance(value, PLAIN):
        return value if value == value else repr(value)  # NaN is NaN
    if isinstance(value, Tensor):
        return _Array(str(value.dtype), tuple(value.shape), value.requires_grad, _digest(value))
    if isinstance(value, np.ndarray):
        return _Array(str(value.dtype), value.shape, False, sha256(np.ascontiguousarray(value).tobytes()).hexdigest())
    if id(value) in seen or isinstance(value, (nn.Module, type, ModuleType, FunctionType)):
        return _Same(value)
    seen[id(value)] = value
    if isinstance(value, Mapping):
        return [(_value(key, seen), _value(each, seen)) for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return [_value(each, seen) for each in value]
    inside = getattr(value, "__dict__", None)
    return (_Same(value), _value(inside, seen)) if isinstance(inside, dict) else _Same(value)


def _numbers(value: Any) -> Any:
    """What of a :func:`_value` is numbers, which are the same elsewhere."""
    if isinstance(value, list | tuple) and not isinstance(value, _Array):
        return [_numbers(each) for each in value]
    return value if isinstance(value, (*NUMBERS, _Array)) else None


def _digest(value: Tensor) -> str:
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return repr(value)
    bytes_ = value.detach().resolve_conj().cpu().contiguous().reshape(-1).view(torch.uint8)
    return sha256(bytes_.numpy().data).hexdigest()


def _places(network: nn.Module) -> list[Place]:
    """The classes of ``network`` that a user's own code defines, and the modules of that code, each once."""
    kinds = {kind for part in network.modules() for kind in type(part).__mro__ if kind.__module__.startswith(PREFIX)}
    packages = {kind.__module__.partition(".")[0] for kind in kinds}
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] in packages]
    return [*sorted(kinds, key=lambda kind: kind.__qualname__), *sorted(modules, key=lambda module: module.__name__)]


def _values_in(place: Place) -> dict[str, Any]:
    return {key: value for key, value in vars(place).items() if isinstance(value, VALUES) and not key.startswith("__")}


def _again(network: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    made = build()
    made.load_state_dict(network.state_dict())
    device = next((tensor.device for tensor in _tensors(network)), torch.device("cpu"))
    return made.to(device).train(network.training)


def _share(network: nn.Module, other: nn.Module) -> bool:
    """Whether the two have a part or the memory of a tensor in common."""
    parts = {id(part) for part in network.modules()}
    memory = {tensor.data_ptr() for tensor in _tensors(network) if tensor.numel()}
    return any(id(part) in parts for part in other.modules()) or any(
        tensor.numel() and tensor.data_ptr() in memory for tensor in _tensors(other)
    )


def _tensors(network: nn.Module) -> Iterable[Tensor]:
    yield from network.parameters()
    yield from network.buffers()
