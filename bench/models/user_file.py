"""Networks by name, registered ones and those of users' own files."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.errors import BenchError, ConfigError, RefereeError
from bench.models.lent import own
from bench.protocols import Architecture
from bench.registry import models
from bench.service import Asked, Called, Desk, Service, declared_by
from bench.spec import Spec
from bench.system.user_code import named_file


@dataclass(frozen=True)
class FromFile:
    """A network from a user's own file, as an architecture; ``spec`` is ``path/to/file.py:name(...)``.

    ``trained`` is what the user's object says in an attribute of that name, and true where it says nothing.
    """

    spec: str
    trained: bool

    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""

    def __call__(self, classes: int, shape: tuple[int, int, int], model_dir: Path | None) -> nn.Module:
        """A network of one's own, in eval mode; see ``Architecture``. The user's code may always return the same one.

        Raises:
            ConfigError: the user's code returns something other than a module, or one that cannot be copied.
        """

        def build() -> nn.Module:
            made = _make(Spec.parse(self.spec))
            if not isinstance(made, nn.Module):
                try:
                    made = made(classes, shape, model_dir)
                except TypeError as error:
                    raise ConfigError(
                        f"model {self.spec!r}: {error}; name something that gives a module, or takes "
                        "(classes, shape, model_dir) and gives one"
                    ) from error
            if not isinstance(made, nn.Module):
                raise ConfigError(f"model {self.spec!r} gave a {type(made).__name__}; return a torch.nn.Module")
            return made.eval()

        try:
            network = build()
            found = _answer(own(network, build), shape)
            return (_Logits if hasattr(found, "logits") else _itself)(own(network, build)).eval()
        except SystemExit as error:
            raise ConfigError(f"model {self.spec!r} exits ({error}) where it is to give a network") from error
        except RefereeError as error:
            raise ConfigError(f"model {self.spec!r}: {error}") from error
        except (BenchError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the user's own code may raise
            raise ConfigError(f"model {self.spec!r} fails ({type(error).__name__}: {error}); mend its file") from error


@dataclass(frozen=True)
class FromFunction:
    """A service in a user's own file, as an architecture; ``spec`` is ``path/to/file.py:name(...)``.

    What it names is called with NumPy images, and declares what it answers (:class:`bench.service.Service`).
    """

    spec: str

    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    trained: ClassVar[bool] = True

    @cached_property
    def _function(self) -> Callable[..., object]:
        function: Callable[..., object] = _make(Spec.parse(self.spec))
        return function

    @property
    def service(self) -> Service:
        said = declared_by(self._function)
        assert said is not None  # resolve has looked
        return said

    @property
    def random(self) -> bool:
        return self.service.random

    @property
    def stateful(self) -> bool:
        return self.service.stateful

    @property
    def batch_dependent(self) -> bool:
        return self.service.batch_dependent

    def line(self) -> Called:
        """See :meth:`bench.protocols.ServiceModel.line`."""
        return Called(self._function, self.service, self.spec)

    def __call__(self, classes: int, shape: tuple[int, int, int], model_dir: Path | None) -> nn.Module:
        """What asks it; see ``Architecture``."""
        return Asked(Desk(self.line(), classes).logits)


class _Logits(nn.Module):
    """A network that answers with an object, as those of transformers do, as one that answers with its ``logits``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x).logits
        return logits


def _itself(network: nn.Module) -> nn.Module:
    return network


def resolve(spec: Spec | str) -> Architecture:
    """The architecture that ``spec`` names, whichever of its forms a user's file defines.

    In ``path/to/file.py:name``, the name may be a module, a function or class that gives one (``name()``) or that gives
    an architecture, or a function of (classes, shape, model_dir) that gives a module; or a service, which says so.

    Raises:
        ConfigError: an unknown name, wrong arguments, or a file that gives neither module nor architecture.
    """
    spec = Spec.parse(spec) if isinstance(spec, str) else spec
    if named_file(spec.name) is None:
        return models.create(spec)
    made = _make(spec)
    if declared_by(made) is not None:
        return FromFunction(spec=str(spec))
    if not callable(made):  # a module is callable, too
        raise ConfigError(f"model {str(spec)!r} is a {type(made).__name__}; return a torch.nn.Module from it")
    return FromFile(spec=str(spec), trained=bool(getattr(made, "trained", True)))


def _make(spec: Spec) -> Any:
    """What the user's name gives without arguments of ours, or the name itself where it asks for them."""
    factory = models.factory(spec.name)
    if isinstance(factory, nn.Module) or (declared_by(factory) is not None and not isinstance(factory, type)):
        if spec.args:
            what = "network" if isinstance(factory, nn.Module) else "service"
            raise ConfigError(f"{spec.name} is a {what} and takes no arguments; name a function or class to give some")
        return factory
    if inspect.isfunction(factory) and not spec.args and (asked := _one_argument(factory)):
        raise ConfigError(
            f"{spec.name} is called with {asked}; if that is images, declare what it answers: "
            '@service(answers="probabilities"), with service from bench.service'
        )
    if _takes_the_data(factory):
        return lambda classes, shape, model_dir: factory(classes, shape, model_dir, **spec.args)
    return models.create(spec)


def _takes_the_data(factory: Callable[..., Any]) -> bool:
    try:
        return list(inspect.signature(factory).parameters)[:3] == ["classes", "shape", "model_dir"]
    except ValueError:  # built in C, with no signature to read
        return False


def _one_argument(function: Callable[..., Any]) -> str:
    """The name of the only argument that ``function`` cannot do without; empty where there are none, or more."""
    needed = [each.name for each in inspect.signature(function).parameters.values() if each.default is each.empty
              and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]  # fmt: skip
    return needed[0] if len(needed) == 1 else ""


def check_logits(module: nn.Module, classes: int, shape: tuple[int, int, int]) -> None:
    """Ask ``module`` about two grey images of ``shape`` (C, H, W), before anything slow starts.

    Raises:
        ConfigError: it does not take such images, or its answer is not finite logits (2, classes).
    """
    name = type(module).__name__
    logits = _answer(module, shape)
    if isinstance(logits, Exception | SystemExit):
        reason = (str(logits).strip().splitlines() or [type(logits).__name__])[0]
        raise ConfigError(f"{name} fails on images {shape}: {reason}; choose a model for this shape") from logits
    if not isinstance(logits, Tensor):
        part = f"[{next(iter(logits))!r}]" if isinstance(logits, Mapping) and logits else "[0]"
        raise ConfigError(
            f"{name} returns a {type(logits).__name__}; return one tensor of logits (B, {classes}), perhaps from a "
            f"module around it whose forward returns self.network(x){part}"
        )
    if logits.shape != (2, classes):
        raise ConfigError(
            f"{name} returns {tuple(logits.shape)} for 2 images; expected logits (2, {classes}), one for each class"
        )
    if not logits.isfinite().all():
        raise ConfigError(f"{name} returns NaN or infinite logits for grey images; check its weights")


@torch.no_grad()
def _answer(module: nn.Module, shape: tuple[int, int, int]) -> object:
    """What ``module`` answers to two grey images of ``shape`` (C, H, W), or the error that it raises."""
    somewhere = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    try:
        answer: object = module(torch.full((2, *shape), 0.5, device=somewhere))
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:  # whatever the network's own code may raise
        return error
    return answer
