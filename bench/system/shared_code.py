"""Code that all cells share, the benchmark's own, torch's and NumPy's, and what a component has replaced of it.

Whoever replaces a function replaces it for the referee and for every other cell. So what is there is written down
before anybody's code runs, compared afterwards, and put back. It is no sandbox: what is undone before anybody looks,
or done to values and not to code, is not seen.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from operator import is_
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import _compile
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from bench.errors import RefereeError

OURS = ("bench", "attacks", "defenses")
OTHERS = ("builtins", "hashlib", "json", "numpy", "pandas", "torch", "torch.autograd", "torch.nn.functional")
CLASSES = (torch.Tensor, torch.nn.Module)
HOOKS = [name for name in vars(hooks) if name.startswith("_global_") and isinstance(getattr(hooks, name), dict)]
BEHAVIOUR = (FunctionType, BuiltinFunctionType, classmethod, staticmethod, property, type, ModuleType)
CONSTANT = (bool, int, float, str, bytes, tuple, frozenset)
Place = ModuleType | type


@contextmanager
def shared_code() -> Iterator["SharedCode"]:
    """What is there now, and again when the context ends."""
    kept = SharedCode()
    try:
        yield kept
    finally:
        kept.replaced()


class SharedCode:
    """What is there when this is made."""

    def __init__(self) -> None:
        self._places = [(place, dict(vars(place))) for place in _places()]
        every = chain.from_iterable(values.values() for _, values in self._places)
        functions = {id(each): each for each in chain.from_iterable(map(_functions, every))}
        self._functions = [(function, _inside(function)) for function in functions.values()]
        self._hooks = {name: dict(getattr(hooks, name)) for name in HOOKS}
        self._modes, self._traced = len(_modes()), (sys.gettrace(), sys.getprofile())

    def check(self, who: str) -> None:
        """Put everything back, and raise a RefereeError that blames ``who`` if there was anything."""
        if names := self.replaced():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise RefereeError(
                f"{who} has replaced {', '.join(names[:3])}{more}, code that the referee and all cells share; "
                "give what is yours names of its own"
            )

    def replaced(self) -> list[str]:
        """The names of what has been replaced since, which is put back."""
        return [*self._names(), *self._bodies(), *self._elsewhere()]

    def _names(self) -> Iterator[str]:
        for place, before in self._places:
            now = vars(place)
            if not all(map(is_, before.values(), map(now.get, before))):
                for name, value in before.items():
                    if now.get(name) is not value and _decides(place, name, value, now.get(name)):
                        setattr(place, name, value)
                        yield f"{_name(place)}.{name}"
        for kind in CLASSES:
            known = next(before for place, before in self._places if place is kind)
            for name in [name for name in vars(kind) if name not in known and hasattr(super(kind, kind), name)]:
                delattr(kind, name)
                yield f"{_name(kind)}.{name}"

    def _bodies(self) -> Iterator[str]:
        for function, inside in self._functions:
            if not all(map(is_, inside, _inside(function))):
                function.__code__, function.__defaults__, function.__kwdefaults__ = inside
                yield f"{function.__module__}.{function.__qualname__}"

    def _elsewhere(self) -> Iterator[str]:
        for name, before in self._hooks.items():
            registered = getattr(hooks, name)
            if dict(registered) != before:
                registered.clear()
                registered.update(before)
                yield f"the hooks of all networks ({name})"
        if len(modes := _modes()) > self._modes:
            for _ in modes[self._modes :]:
                torch._C._pop_torch_function_stack()
            yield f"what torch's functions do ({type(modes[-1]).__name__})"
        if self._traced != (sys.gettrace(), sys.getprofile()):
            sys.settrace(self._traced[0])
            sys.setprofile(self._traced[1])
            yield "what Python calls at every step (sys.settrace or sys.setprofile)"


def _places() -> Iterator[Place]:
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        ours = isinstance(name, str) and name.partition(".")[0] in OURS
        if isinstance(module, ModuleType) and (ours or name in OTHERS):
            yield module
            if ours:
                kinds = [value for value in vars(module).values() if isinstance(value, type)]
                yield from (kind for kind in kinds if kind.__module__ == name)
    yield from CLASSES


def _decides(place: Place, name: str, before: Any, now: Any) -> bool:
    """Whether it is code that was replaced, or a constant of ours; not what modules note for themselves."""
    if isinstance(before, BEHAVIOUR):
        return not (_torch_wraps(before, now) or _torch_names(before, now))
    ours = (place.__name__ if isinstance(place, ModuleType) else place.__module__).partition(".")[0] in OURS
    return ours and name.isupper() and isinstance(before, CONSTANT) and bool(before != now)


def _torch_wraps(before: Any, now: Any) -> bool:
    """Whether ``now`` is torch's own wrapper of ``before``: its compiler wraps ``torch.manual_seed`` when it is first
    imported, which any training does."""
    if not (isinstance(before, FunctionType) and isinstance(now, FunctionType)):
        return False
    wrapper: Any = _compile._disable_dynamo(before)
    return now.__code__ is wrapper.__code__ and _held(now) == _held(wrapper)


def _torch_names(before: Any, now: Any) -> bool:
    """Whether both are classes of torch's storage: ``torch.Storage`` is that of its default type, whichever that is."""
    known: set[type] = torch._storage_classes
    return isinstance(now, type) and {before, now} <= known


def _held(function: FunctionType) -> list[int]:
    """What it holds of the scope that it was defined in, by identity."""
    return [id(cell.cell_contents) for cell in function.__closure__ or ()]


def _functions(value: Any) -> Iterator[FunctionType]:
    kind = type(value)
    if kind is FunctionType:
        yield value
    elif kind is classmethod or kind is staticmethod:
        yield from _functions(value.__func__)
    elif kind is property:
        yield from _functions(value.fget)


def _inside(function: FunctionType) -> tuple[Any, ...]:
    return function.__code__, function.__defaults__, function.__kwdefaults__


def _name(place: Place) -> str:
    return place.__name__ if isinstance(place, ModuleType) else f"{place.__module__}.{place.__qualname__}"


def _modes() -> list[Any]:
    """What stands between torch's functions and whoever calls them; a default device is put back by others."""
    return [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
