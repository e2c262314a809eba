"""Parquet files of images and labels, as Hugging Face writes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.errors import DataError


def read_table(file: Path, images: Sequence[str], labels: Sequence[str]) -> tuple[Any, str, str]:
    """A ``pyarrow.Table`` with the names of its image and its label column, which go by one of those given.

    Images are structs with ``bytes``, labels integers without gaps.

    Raises:
        DataError: it cannot be read, or has no such columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
        image, label = (next((name for name in names if name in schema.names), "") for names in (images, labels))
        kind: Any = schema.field(image).type if image else pa.null()
        inside = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
        coded = inside.get("bytes", pa.null())
        fits = pa.types.is_binary(coded) or pa.types.is_large_binary(coded)
        if not fits or not label or not pa.types.is_integer(schema.field(label).type):
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise DataError(
                f"{file} has the columns {columns[:400]}; expected {' or '.join(images)} {{bytes, path}}, bytes of "
                f"type binary, and integers in {' or '.join(labels)}"
            )
        table = pq.read_table(file)
        table.validate(full=True)
    except DataError:
        raise
    except Exception as error:  # bytes from anywhere meet a parser that raises whatever it trips over
        reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
        raise DataError(f"{file} is not a readable Parquet file ({reason}); download it again") from None
    if table.column(label).null_count:
        raise DataError(f"{file} has {table.column(label).null_count:,} rows without a label; fill them or drop them")
    return table, image, label
