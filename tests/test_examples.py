"""The final examples that a run keeps: exactly what was judged, and read with suspicion."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bench.errors import StoreError
from bench.measure.pipeline import Pipeline
from bench.results.examples import SUFFIX, examples_path, read_examples, write_examples
from bench.results.store import Store, place
from bench.run.runner import run
from tests.test_runner import Silent, grid

SHAPE = 1, 2, 3
IMAGES = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))


def written(folder: Path, content: bytes) -> Path:
    path = folder / f"000000-000004-abc{SUFFIX}"
    path.write_bytes(content)
    return path


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path):
    path = written(tmp_path, write_examples([3, 5, 7, 8], IMAGES))
    assert torch.equal(read_examples(path, [3, 5, 7, 8], SHAPE), IMAGES)


@pytest.mark.parametrize("ids", [[3, 5, 7, 9], [3, 5, 7], [3, 5, 7, 8, 9]])
def test_examples_of_other_samples_are_refused(tmp_path, ids):
    path = written(tmp_path, write_examples([3, 5, 7, 8], IMAGES))
    with pytest.raises(StoreError, match=r"samples|values"):
        read_examples(path, ids, SHAPE)


def bomb() -> bytes:
    """A gigabyte of zeros in a few kilobytes."""
    file = io.BytesIO()
    pixels = pa.FixedSizeListArray.from_arrays(pa.array([0.0] * 4_000_000, pa.float32()), 1_000_000)
    pq.write_table(pa.table({"sample_id": pa.array([3, 5, 7, 8], pa.int64()), "pixels": pixels}), file)
    return file.getvalue()


@pytest.mark.parametrize("content", [b"", b"PAR1nonsensePAR1", write_examples([3, 5, 7, 8], IMAGES)[:-9], bomb()])
def test_what_is_no_proof_is_one_line(tmp_path, content):
    with pytest.raises(StoreError, match=r"cannot be read|values"):
        read_examples(written(tmp_path, content), [3, 5, 7, 8], SHAPE)


def test_a_run_keeps_them_where_it_is_asked_to_and_nowhere_else(tmp_path):
    (task,) = grid(attack=["square"], defense=["none"], n=20, queries=20, model=["cnn(width=2)"])
    pipeline = Pipeline(tmp_path / "networks", torch.device("cpu"), 256)
    kept, plain = (Store(tmp_path / name).open() for name in ("kept", "plain"))
    run([task], kept, pipeline, 256, 256, Silent(), examples=True)
    run([task], plain, pipeline, 256, 256, Silent())
    (table,) = (path for path in (kept.root / place(task.cell)).glob("*.parquet") if SUFFIX not in path.name)
    assert not list(plain.root.rglob(f"*{SUFFIX}"))
    records = kept.row(task.cell).records
    assert records.drop(columns="final_margin").equals(plain.row(task.cell).records.drop(columns="final_margin"))
    images = read_examples(examples_path(table), list(task.cell.ids), task.data.test.shape)
    clean = task.data.test.pixels(torch.tensor(task.cell.ids))
    assert torch.equal((images - clean).abs().flatten(1).amax(1), torch.tensor(records["norm_linf"].to_numpy()))
    with torch.no_grad():
        assert pipeline.served(task, "plain").module(images).argmax(1).tolist() == records["final_pred"].tolist()
