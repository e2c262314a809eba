"""Weights from files: read as data, never as code, and only where they fit."""

import glob
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from bench.errors import WeightsError
from bench.system.files import reachable
from bench.system.sealed import fingerprint

SHOWN = 3  # how many keys of each kind an error names


def load_weights(module: nn.Module, path: str | Path, model_dir: Path | None, architecture: str = "") -> None:
    """Load the weights in a file into ``module``, in place.

    ``.safetensors`` is read by its library; anything else by ``torch.load(weights_only=True)``: a state dict, or a dict
    that holds one under ``state_dict``. Where there is no ``name.safetensors`` but ``name-00001-of-00002.safetensors``
    and so on, as large ones are kept, the parts are joined. A leading ``module.`` of every key (DataParallel) is
    dropped. ``architecture`` is what errors call the module; its class name where empty.

    Raises:
        WeightsError: no such file, one that cannot be read without running code, or weights of another architecture.
    """
    file, parts = _find(Path(path).expanduser(), model_dir)
    state = {key: value for part in parts for key, value in _read(part).items()}
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    put_weights(module, state, file, architecture)


def put_weights(module: nn.Module, state: Mapping[str, Tensor], file: Path | str, architecture: str = "") -> None:
    """Copy the weights ``state``, which come from ``file``, or whatever it is called, into ``module``.

    Raises:
        WeightsError: they are of another architecture, or no numbers that it could compute with.
    """
    problems = _misfits(module.state_dict(), state)
    if problems:
        expected = architecture or type(module).__name__
        raise WeightsError(f"{file} does not fit {expected}: {'; '.join(problems)}; name weights of that architecture")
    module.load_state_dict(state, strict=False)  # strictly but for the batch counters that _misfits lets be missing


def state_fingerprint(module: nn.Module) -> str:
    """A hash of all tensors in the state dict: see :func:`fingerprint`."""
    return fingerprint({name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)})


def save_parts(state: Mapping[str, Tensor], path: Path, most: int) -> list[Path]:
    """Write ``state`` as safetensors of at most ``most`` bytes of tensors each, which :func:`load_weights` joins.

    A tensor that is larger has a part to itself.

    Returns:
        The files, ``path`` alone if one is enough.
    """
    parts: list[dict[str, Tensor]] = [{}]
    room = most
    for key, value in state.items():
        if value.nbytes > room and parts[-1]:
            parts.append({})
            room = most
        parts[-1][key] = value.contiguous()
        room -= value.nbytes
    files = [path.with_name(f"{path.stem}-{number:05d}-of-{len(parts):05d}{path.suffix}")
             for number in range(1, len(parts) + 1)] if len(parts) > 1 else [path]  # fmt: skip
    for file, part in zip(files, parts, strict=True):
        safetensors.torch.save_file(part, file)
    return files


def _find(path: Path, model_dir: Path | None) -> tuple[Path, list[Path]]:
    """Where the weights are, and the files that hold them."""
    places = [path] if model_dir is None or path.is_absolute() else [path, model_dir / path]
    for place in places:
        if reachable(place, Path.is_file):
            return place, [place]
        parts = sorted(place.parent.glob(f"{glob.escape(place.stem)}-?????-of-?????{glob.escape(place.suffix)}"))
        if parts:
            count = int(parts[0].stem[-5:]) if parts[0].stem[-5:].isdigit() else 0
            expected = [f"{place.stem}-{number:05d}-of-{count:05d}{place.suffix}" for number in range(1, count + 1)]
            if [part.name for part in parts] != expected:
                names = ", ".join(part.name for part in parts)
                raise WeightsError(f"{place} is in parts, and {names} are not all of one set; copy all of them")
            return place, parts
    raise WeightsError(f"no weights at {' or '.join(map(str, places))}; check the path or the folder of models")


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(file)
        else:
            with warnings.catch_warnings():
                # What comes of another protocol is seen below: either tensors or an error.
                warnings.simplefilter("ignore")
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{file} holds more than tensors, or is broken, and is not unpickled because that could run code; "
            "convert it to safetensors"
        ) from error
    except Exception as error:  # a broken file may make its reader raise anything at all
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{file} cannot be read as weights ({reason}); copy it again") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{file} holds a {type(content).__name__}; save model.state_dict()")
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise WeightsError(f"{file} holds a {type(value).__name__} under {key!r}; save model.state_dict() alone")
        if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized or value.is_nested:
            kind = "meta" if value.device.type == "meta" else str(value.layout).removeprefix("torch.")
            raise WeightsError(f"{file} holds no plain numbers under {key!r} ({kind}); save dense tensors, on the CPU")
    return dict(content)


def _misfits(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """In what the given weights differ from the expected ones, one phrase for each kind of difference."""
    missing = [key for key in expected if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in expected]
    misshapen = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in given and given[key].shape != value.shape
    ]
    mistyped = [
        f"{key} {_type(given[key])} instead of {_type(value)}"
        for key, value in expected.items()
        if key in given and _sort(given[key]) != _sort(value)
    ]
    nan = [key for key in expected if key in given and given[key].is_floating_point() and given[key].isnan().any()]
    kinds = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshapen, "mistyped": mistyped, "NaN": nan}
    return [
        f"{len(keys)} {kind} ({', '.join(keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''})"
        for kind, keys in kinds.items()
        if keys
    ]


def _sort(value: Tensor) -> tuple[bool, bool]:
    """Whether its numbers are complex, and whether they are whole: what copying would lose."""
    return value.is_complex(), not (value.is_complex() or value.is_floating_point())


def _type(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
