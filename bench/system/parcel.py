"""Objects on their way to a process of ours that began clean, with the users' files in which their classes are."""

import io
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.errors import ConfigError
from bench.system import user_code


def pack(thing: object) -> bytes:
    """``thing``, and where we are: working directory, import path, environment.

    Raises:
        Exception: whatever pickling raises, which runs the components' own code.
    """
    inside, files = pickle.dumps(thing), user_code.loaded()
    here = {"path": list(sys.path), "folder": os.getcwd(), "environment": dict(os.environ)}  # noqa: PTH109
    unchanged = [package for package, file in files.items() if _is_there(file, package)]
    return pickle.dumps({**here, "files": files, "unchanged": unchanged, "inside": inside})


def unpack(parcel: bytes | bytearray) -> Any:
    """What was packed, once this process is where it was packed.

    Raises:
        Exception: whatever unpickling raises; a user's file that has changed since gives other classes, so it fails.
    """
    sent = pickle.loads(parcel)
    sys.path[:] = sent["path"]
    os.chdir(sent["folder"])
    os.environ.clear()
    os.environ.update(sent["environment"], TMPDIR=tempfile.gettempdir())  # which is our own
    return _Unpickler(sent["inside"], sent["files"]).load()


def unpack_elsewhere(parcel: bytes | bytearray) -> Any:
    """What was packed on another machine, perhaps, of which this process takes over nothing but where modules are.

    Raises:
        ConfigError: a user's file is not here, or is another one.
        Exception: whatever unpickling raises.
    """
    sent = pickle.loads(parcel)
    sys.path += [place for place in sent["path"] if place not in sys.path and Path(place).exists()]
    if Path(sent["folder"]).is_dir():  # paths in names of components are relative to it
        os.chdir(sent["folder"])
    for package in sent["unchanged"]:  # others were gone where it was packed, and nobody needs them
        if not _is_there(file := sent["files"][package], package):
            raise ConfigError(f"{file} is not there, or is another one; put it, as it is here, at the same path there")
    return _Unpickler(sent["inside"], sent["files"]).load()


def _is_there(file: Path, package: str) -> bool:
    """Whether ``file`` is still the one that was loaded as ``package``."""
    return file.is_file() and user_code.package_of(file) == package


class _Unpickler(pickle.Unpickler):
    """Loads the users' files in which it looks for a class."""

    def __init__(self, data: bytes, files: dict[str, Path]) -> None:
        super().__init__(io.BytesIO(data))
        self._files = files

    def find_class(self, module: str, name: str) -> Any:
        package = module.partition(".")[0]
        if package in self._files and package not in sys.modules:
            user_code.load(self._files[package])
        return super().find_class(module, name)
