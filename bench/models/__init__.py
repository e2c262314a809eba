"""Networks by name. Each family is one file here; importing the package registers them all."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bench.errors import ConfigError
from bench.protocols import Architecture
from bench.registry import import_all, models
from bench.spec import Spec

import_all(__name__)


@dataclass(frozen=True)
class FromFile:
    """A network from a user's own file, as an architecture; ``spec`` is ``path/to/file.py:name(...)``.

    ``trained`` is what the user's object says in an attribute of that name, and true where it says nothing. ``source``
    is a hash of the file, so that an edit makes another model.
    """

    spec: str
    source: str
    trained: bool

    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""

    def __call__(self, classes: int, shape: tuple[int, int, int], model_dir: Path | None) -> nn.Module:
        """Build it anew, in eval mode; see ``Architecture``.

        Raises:
            ConfigError: the user's code returns something other than a module.
        """
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


def resolve(spec: Spec | str) -> Architecture:
    """The architecture that ``spec`` names, whichever of its forms a user's file defines.

    In ``path/to/file.py:name``, the name may be a function or class that gives a module (``name()``), one that gives an
    architecture, or a function of (classes, shape, model_dir) that gives a module.

    Raises:
        ConfigError: an unknown name, wrong arguments, or a file that gives neither module nor architecture.
    """
    spec = Spec.parse(spec) if isinstance(spec, str) else spec
    path = spec.name.partition(":")[0]
    if not path.endswith(".py"):
        return models.create(spec)
    made = _make(spec)
    if not callable(made):  # a module is callable, too
        raise ConfigError(f"model {str(spec)!r} is a {type(made).__name__}; return a torch.nn.Module from it")
    return FromFile(
        spec=str(spec),
        source=sha256(Path(path).read_bytes()).hexdigest()[:12],
        trained=bool(getattr(made, "trained", True)),
    )


def _make(spec: Spec) -> Any:
    """What the user's name gives without arguments of ours, or the name itself where it asks for them."""
    factory = models.factory(spec.name)
    if _takes_the_data(factory):
        return lambda classes, shape, model_dir: factory(classes, shape, model_dir, **spec.args)
    return models.create(spec)


def _takes_the_data(factory: Callable[..., Any]) -> bool:
    try:
        return list(inspect.signature(factory).parameters)[:3] == ["classes", "shape", "model_dir"]
    except ValueError:  # built in C, with no signature to read
        return False


@torch.no_grad()
def check_logits(module: nn.Module, classes: int, shape: tuple[int, int, int]) -> None:
    """Ask ``module`` about two grey images of ``shape`` (C, H, W), before anything slow starts.

    Raises:
        ConfigError: it does not take such images, or its answer is not finite logits (2, classes).
    """
    name = type(module).__name__
    somewhere = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    images = torch.full((2, *shape), 0.5, device=somewhere)
    try:
        logits: object = module(images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{name} fails on images {shape}: {reason}; choose a model for this shape") from error
    if not isinstance(logits, Tensor):
        raise ConfigError(f"{name} returns a {type(logits).__name__}; return one tensor of logits (B, {classes})")
    if logits.shape != (2, classes):
        raise ConfigError(
            f"{name} returns {tuple(logits.shape)} for 2 images; expected logits (2, {classes}), one for each class"
        )
    if not logits.isfinite().all():
        raise ConfigError(f"{name} returns NaN or infinite logits for grey images; check its weights")
