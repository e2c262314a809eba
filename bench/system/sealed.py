"""Tensors that one step keeps on disk for a later one, bound to what they are and to what they were made of.

A file holds its tensors and a seal: a hash of them and of the recipe that made them. Nothing is taken up unchecked:
work that was altered, cut short or put there under another's name must never pass for what the recipe makes.
"""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bench.errors import StoreError
from bench.system.files import keep_file, reachable


def keep_tensors(path: Path, tensors: Mapping[str, Tensor], recipe: str) -> None:
    """Write ``tensors``, made by ``recipe``, for whoever needs them next; they may live on any device.

    Raises:
        StoreError: the disk is full or the folder cannot be made.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    keep_file(path, save(plain, {"seal": _seal(plain, recipe)}))


def kept_tensors(path: Path, recipe: str) -> dict[str, Tensor] | None:
    """What :func:`keep_tensors` wrote as ``path``, mapped into memory, where writing to it changes no file.

    ``None`` where there is nothing, or a file from before there were seals, which cannot be checked: make it again.

    Raises:
        StoreError: what is there is not what ``recipe`` made.
    """
    if not reachable(path, Path.is_file):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            seal = (file.metadata() or {}).get("seal")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read ({type(error).__name__}); delete it: it will be made again") from None
    if seal is None:
        return None
    if seal != _seal(tensors, recipe):
        raise StoreError(f"{path} is not what was written there; delete it: it will be made again")
    return tensors


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of the names, types, shapes and bytes of ``tensors``, wherever they live."""
    digest = sha256()
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _seal(tensors: Mapping[str, Tensor], recipe: str) -> str:
    return sha256(f"{recipe}\n{fingerprint(tensors)}".encode()).hexdigest()
