"""The forms of JSON in which endpoints are asked and answer."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.service.declared import Service


@dataclass(frozen=True)
class Schema:
    """``encode`` makes the JSON of images (B, H, W, C), ``decode`` takes an answer to n of them apart, unchecked.

    Both are given the name of the call. Decoding raises KeyError, TypeError, ValueError or IndexError where the answer
    has another form. ``bytes_only`` tells that images are sent in 8 bits.
    """

    encode: Callable[[NDArray[Any], str], Any]
    decode: Callable[[Any, Service, int, str], object]
    bytes_only: bool = False


def _lists(images: NDArray[Any], name: str) -> Any:
    return {"instances": _numbers(images).tolist()}


def _png(images: NDArray[Any], name: str) -> Any:
    return {"instances": [{"b64": base64.b64encode(_as_png(image)).decode()} for image in images]}


def _as_png(image: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "PNG")
    return file.getvalue()


def _predictions(told: Any, service: Service, n: int, name: str) -> object:
    found = told["predictions"]
    if not service.top:
        return found
    return tuple([[each[key] for each in one] for one in found] for key in ("label", "score"))


def _tensor(images: NDArray[Any], name: str) -> Any:
    kind = {"uint8": "UINT8", "float32": "FP32"}[str(images.dtype)]
    data = _numbers(images).ravel().tolist()
    return {"id": name, "inputs": [{"name": "images", "shape": images.shape, "datatype": kind, "data": data}]}


def _outputs(told: Any, service: Service, n: int, name: str) -> object:
    if told.get("id", name) != name:
        raise ValueError("it is the answer to another call")
    found = [np.asarray(each["data"]).reshape(each["shape"]) for each in told["outputs"]]
    expected = 2 if service.top else 1
    if len(found) != expected:
        raise ValueError(f"{len(found)} outputs, where {expected} belong")
    return tuple(found) if service.top else found[0]


def _numbers(images: NDArray[Any]) -> NDArray[Any]:
    """``images`` as they are written: float32 in the digits of float64, which lose nothing."""
    return images.astype(np.float64) if images.dtype == np.float32 else images


SCHEMAS = {
    "kserve-v1": Schema(_lists, _predictions),
    "kserve-v1-png": Schema(_png, _predictions, bytes_only=True),
    "kserve-v2": Schema(_tensor, _outputs),
}
