"""Data sets: what each source holds, how it is split, and what a broken one says."""

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import bench.data  # noqa: F401 registers them
from bench.data import cifar
from bench.dataset import Dataset, Split
from bench.errors import BenchError, ConfigError, DataError, StoreError
from bench.registry import datasets

SHARED = Path(__file__).parents[2] / "shared"


def load(spec: str, data_dir: Path | None = None) -> Dataset:
    return datasets.create(spec)(data_dir)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(repr(shape).encode())).integers(0, 256, shape, dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write_parquet(folder: Path, images: dict[str, list[bytes]], label: str = "label") -> None:
    folder.mkdir()
    for part, coded in images.items():
        rows = [{"bytes": data, "path": None} for data in coded]
        table = pa.table({"img": rows, label: [row % 10 for row in range(len(coded))]})
        pq.write_table(table, folder / f"{part}-00000-of-00001.parquet")


def test_digits_are_split_once_and_for_all():
    digits = load("digits")
    assert [len(split) for split in (digits.train, digits.calibration, digits.test)] == [1000, 297, 500]
    assert digits.test.images.dtype == torch.uint8
    assert digits.test.shape == (1, 8, 8)
    assert digits.train.images.unique().numel() == 17
    assert digits.train.images.max() == 255
    assert not digits.flip
    # Entries are compared across machines and years: another NumPy must not shuffle otherwise.
    assert digits.fingerprint == "52c46ace7bead946c92bb9df4aa4f1ffd12795c9cbed88a1a939c5c314738822"


@pytest.mark.parametrize(("name", "label"), [("cifar10", "label"), ("cifar100", "fine_label")])
def test_parquet_images_come_back_pixel_for_pixel(tmp_path, name, label):
    train, test = noise(30, 32, 32, 3), noise(4, 32, 32, 3)
    write_parquet(tmp_path / name, {"train": list(map(png, train)), "test": list(map(png, test))}, label)
    data = load(name, tmp_path)
    assert len(data.classes) == int(name.removeprefix("cifar"))
    assert torch.equal(data.test.images, torch.from_numpy(test).permute(0, 3, 1, 2))
    assert data.test.labels.tolist() == [0, 1, 2, 3]
    both = torch.cat((data.train.images, data.calibration.images))
    assert torch.equal(both, torch.from_numpy(train).permute(0, 3, 1, 2))
    assert len(data.calibration) == 3
    whole = load(f"{name}(calibrate=false)", tmp_path)
    assert torch.equal(whole.train.images, both)
    assert len(whole.calibration) == 0


@pytest.fixture
def decoded_once(tmp_path, monkeypatch):
    """CIFAR-10 files, loaded once, and the data set they gave."""
    monkeypatch.setenv("BENCH_CACHE_DIR", str(tmp_path / "cache"))
    coded = {"train": list(map(png, noise(30, 32, 32, 3))), "test": list(map(png, noise(4, 32, 32, 3)))}
    write_parquet(tmp_path / "cifar10", coded)
    return load("cifar10", tmp_path)


def test_cifar_is_decoded_once(tmp_path, monkeypatch, decoded_once):
    monkeypatch.setattr(cifar, "_decoded", lambda *_: pytest.fail("decoded again"))
    again = load("cifar10", tmp_path)
    assert again.fingerprint == decoded_once.fingerprint
    again.train.images.zero_()
    assert load("cifar10", tmp_path).fingerprint == decoded_once.fingerprint, "what was lent is not what is kept"


def test_what_is_kept_of_cifar_is_bound_to_its_files_and_never_used_altered(tmp_path, decoded_once):
    (tmp_path / "cifar10" / "test-00000-of-00001.parquet").unlink()
    (tmp_path / "new").mkdir()
    write_parquet(tmp_path / "new" / "cifar10", {"test": list(map(png, 255 - noise(4, 32, 32, 3)))})
    (tmp_path / "new" / "cifar10" / "test-00000-of-00001.parquet").rename(
        tmp_path / "cifar10" / "test-00000-of-00001.parquet"
    )
    assert torch.equal(load("cifar10", tmp_path).test.images, 255 - decoded_once.test.images)
    (kept,) = tmp_path.glob("cache/train-*.safetensors")
    content = bytearray(kept.read_bytes())
    content[-5] ^= 1
    kept.write_bytes(content)
    with pytest.raises(StoreError, match=rf"{kept.name} is not what was written there; delete it"):
        load("cifar10", tmp_path)
    kept.unlink()
    assert torch.equal(load("cifar10", tmp_path).train.images, decoded_once.train.images)


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BENCH_CACHE_DIR", str(tmp_path / "file"))
    write_parquet(tmp_path / "cifar10", {part: [png(noise(32, 32, 3))] * 2 for part in ("train", "test")})
    assert len(load("cifar10", tmp_path).test) == 2


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"label": pa.array([0.0, 1.7])}, r"label \(double\)"),  # 1.7 was read as class 1
        ({"label": pa.array([True, False])}, r"label \(bool\)"),
        ({"label": pa.array([0, None])}, "1 rows without a label"),
        ({"img": [{"bytes": "text", "path": None}] * 2}, r"img \(struct<bytes: string"),
        ({"img": [None, None]}, r"img \(null\)"),
    ],
)
def test_columns_of_other_types_are_told(tmp_path, column, message):
    (tmp_path / "cifar10").mkdir()
    table = {"img": [{"bytes": png(noise(32, 32, 3)), "path": None}] * 2, "label": [0, 1]} | column
    for part in ("train", "test"):
        pq.write_table(pa.table(table), tmp_path / "cifar10" / f"{part}-00000-of-00001.parquet")
    with pytest.raises(DataError, match=message):
        load("cifar10", tmp_path)


def test_a_grey_image_in_a_colour_set_is_read_as_colour(tmp_path):
    write_parquet(tmp_path / "cifar10", {part: [png(noise(32, 32))] for part in ("train", "test")})
    assert load("cifar10", tmp_path).test.shape == (3, 32, 32)


def test_an_image_that_cannot_be_decoded_is_named_by_file_and_row(tmp_path):
    good = png(noise(32, 32, 3))
    write_parquet(tmp_path / "cifar10", {"train": [good] * 3 + [good[:200]], "test": [good]})
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet, row 3"):
        load("cifar10", tmp_path)


def test_an_image_of_another_size_is_refused(tmp_path):
    write_parquet(tmp_path / "cifar10", {"train": [png(noise(16, 24, 3))], "test": [png(noise(32, 32, 3))]})
    with pytest.raises(DataError, match="row 0: the image is 24x16; expected 32x32"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("keep", [0, 10, 2000])
def test_a_truncated_parquet_file_is_named(tmp_path, keep):
    write_parquet(tmp_path / "cifar10", {part: [png(noise(32, 32, 3))] for part in ("train", "test")})
    file = tmp_path / "cifar10" / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet is not a readable Parquet file"):
        load("cifar10", tmp_path)


def test_images_without_bytes_are_told(tmp_path):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    for part in ("train", "test"):
        pq.write_table(pa.table({"img": ["a.png"], "label": [0]}), folder / f"{part}-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"img \(string\).*expected img {bytes, path}.* integers in label"):
        load("cifar10", tmp_path)


def test_half_a_download_is_told_from_none(tmp_path):
    write_parquet(tmp_path / "cifar10", {"train": [png(noise(32, 32, 3))]})
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet is missing"):
        load("cifar10", tmp_path)


def test_a_column_of_another_name_is_told(tmp_path):
    write_parquet(tmp_path / "cifar100", {part: [png(noise(32, 32, 3))] for part in ("train", "test")}, "label")
    with pytest.raises(DataError, match=r"label \(int64\); expected img {bytes, path}.* in fine_label"):
        load("cifar100", tmp_path)


@pytest.mark.parametrize("data_dir", [None, Path("no-such-folder")])
def test_cifar_without_a_folder_says_how_to_give_one(data_dir):
    with pytest.raises(DataError, match=r"--data-dir.*BENCH_DATA_DIR"):
        load("cifar10", data_dir)


def test_torchvision_files_that_were_altered_are_never_unpickled(tmp_path):
    pytest.importorskip("torchvision")
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    trap = tmp_path / "executed"
    (batches / "data_batch_1").write_bytes(b"cbuiltins\nopen\n(V%s\nVw\ntR." % str(trap).encode())
    with pytest.raises(DataError, match="cifar-10-batches-py is damaged"):
        load("cifar10", tmp_path)
    assert not trap.exists()


@pytest.mark.slow
def test_the_real_cifar10_loads():
    if not (SHARED / "data" / "cifar10").is_dir():
        pytest.skip("no ../shared/data/cifar10 beside the repository")
    data = load("cifar10", SHARED / "data")
    assert [len(split) for split in (data.train, data.calibration, data.test)] == [49_000, 1_000, 10_000]
    assert data.test.labels.bincount().tolist() == [1000] * 10


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("last", [True, False])
def test_npz_takes_channels_first_or_last(tmp_path, channels, last):
    first = noise(20, channels, 8, 6)
    x = first.transpose(0, 2, 3, 1) if last else first
    y = np.arange(20) % 4
    np.savez(tmp_path / "mine.npz", x_test=x, y_test=y, x_train=x, y_train=y)
    data = load("npz(path=mine.npz)", tmp_path)
    assert torch.equal(data.test.images, torch.from_numpy(first))
    assert (len(data.train), len(data.calibration), len(data.classes)) == (18, 2, 4)


def test_npz_without_training_images_has_empty_splits(tmp_path):
    images = np.linspace(0, 1, 5 * 3 * 8 * 8).reshape(5, 3, 8, 8)
    np.savez(tmp_path / "mine.npz", x_test=images, y_test=np.zeros(5, np.uint8))
    data = load(f"npz(path='{tmp_path / 'mine.npz'}', classes=7)")
    assert data.test.images.dtype == torch.float32
    assert data.train.images.shape == data.calibration.images.shape == (0, 3, 8, 8)
    assert len(data.classes) == 7
    assert data.fingerprint == load(f"npz(path='{tmp_path / 'mine.npz'}')").fingerprint


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_test": noise(5, 3, 8, 8) * 1.0, "y_test": np.zeros(5, int)}, r"pixels from 0 to 255; expected \[0, 1\]"),
        ({"x_test": np.full((5, 3, 8, 8), np.nan), "y_test": np.zeros(5, int)}, "5 of 5 images hold NaN"),
        ({"x_test": noise(5, 3, 8, 3), "y_test": np.zeros(5, int)}, "both axis 1 and axis 3"),
        ({"x_test": noise(5, 4, 8, 4), "y_test": np.zeros(5, int)}, "no axis holds the channels"),
        ({"x_test": noise(5, 8, 8), "y_test": np.zeros(5, int)}, "no axis holds the channels"),
        ({"x_test": noise(5, 3, 8, 8).astype(int), "y_test": np.zeros(5, int)}, "store uint8 levels"),
        ({"x_test": noise(5, 3, 8, 8), "y_test": np.zeros(5)}, "y_test is float64"),
        ({"x_test": noise(5, 3, 8, 8), "y_test": np.zeros(4, int)}, "one label for each"),
        ({"x_test": noise(5, 3, 8, 8), "y_test": np.full(5, -1)}, "labels from -1"),
        ({"x_test": noise(0, 3, 8, 8), "y_test": np.zeros(0, int)}, "x_test is empty"),
        ({"x_test": noise(5, 3, 8, 8)}, "has no y_test, only x_test"),
        ({"x": noise(5, 3, 8, 8), "y": np.zeros(5, int)}, "holds x, y; name the images x_test and their labels y_test"),
        ({"x_test": noise(5, 3, 8, 8), "y_test": np.array([None] * 5)}, "y_test holds Python objects"),
        (
            {"x_test": noise(5, 3, 8, 8), "y_test": np.zeros(5, int), "x_train": noise(5, 3, 9, 9)},
            "has no y_train",
        ),
        (
            {
                "x_test": noise(5, 3, 8, 8),
                "y_test": np.zeros(5, int),
                "x_train": noise(5, 3, 9, 9),
                "y_train": np.zeros(5, int),
            },
            "store both alike",
        ),
    ],
)
def test_npz_says_what_is_wrong(tmp_path, arrays, message):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load("npz(path=mine.npz)", tmp_path)


@pytest.mark.parametrize(
    ("labels", "spec", "message"),
    [
        ([0, 10**9], "", "has 1,000,000,001 classes; expected 1 to 100,000"),
        ([0, 1], ", classes=10000000000", "classes"),
        ([0, 1], ", classes=0", "classes"),
    ],
)
def test_npz_labels_that_are_no_class_numbers_are_refused(tmp_path, labels, spec, message):
    np.savez(tmp_path / "mine.npz", x_test=noise(2, 3, 8, 8), y_test=np.array(labels))
    with pytest.raises(BenchError, match=message):
        load(f"npz(path=mine.npz{spec})", tmp_path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("honest", [False, True])
def test_npz_that_claims_terabytes_is_refused_before_they_are_asked_for(tmp_path, packed, honest):
    """A header claims them; where ``honest``, so does the archive's own table."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 3, 1000, 1000)}
    )
    with zipfile.ZipFile(tmp_path / "mine.npz", "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as file:
        file.writestr("x_test.npy", header.getvalue() + bytes(1000))
    if honest:
        content = (tmp_path / "mine.npz").read_bytes()
        at = content.rindex(b"PK\x01\x02") + 24  # the size of the entry, in the table at the end
        (tmp_path / "mine.npz").write_bytes(content[:at] + struct.pack("<I", 2**32 - 2) + content[at + 4 :])
    with pytest.raises(DataError, match=r"mine\.npz is not a readable .npz file .*claims 3,000,000,000,000 bytes"):
        load("npz(path=mine.npz)", tmp_path)


def test_images_without_pixels_are_refused(tmp_path):
    np.savez(tmp_path / "mine.npz", x_test=np.zeros((2, 3, 0, 8), np.uint8), y_test=np.array([0, 1]))
    with pytest.raises(DataError, match="have no pixels"):
        load("npz(path=mine.npz)", tmp_path)


def test_names_too_long_for_a_file_are_not_there():
    for spec in ("npz", "imagefolder"):
        with pytest.raises(DataError, match="check path"):
            load(f"{spec}(path='{'x' * 500}')")
    with pytest.raises(DataError, match="is not a folder; give --data-dir"):
        load("cifar10", Path("x" * 5000))


def test_npz_that_is_truncated_or_missing_is_named(tmp_path):
    file = tmp_path / "mine.npz"
    np.savez(file, x_test=noise(5, 3, 8, 8), y_test=np.zeros(5, int))
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match=r"mine\.npz is not a readable"):
        load("npz(path=mine.npz)", tmp_path)
    with pytest.raises(DataError, match=r"no other\.npz or .*other\.npz"):
        load("npz(path=other.npz)", tmp_path)
    with pytest.raises(ConfigError, match="path"):
        load("npz")


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def test_imagefolder_without_splits_is_all_test(tmp_path):
    for name in ("dog", "cat"):
        save(tmp_path / "pets" / name / "1.png", noise(12, 20, 3))
        save(tmp_path / "pets" / name / "2.BMP", noise(12, 12))
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("not an image")
    data = load("imagefolder(path=pets, size=8)", tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.test.images.shape == (4, 3, 8, 8)
    assert data.test.images.dtype == torch.uint8
    assert len(data.train) == len(data.calibration) == 0


def test_the_centre_is_cropped_and_not_squeezed(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    save(tmp_path / "a" / "wide.png", wide)
    save(tmp_path / "a" / "tall.png", wide.transpose(1, 0, 2))
    data = load(f"imagefolder(path='{tmp_path}', size=8)")
    assert (data.test.images == 255).all()


def test_calibration_images_are_spread_over_the_classes(tmp_path):
    for label in range(4):
        for index in range(10):
            save(tmp_path / "train" / str(label) / f"{index}.png", np.full((4, 4, 3), 10 * label + index, np.uint8))
        save(tmp_path / "val" / str(label) / "0.jpg", noise(4, 4, 3))
    data = load(f"imagefolder(path='{tmp_path}', size=4)")
    assert data.calibration.labels.tolist() == [0, 1, 2, 3]
    values = torch.cat((data.train.images, data.calibration.images))[:, 0, 0, 0]
    assert sorted(values.tolist()) == list(range(40))


def test_imagefolder_uses_val_to_calibrate_where_there_is_a_test(tmp_path):
    for part, value in (("train", 1), ("val", 2), ("test", 3)):
        save(tmp_path / part / "a" / "0.png", np.full((4, 4, 3), value, np.uint8))
    data = load(f"imagefolder(path='{tmp_path}', size=4)")
    assert [split.images.max().item() for split in (data.train, data.calibration, data.test)] == [1, 2, 3]


def test_imagefolder_names_a_broken_image_and_an_empty_folder(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="no images in"):
        load(f"imagefolder(path='{tmp_path}')")
    (tmp_path / "a" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(DataError, match=r"broken\.jpg cannot be read"):
        load(f"imagefolder(path='{tmp_path}')")


def test_imagenet_wants_all_classes_and_leaves_training_images_unread(tmp_path):
    for part in ("train", "val"):
        for label in range(1000):
            (tmp_path / "imagenet" / part / f"n{label:08}").mkdir(parents=True)
    for index in range(20):
        save(tmp_path / "imagenet" / "train" / "n00000007" / f"{index}.png", noise(16, 16, 3))
    save(tmp_path / "imagenet" / "val" / "n00000999" / "0.png", noise(16, 24, 3))
    data = load("imagenet(size=8, resize=10)", tmp_path)
    assert data.test.labels.tolist() == [999]
    assert (len(data.train), len(data.calibration), data.test.shape) == (0, 2, (3, 8, 8))
    assert len(load("imagenet(size=8, resize=10, train=true)", tmp_path).train) == 18
    for part in ("train", "val"):
        (tmp_path / "imagenet" / part / "n00000500").rmdir()
    with pytest.raises(DataError, match="999 class folders"):
        load("imagenet", tmp_path)


GREY = torch.zeros(4, 1, 8, 8)


@pytest.mark.parametrize(
    ("images", "labels", "complaint"),
    [
        (GREY, torch.zeros(4), r"labels \(4,\) are torch.float32; expected \(N,\) int64"),
        (GREY, torch.zeros(4, dtype=torch.int32), "labels .* are torch.int32"),
        (GREY, torch.zeros(4, 1, dtype=torch.int64), r"labels \(4, 1\)"),
        (GREY, torch.zeros(4, 10), r"labels \(4, 10\)"),
        (GREY, np.zeros(4, dtype=np.int64), "labels are a ndarray; expected a torch.Tensor"),
        (GREY.numpy(), torch.zeros(4, dtype=torch.int64), "images are a ndarray"),
        (GREY.double(), torch.zeros(4, dtype=torch.int64), "images are torch.float64"),
        (GREY[0], torch.zeros(1, dtype=torch.int64), r"expected images \(N, C, H, W\)"),
    ],
)
def test_what_a_source_of_ones_own_gives_is_checked_at_once(images, labels, complaint):
    split = Split(images, labels)
    with pytest.raises(DataError, match=complaint):
        Dataset("mine", ("a", "b"), split, split, split)


def test_a_source_that_gives_pairs_or_numbers_for_names_is_told():
    pair, split = (GREY, torch.zeros(4)), Split(GREY, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match="train split: a tuple"):
        Dataset("mine", ("a", "b"), pair, split, split)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected the name of each"):
        Dataset("mine", (0, 1), split, split, split)  # type: ignore[arg-type]
