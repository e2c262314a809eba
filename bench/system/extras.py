"""Libraries that Parry can use and does not need: each is imported where it is named, and nowhere else."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from bench.errors import ConfigError


def library(module: str, extra: str) -> Any:
    """``module``, which ``pip install 'parry-bench[extra]'`` brings.

    Raises:
        ConfigError: it is not there, or does not import; the message says what to install.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(module)
    except Exception as error:  # a broken install may raise more than ImportError
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        why = "is not installed" if missing else f"does not import ({type(error).__name__}: {error})"
        raise ConfigError(f"{package} {why}; pip install 'parry-bench[{extra}]'") from error


def library_files(package: str, extra: str) -> Path:
    """The folder of ``package``, of which files are wanted and no code: importing it may take a second.

    Raises:
        ConfigError: it is not there; the message says what to install.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"{package} is not installed; pip install 'parry-bench[{extra}]'")
    return Path(found.submodule_search_locations[0])
