"""The final examples of a shard, exactly as they were judged: the proof of its records, for whoever asks again.

One line for each sample: its number, and its pixels as float32 in [0, 1], row by row, channel by channel. Whoever has
the model can ask it about them again and see the classes that the records hold, without any attack.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.errors import StoreError
from bench.results.shards import LARGEST_TABLE, REMEDY, content_of

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".examples.parquet"


def examples_path(table: Path) -> Path:
    """Where the examples lie whose records are in ``table``."""
    return table.with_name(table.stem + SUFFIX)


def write_examples(ids: Sequence[int], images: "Tensor") -> bytes:
    """The file of the ``images`` (B, C, H, W) of the samples ``ids``.

    Attacks that step by signs leave few different values, which a dictionary holds in a third of the space.
    """
    flat = images.detach().cpu().float().flatten(1).contiguous()
    pixels = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1).numpy()), flat.shape[1])
    file = io.BytesIO()
    pq.write_table(pa.table({"sample_id": pa.array(ids, pa.int64()), "pixels": pixels}), file, compression="zstd")
    return file.getvalue()


def read_examples(path: Path, ids: Sequence[int], shape: tuple[int, int, int]) -> "Tensor":
    """The images (B, C, H, W) of the samples ``ids`` that :func:`write_examples` wrote as ``path``.

    Raises:
        StoreError: the file is missing, too large, damaged, of other samples or of another shape.
    """
    import torch  # not at the top: tables need where examples lie, and no more

    content = content_of(path, LARGEST_TABLE)
    wanted = len(ids) * int(np.prod(shape))
    try:
        file = pq.ParquetFile(io.BytesIO(content))
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        values = sum(group.column(1).num_values for group in groups if group.num_columns == 2)
        size = sum(group.total_byte_size for group in groups)
        if (file.metadata.num_rows, values) != (len(ids), wanted) or size > LARGEST_TABLE:  # before any is unpacked
            raise StoreError(f"{path} holds {values:,} values where {wanted:,} belong; {REMEDY}")
        table = file.read()
        found = table.column("sample_id").to_pylist()
        pixels = table.column("pixels").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    except StoreError:
        raise
    except Exception as error:  # of a stranger's file, whatever its reader raises
        raise StoreError(f"{path} cannot be read ({type(error).__name__}); {REMEDY}") from None
    if found != list(ids) or pixels.dtype != np.float32 or len(pixels) != wanted:
        raise StoreError(f"{path} is not of the samples that its records are of; {REMEDY}")
    return torch.from_numpy(pixels.copy()).reshape(len(ids), *shape)
