"""Columns of Arrow as numpy has them. Arrow's own way imports pandas, which takes longer than most tables."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

NUMBERS = {
    kind().id
    for kind in (
        pa.int8, pa.int16, pa.int32, pa.int64, pa.uint8, pa.uint16, pa.uint32, pa.uint64,
        pa.float16, pa.float32, pa.float64,
    )
}  # fmt: skip


def as_numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    """Its values; numbers that are missing are NaN, texts that are None."""
    parts = [_values(chunk) for chunk in column.chunks]
    return np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.zeros(0)


def _values(chunk: pa.Array) -> NDArray[Any]:
    kind, whole = chunk.type, not chunk.null_count
    number = kind.id in NUMBERS
    if whole and number:
        return np.from_dlpack(chunk)
    if whole and pa.types.is_boolean(kind):
        bits = np.unpackbits(np.frombuffer(chunk.buffers()[1], np.uint8), bitorder="little")
        return bits[chunk.offset : chunk.offset + len(chunk)].astype(bool)
    if whole and pa.types.is_string(kind) and (texts := _of_one_length(chunk)) is not None:
        return texts
    return np.array(chunk.to_pylist(), dtype=float if number else object)


def _of_one_length(chunk: pa.Array) -> NDArray[Any] | None:
    """The texts where all have as many ASCII characters, such as hashes; None where they do not."""
    _, places, characters = chunk.buffers()
    starts = np.frombuffer(places, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    width = int(starts[1] - starts[0]) if len(chunk) else 0
    if not width or (np.diff(starts) != width).any():
        return None
    text = characters.to_pybytes()[starts[0] : starts[-1]]
    return np.frombuffer(text, f"S{width}").astype(f"U{width}") if text.isascii() and b"\0" not in text else None
