"""Networks of other libraries: ``robustbench:NAME``, ``timm:NAME`` and ``torchvision:NAME``.

The libraries are imported in the calls alone: they take seconds, and torchvision does not import beside every torch.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn

from bench.errors import BenchError, ConfigError, WeightsError, did_you_mean
from bench.models.normalise import Normalise, usual
from bench.models.weights import load_weights
from bench.registry import models
from bench.system.extras import library


@models("robustbench:")
@dataclass(frozen=True)
class RobustBench:
    """A network of RobustBench's model zoo, with its weights; ``threat`` is Linf, L2 or corruptions."""

    name: str
    threat: str = "Linf"
    dataset: str = "cifar10"

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Croce et al., 2021, arXiv:2010.09670"
    trained: ClassVar[bool] = True

    def __call__(self, classes: int, shape: tuple[int, int, int], model_dir: Path | None) -> nn.Module:
        """Build it, in eval mode; weights are kept in ``model_dir``, or in torch's cache. See ``Architecture``.

        Raises:
            ConfigError: an unknown name, threat or data set, or another number of classes.
            WeightsError: the weights cannot be downloaded or read.
        """
        who = f"robustbench:{self.name}"
        utils = import_robustbench()
        zoo = {data.value: {threat.value: group for threat, group in threats.items()}
               for data, threats in utils.all_models.items()}  # fmt: skip
        _known(self.dataset, zoo, f"{who}: no data set")
        _known(self.threat, zoo[self.dataset], f"{who}: no threat")
        _known(self.name, zoo[self.dataset][self.threat], f"no {self.dataset} {self.threat} model of robustbench")
        _same_classes(who, {"cifar10": 10, "cifar100": 100, "imagenet": 1000}[self.dataset], classes)
        folder = model_dir or Path(torch.hub.get_dir()) / "robustbench"
        with _loading(who, f"a download into {folder}"), _no_empty_folders(folder / self.dataset / self.threat):
            network: nn.Module = utils.load_model(self.name, str(folder), self.dataset, self.threat)
        return network.eval()


@models("timm:")
@dataclass(frozen=True)
class Timm:
    """A network of timm: with its published weights, with ``weights`` from a file, or (``pretrained=false``) with none.

    Published networks are normalised inside with the constants that timm gives for them.
    """

    name: str
    pretrained: bool = True
    weights: str | None = None

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Wightman, 2019, https://github.com/huggingface/pytorch-image-models"

    @property
    def trained(self) -> bool:
        return self.pretrained or self.weights is not None

    def __call__(self, classes: int, shape: tuple[int, int, int], model_dir: Path | None) -> nn.Module:
        """Build it, in eval mode; see ``Architecture``.

        Raises:
            ConfigError: an unknown name, or another number of classes or channels.
            WeightsError: the weights cannot be downloaded or read, or do not fit.
        """
        who = f"timm:{self.name}"
        with _quiet_imports():
            timm = library("timm", "zoo")
        if not timm.is_model(self.name):
            _known(self.name.partition(".")[0], timm.list_models(), "no model of timm")
        if self.pretrained and self.weights is None:
            _colour(who, shape)
            with _loading(who, "its download from the Hugging Face hub"):
                network = timm.create_model(self.name, pretrained=True)
            _same_classes(who, network.num_classes, classes)
        else:
            with _building(who):
                published = timm.get_pretrained_cfg(self.name)
                fixed = published is not None and published.fixed_input_size
                size = {"img_size": shape[1:]} if fixed else {}  # such networks are built for one size
                network = timm.create_model(self.name, num_classes=classes, in_chans=shape[0], **size)
            if self.weights is not None:
                load_weights(network, self.weights, model_dir, f"{who} with {classes} classes")
        published = network.pretrained_cfg
        constants = Normalise(published["mean"], published["std"]) if shape[0] == 3 else usual(shape[0])
        return nn.Sequential(constants, network).eval()


@models("torchvision:")
@dataclass(frozen=True)
class Torchvision:
    """A classifier of torchvision: published weights, ``weights`` from a file, or (``pretrained=false``) none.

    ``entry`` chooses among the published weights (``IMAGENET1K_V1``). They are normalised inside with the constants
    that torchvision gives for them.
    """

    name: str
    pretrained: bool = True
    weights: str | None = None
    entry: str = "DEFAULT"

    version: ClassVar[int] = 1
    paper: ClassVar[str] = "TorchVision, 2016, https://github.com/pytorch/vision"

    @property
    def trained(self) -> bool:
        return self.pretrained or self.weights is not None

    def __call__(self, classes: int, shape: tuple[int, int, int], model_dir: Path | None) -> nn.Module:
        """Build it, in eval mode; see ``Architecture``.

        Raises:
            ConfigError: an unknown name or entry, or another number of classes or channels.
            WeightsError: the weights cannot be downloaded or read, or do not fit.
        """
        who = f"torchvision:{self.name}"
        zoo = library("torchvision.models", "zoo")
        _known(self.name, zoo.list_models(module=zoo), "no classifier of torchvision")
        _colour(who, shape)
        if self.pretrained and self.weights is None:
            entries = zoo.get_model_weights(self.name)
            _known(self.entry, entries.__members__, f"{who}: no entry")
            published = entries[self.entry]
            _same_classes(who, len(published.meta["categories"]), classes)
            with _loading(who, f"its download from {published.url}"):
                network = zoo.get_model(self.name, weights=published, progress=False)
            preset = published.transforms()
            return nn.Sequential(Normalise(preset.mean, preset.std), network).eval()
        with _building(who), warnings.catch_warnings():
            # GoogLeNet and Inception announce another way to draw their first weights.
            warnings.filterwarnings("ignore", message="The default weight initialization", category=FutureWarning)
            network = zoo.get_model(self.name, weights=None, num_classes=classes)
        if self.weights is not None:
            load_weights(network, self.weights, model_dir, f"{who} with {classes} classes")
        return nn.Sequential(usual(shape[0]), network).eval()


def import_robustbench() -> Any:
    """``robustbench.utils``, with two faults of robustbench 1.1.1 mended.

    It asks for a package ``autoattack``, which the one that it depends on, ``pyautoattack``, is not called; and for
    ``pkg_resources``, which setuptools dropped in version 81. Both are given to it under the names that it asks for.

    Raises:
        ConfigError: it does not import all the same.
    """
    borrowed = None
    try:
        with _quiet_imports():
            if "autoattack" not in sys.modules and importlib.util.find_spec("autoattack") is None:
                sys.modules["autoattack"] = library("pyautoattack", "foreign")
                sys.modules["autoattack.state"] = library("pyautoattack.state", "foreign")
            if "pkg_resources" not in sys.modules and importlib.util.find_spec("pkg_resources") is None:
                borrowed = sys.modules["pkg_resources"] = _PkgResources("pkg_resources")
            return library("robustbench.utils", "foreign")
    finally:
        if borrowed is not None:  # nobody else should take it for the real one
            del sys.modules["pkg_resources"]


class _PkgResources(ModuleType):
    """The one function of ``pkg_resources`` that robustbench calls."""

    @staticmethod
    def resource_filename(module: str, path: str) -> str:
        """``path`` beside the file of ``module``."""
        return str(Path(sys.modules[module].__file__ or "").parent / path)


@contextmanager
def _quiet_imports() -> Iterator[None]:
    """Silence what timm and robustbench warn about on import, which no user of theirs can mend."""
    with warnings.catch_warnings():
        for message in ("pkg_resources is deprecated", "Importing from timm", "`torch.jit"):
            warnings.filterwarnings("ignore", message=message)
        yield


@contextmanager
def _loading(who: str, tried: str) -> Iterator[None]:
    """Turn whatever goes wrong while weights load into one line, and let no library unpickle code from them.

    Raises:
        WeightsError: naming the model ``who`` and what was ``tried``.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"  # torch.load obeys it over what the library asks for
    try:
        yield
    except Exception as error:  # each library's own idea of a failed download
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"no weights for {who}: tried {tried} ({type(error).__name__}: {reason}); "
            "check the network and the name, or name a local file of weights"
        ) from error
    finally:
        os.environ.pop(names[0])
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def _no_empty_folders(folder: Path) -> Iterator[None]:
    """Whatever is made of ``folder`` and of the folders above it goes again if nothing has come to lie there."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        with suppress(OSError):  # not made, or no longer empty
            for path in made:
                path.rmdir()


@contextmanager
def _building(who: str) -> Iterator[None]:
    try:
        yield
    except BenchError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{who} cannot be built for this data ({reason}); choose another network") from error


def _known(name: str, names: Iterable[str], what: str) -> None:
    names = sorted(names)
    if name not in names:
        some = f"known: {', '.join(names[:8])}{', ...' if names[8:] else ''}"
        raise ConfigError(f"{what} is named {name!r}; {did_you_mean(name, names, otherwise=some)}")


def _same_classes(who: str, has: int, classes: int) -> None:
    if has != classes:
        raise ConfigError(f"{who} has {has} classes, the data set {classes}; choose a network trained on this data set")


def _colour(who: str, shape: tuple[int, int, int]) -> None:
    if shape[0] != 3:
        raise ConfigError(f"{who} takes 3 channels, the images have {shape[0]}; choose a network of this package")
