"""The data owner's command: what it writes in each layout, how it resumes, and what it refuses."""

import io
import json
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.data.cifar import Cifar10
from bench.data.images import Frame
from bench.dataset import Dataset, Split
from bench.errors import BenchError, ConfigError, DataError, StoreError
from bench.measure.perturbation import perturbation
from bench.protocols import Job
from bench.release.contact_sheet import MARGIN, NAMES, contact_sheet
from bench.release.layouts import read_source
from bench.release.protect import protect
from defenses.ops import OnePixelShortcut
from tests.test_cli import ROOT, bench, complaint
from tests.test_data import load, noise, png, save, write_parquet

CPU = torch.device("cpu")

DEFENSES = """
from bench.dataset import Split

class Base:
    stage, version, paper, norm, eps = "data", 1, "", "linf", 1 / 255

class Counts(Base):
    \"\"\"Inverts the lowest bit; a file beside this one has a letter for each run.\"\"\"
    def __call__(self, data, job):
        with open(__file__ + ".runs", "a") as file:
            file.write("x")
        return Split(data.train.images ^ 1, data.train.labels)

class Floats(Base):
    def __call__(self, data, job):
        return Split(data.train.pixels(), data.train.labels)

class Shuffles(Base):
    def __call__(self, data, job):
        return Split(data.train.images, data.train.labels.flip(0))

class Stops(Base):
    def __call__(self, data, job):
        import os, signal
        os.kill(os.getpid(), signal.SIGINT)

class Nothing(Base):
    def __call__(self, data, job):
        return data.train
"""


class Steps:
    """Counts what is reported; raises at the report number ``stop``, as Ctrl-C may."""

    def __init__(self, stop: float = float("inf")) -> None:
        self.stop, self.count = stop, 0

    def _tick(self) -> None:
        self.count += 1
        if self.count >= self.stop:
            raise KeyboardInterrupt

    def step(self, label: str, total: int | None = None, unit: str = "") -> None:
        self._tick()

    def advance(self, count: int = 1) -> None:
        self._tick()

    def work(self, done: int, total: int) -> None:
        self._tick()


@pytest.fixture
def user(tmp_path: Path) -> Path:
    file = tmp_path / "user.py"
    file.write_text(f"{DEFENSES}# {tmp_path}\n")  # a file of the same content would count beside the first
    return file


def run(
    path: Path, out: Path, defense: str = "ops", seed: int = 0, stop: float = float("inf"), frame: Frame | None = None
) -> dict:
    return dict(protect(defense, path, out, seed, CPU, Steps(stop), frame).manifest)


def pets(root: Path, split: bool = True) -> Path:
    """Class folders: 12 PNG and JPEG images of 9x7 pixels, and where ``split``, a validation image beside ``train``."""
    part = root / "train" if split else root
    for index in range(6):
        save(part / "cat" / f"{index}.{'png' if index % 2 else 'jpg'}", noise(7, 9, 3) // (index + 1))
        save(part / "dog" / f"{index}.PNG", 255 - noise(7, 9, 3) // (index + 1))
    if split:
        save(root / "val" / "dog" / "0.jpg", noise(5, 5, 3))
    (root / "about.txt").write_text("pets of the house")
    return root


def image(file: Path | io.BytesIO) -> np.ndarray:
    with Image.open(file) as opened:
        return np.asarray(opened)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def released(path: Path, pixels: int = 1) -> tuple[Dataset, Split]:
    """What is at ``path``, and OPS of it."""
    data = read_source(path, Steps()).data
    return data, OnePixelShortcut(pixels=pixels)(data, Job())


class TestClassFolders:
    @pytest.mark.parametrize("split", [True, False])
    def test_the_same_names_hold_the_released_pixels(self, tmp_path, split):
        root, out = pets(tmp_path / "pets", split), tmp_path / "out"
        manifest = run(root, out, "ops(pixels=2)")
        data, expected = released(root, 2)
        part = "train/" if split else ""
        images = [f"{part}{name}/{index}.png" for name in ("cat", "dog") for index in range(6)]
        assert list(data.classes) == ["cat", "dog"]
        assert contents(out).keys() == {*images, "manifest.json", "contact-sheet.png"} | (
            {"val/dog/0.jpg"} if split else set()
        )
        for name, x in zip(images, expected.images, strict=True):
            assert np.array_equal(image(out / name), x.permute(1, 2, 0).numpy())
        assert manifest["renamed"][f"{part}cat/0.jpg"] == f"{part}cat/0.png"
        assert len(manifest["renamed"]) == 9  # three JPEG images and six .PNG
        assert manifest["left_out"] == ["about.txt"]
        if split:
            assert manifest["copied"] == ["val/dog/0.jpg"]
            assert (out / "val/dog/0.jpg").read_bytes() == (root / "val/dog/0.jpg").read_bytes()

    def test_the_manifest_says_how_to_make_it_again_and_what_it_changed(self, tmp_path):
        root, out = pets(tmp_path / "pets"), tmp_path / "out"
        run(root, out, seed=3)
        data, expected = released(root)
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["defense"]["name"] == "ops"
        assert manifest["defense"]["parameters"] == {"pixels": 1, "share": 1.0}
        assert (manifest["defense"]["spec"], manifest["seed"]) == ("ops(pixels=1, share=1.0)", 3)
        assert manifest["commit"]
        assert manifest["classes"] == {"cat": 6, "dog": 6}
        assert manifest["input"]["images_and_labels"] == data.train.fingerprint()
        assert manifest["output"]["images_and_labels"] == expected.fingerprint()
        figures = perturbation(data.train, expected)
        assert manifest["perturbation"] == {**figures, "linf_max_levels": round(255 * figures["linf_max"])}
        assert manifest["perturbation"]["changed_pixels_max"] == 1
        written = contents(out)
        del written["manifest.json"]
        assert manifest["files"] == {name: sha256(content).hexdigest() for name, content in written.items()}

    def test_grey_images_stay_grey_unless_one_has_colour(self, tmp_path):
        for index in range(4):
            save(tmp_path / "grey" / "abc"[index % 3] / f"{index}.png", noise(6, 6) // (index + 1))
        run(tmp_path / "grey", tmp_path / "out")
        assert {image(file).ndim for file in (tmp_path / "out").glob("?/*.png")} == {2}
        save(tmp_path / "grey" / "a" / "colour.png", noise(6, 6, 3))
        run(tmp_path / "grey", tmp_path / "mixed")
        assert {image(file).ndim for file in (tmp_path / "mixed").glob("?/*.png")} == {3}

    @pytest.mark.parametrize("names", [("a.jpg", "a.png"), ("a.bmp", "a.c.png")])
    def test_names_that_would_clash_or_change_order_are_refused(self, tmp_path, names):
        for name in names:
            save(tmp_path / "pets" / "cat" / name, noise(6, 6, 3))
        with pytest.raises(DataError, match=rf"{names[0]} and cat/{names[1]}.*rename one of them"):
            run(tmp_path / "pets", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_broken_images_are_named_and_nothing_is_written(self, tmp_path):
        root = pets(tmp_path / "pets")
        whole = (root / "train/cat/1.png").read_bytes()
        (root / "train/cat/1.png").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=r"cat/1\.png cannot be read as an image \(.*trunc"):
            run(root, tmp_path / "out")
        (root / "train/cat/0.jpg").write_bytes(b"no image")
        (root / "train/dog/3.PNG").write_bytes(b"")
        with pytest.raises(DataError, match=r"cat/0\.jpg .* \(no image in BMP, .*nor can 2 more: .*1\.png, .*3\.PNG"):
            run(root, tmp_path / "out")
        Image.fromarray(np.zeros((7, 9), np.float32)).save(root / "train/cat/0.jpg", "TIFF")
        (root / "train/dog/3.PNG").unlink()
        with pytest.raises(DataError, match=r"cat/0\.jpg cannot .*\(its pixels are F, not of 8 or 16 bits"):
            run(root, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_several_sizes_are_counted_with_an_example_of_each(self, tmp_path):
        root = pets(tmp_path / "pets")
        save(root / "train/dog/large.png", noise(12, 16, 3))
        with pytest.raises(DataError, match=r"2 sizes: 9x7 \(12, as .*\), 16x12 \(1, as .*large\.png\).*one size"):
            run(root, tmp_path / "out")


class TestPhotographs:
    """What owners have in their folders: several sizes, phones' orientation, transparency, links, no classes."""

    def photos(self, root: Path) -> Path:
        for index in range(4):
            save(root / "ab"[index % 2] / f"{index}.png", noise(20 + index, 30 - index, 3))
        return root

    def test_size_and_crop_bring_them_to_one_size(self, tmp_path):
        root = self.photos(tmp_path / "photos")
        with pytest.raises(DataError, match=r"4 sizes: .*give --size"):
            run(root, tmp_path / "out")
        manifest = run(root, tmp_path / "out", frame=Frame(16))
        assert manifest["shape"] == [3, 16, 16]
        assert manifest["frame"] == {"size": 16, "resize": None, "crop": "centre", "enlarge": False}
        data = load(f"imagefolder(path='{root}', size=16)")
        assert manifest["input"]["images_and_labels"] == data.test.fingerprint(), "as the benchmark reads them"
        with pytest.raises(ConfigError, match=r"frame \(16x16 pixels, the centre cut out; now 16x16 pixels, squeezed"):
            run(root, tmp_path / "out", frame=Frame(16, crop="squeeze"))
        with pytest.raises(DataError, match="4 of 4 images are smaller than 25 pixels"):
            run(root, tmp_path / "large", frame=Frame(25))
        assert run(root, tmp_path / "large", frame=Frame(25, enlarge=True))["shape"] == [3, 25, 25]

    def test_the_command_takes_them_and_says_so(self, tmp_path):
        arguments = ("protect", "--defense", "ops", "--in", self.photos(tmp_path / "photos"), "--out", tmp_path / "out")
        assert "give --size, too" in complaint(bench(*arguments, "--crop", "squeeze"))
        assert "use one of centre, squeeze" in complaint(bench(*arguments, "--size", "16", "--crop", "left"))
        ended = bench(*arguments, "--size", "16", "--crop", "squeeze")
        assert "16x16 pixels now, squeezed into a square" in ended.out

    def test_what_changes_their_meaning_is_kept_or_named(self, tmp_path):
        root, out = tmp_path / "photos", tmp_path / "out"
        save(root / "a" / "0.tif", noise(8, 8, 3))
        save(root / "a" / "deep" / "1.png", np.full((8, 8), 129 * 257, np.uint16))
        turned, hole = noise(8, 8, 3), np.dstack((noise(8, 8, 3), noise(8, 8)))
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(np.ascontiguousarray(np.rot90(turned))).save(root / "a" / "2.png", exif=exif)
        Image.fromarray(hole).save(root / "a" / "3.png")
        (root / "b").mkdir()
        Image.fromarray(noise(8, 8, 4), "CMYK").save(root / "b" / "4.tiff")
        (root / ".git").mkdir()
        save(root / ".git" / "5.png", noise(8, 8, 3))
        manifest = run(root, out, "data-noise(eps=1/255)")
        assert manifest["changed"] == {
            "turned upright": ["a/2.png"], "16 bits a channel, now 8": ["a/deep/1.png"], "CMYK, now RGB": ["b/4.tiff"],
        }  # fmt: skip
        assert manifest["classes"] == {"a": 4, "b": 1}
        assert abs(image(out / "a/2.png").astype(int) - turned).max() <= 1
        assert np.array_equal(image(out / "a/3.png")[..., 3], hole[..., 3])
        assert abs(image(out / "a/deep/1.png").astype(int) - 129).max() <= 1

    def test_images_in_no_class_folders_do_for_a_defense_that_needs_none(self, tmp_path):
        for index in range(5):
            save(tmp_path / "flat" / f"{index}.jpg", noise(8, 8, 3))
        with pytest.raises(DataError, match=r"the 5 images in .* lie in no class folders"):
            run(tmp_path / "flat", tmp_path / "out")
        with pytest.raises(DataError, match="lie in no class folders"):
            run(tmp_path / "flat", tmp_path / "out", "data-noise(by=class)")
        manifest = run(tmp_path / "flat", tmp_path / "out", "data-noise")
        assert manifest["classes"] == {"images": 5}
        assert sorted(contents(tmp_path / "out")) == [
            "contact-sheet.png", *(f"images/{index}.png" for index in range(5)), "manifest.json",
        ]  # fmt: skip
        assert manifest["renamed"]["0.jpg"] == "images/0.png"

    @pytest.mark.parametrize("layout", ["folders", "parquet"])
    def test_links_that_lead_out_are_refused_by_name(self, tmp_path, layout):
        secret = tmp_path / "passwd"
        secret.write_text("root")
        root = tmp_path / "pets"
        if layout == "folders":
            pets(root)
            (root / "val" / "x").symlink_to(secret)
        else:
            write_parquet(root, {"train": list(map(png, noise(6, 32, 32, 3)))})
            (root / "x").symlink_to(secret)
        (root / "more").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(DataError, match=r"lead out of it \(more -> .*elsewhere, (val/)?x -> .*passwd\)"):
            run(root, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        (root / "more").unlink()
        inside = root / ("val/x" if layout == "folders" else "x")
        inside.unlink()
        inside.symlink_to(next(root.rglob("*.p*")))
        run(root, tmp_path / "out")


class TestArrays:
    @pytest.mark.parametrize("last", [True, False])
    @pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.float16])
    def test_only_changed_pixels_of_x_train_change(self, tmp_path, dtype, last):
        x = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 6))
        if dtype is not np.uint8:
            x = x / 255 + np.where(x < 255, 0.3, 0) / 255  # between two levels
        x = (x.transpose(0, 2, 3, 1) if last else x).astype(dtype)
        y = np.arange(20) % 4
        arrays = {"x_train": x, "y_train": y, "x_test": x[:2], "y_test": y[:2], "id": np.ones(20)}
        np.savez(tmp_path / "mine.npz", **arrays)
        manifest = run(tmp_path / "mine.npz", tmp_path / "out")
        with np.load(tmp_path / "out" / "mine.npz") as archive:
            written = dict(archive)
        assert list(written) == list(arrays)
        changed = (written["x_train"] != x).any(axis=3 if last else 1)
        assert changed.sum(axis=(1, 2)).max() == 1
        assert changed.sum() == round(20 * manifest["perturbation"]["changed_pixels_mean"])
        assert set(np.unique(written["x_train"][np.moveaxis(np.stack([changed] * 3), 0, 3 if last else 1)])) <= {
            *x.ravel().tolist(), dtype(0), dtype(1 if dtype is not np.uint8 else 255),
        }  # fmt: skip
        for name in arrays:
            assert written[name].dtype == arrays[name].dtype
            assert name == "x_train" or np.array_equal(written[name], arrays[name])
        assert ("floats" in manifest["note"]) == (dtype is not np.uint8)

    def test_a_packed_archive_stays_packed(self, tmp_path):
        black = np.zeros((40, 1, 16, 16), np.uint8)
        np.savez_compressed(tmp_path / "mine.npz", x_train=black, y_train=np.arange(40) % 3)
        run(tmp_path / "mine.npz", tmp_path / "out")
        assert (tmp_path / "out" / "mine.npz").stat().st_size < 40 * 16 * 16

    def test_what_is_missing_is_told(self, tmp_path):
        np.savez(tmp_path / "mine.npz", x_test=noise(4, 3, 8, 8), y_test=np.arange(4))
        with pytest.raises(DataError, match="has no x_train, only x_test, y_test"):
            run(tmp_path / "mine.npz", tmp_path / "out")
        with pytest.raises(DataError, match=r"other\.npz is not a file"):
            run(tmp_path / "other.npz", tmp_path / "out")
        with pytest.raises(DataError, match="expected class folders of images"):
            run(Path(__file__), tmp_path / "out")


class TestParquet:
    def test_the_benchmark_reads_what_was_written(self, tmp_path):
        images = {"train": noise(30, 32, 32, 3), "test": noise(4, 32, 32, 3)}
        write_parquet(tmp_path / "cifar10", {part: list(map(png, arrays)) for part, arrays in images.items()})
        (tmp_path / "cifar10" / "README.md").write_text("mine")
        manifest = run(tmp_path / "cifar10", tmp_path / "safe" / "cifar10")
        _, expected = released(tmp_path / "cifar10")
        data = Cifar10()(tmp_path / "safe")
        assert torch.equal(torch.cat((data.train.images, data.calibration.images)), expected.images)
        assert torch.equal(torch.cat((data.train.labels, data.calibration.labels)), expected.labels)
        assert manifest["copied"] == ["test-00000-of-00001.parquet"]
        assert manifest["left_out"] == ["README.md"]
        test = "cifar10/test-00000-of-00001.parquet"
        assert (tmp_path / "safe" / test).read_bytes() == (tmp_path / test).read_bytes()

    def test_all_but_the_bytes_and_the_ending_of_paths_stays(self, tmp_path):
        (tmp_path / "set").mkdir()
        tables = []
        for shard in range(2):
            rows = [{"bytes": png(noise(6, 5, 3) // (row + shard + 1)), "path": f"cat/{row}.jpg"} for row in range(5)]
            kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
            table = pa.table({
                "id": [f"{shard}{row}" for row in range(5)],
                "image": pa.array(rows, kind),
                "fine_label": pa.array([row % 3 for row in range(5)], pa.int16()),
            })  # fmt: skip
            tables.append(table.replace_schema_metadata({"huggingface": "{}"}))
            file = tmp_path / "set" / f"train-{shard}.parquet"
            pq.write_table(tables[-1], file, compression="gzip", row_group_size=2)
        manifest = run(tmp_path / "set", tmp_path / "out")
        assert manifest["renamed"] == {".jpg": ".png in 10 paths of the table"}
        assert manifest["classes"] == {"0": 4, "1": 4, "2": 2}  # one folder for all of them names none
        _, expected = released(tmp_path / "set")
        for shard, table in enumerate(tables):
            file = pq.ParquetFile(tmp_path / "out" / f"train-{shard}.parquet")
            assert file.schema_arrow.equals(table.schema, check_metadata=True)
            assert (file.metadata.num_row_groups, file.metadata.row_group(0).column(0).compression) == (3, "GZIP")
            assert file.read(["id", "fine_label"]).equals(table.select(["id", "fine_label"]))
            for row, entry in enumerate(file.read().column("image").to_pylist()):
                x = expected.images[5 * shard + row].permute(1, 2, 0).numpy()
                assert np.array_equal(image(io.BytesIO(entry["bytes"])), x)
                assert entry["path"] == f"cat/{row}.png"

    def test_one_file_is_enough_and_a_broken_row_is_named(self, tmp_path):
        images = list(map(png, noise(6, 32, 32, 3)))
        write_parquet(tmp_path / "a", {"train": images})
        file = "train-00000-of-00001.parquet"
        manifest = run(tmp_path / "a" / file, tmp_path / "out")
        assert manifest["files"].keys() == {file, "contact-sheet.png"}
        write_parquet(tmp_path / "b", {"train": [*images[:4], b"", images[5]]})
        with pytest.raises(DataError, match=rf"{file}, row 4 cannot be read as an image \(empty\)"):
            run(tmp_path / "b", tmp_path / "nothing")
        write_parquet(tmp_path / "c", {"test": images})
        with pytest.raises(DataError, match="none of which starts with train"):
            run(tmp_path / "c", tmp_path / "nothing")
        pq.write_table(pa.table({"img": ["a.png"], "label": [0]}), tmp_path / "c" / "train.parquet")
        with pytest.raises(DataError, match=r"columns img \(string\), label \(int64\); expected img or image {bytes"):
            run(tmp_path / "c", tmp_path / "nothing")
        assert not (tmp_path / "nothing").exists()


class TestResuming:
    @pytest.mark.parametrize("layout", ["folders", "npz", "parquet"])
    def test_stopped_anywhere_it_ends_with_the_same_bytes(self, tmp_path, user, layout):
        path = pets(tmp_path / "pets")
        if layout == "npz":
            path = tmp_path / "mine.npz"
            np.savez(path, x_train=noise(12, 3, 8, 6), y_train=np.arange(12) % 3)
        elif layout == "parquet":
            path = tmp_path / "set"
            write_parquet(path, {part: list(map(png, noise(12, 32, 32, 3))) for part in ("train", "test")})
        whole, out, defense = tmp_path / "whole", tmp_path / "out", f"{user}:Counts"
        steps = Steps()
        protect(defense, path, whole, 0, CPU, steps)
        runs = user.with_name("user.py.runs")
        runs.unlink()
        stops = 0
        for stop in range(2, steps.count, 3):  # what is written already is not reported again
            try:
                run(path, out, defense, stop=stop)
                break
            except KeyboardInterrupt:
                stops += 1
            written = contents(out) if out.exists() else {}
            written.pop(".manifest.json.0123abcd.tmp", None)
            assert "manifest.json" not in written
            finished = {name: content for name, content in written.items() if ".protect" not in name}
            assert finished.items() <= contents(whole).items()
            if written:
                (out / ".manifest.json.0123abcd.tmp").write_bytes(b"half")  # as a kill may leave it
        run(path, out, defense)
        assert stops > 3 or layout == "npz"
        assert contents(out) == contents(whole)
        assert runs.read_text() == "x", "the defense ran once"

    def test_a_killed_command_goes_on(self, tmp_path):
        root = tmp_path / "many"
        for index in range(800):
            save(root / str(index % 4) / f"{index}.png", (noise(16, 16, 3).astype(int) + index).astype(np.uint8))
        arguments = ["protect", "--defense", "ops", "--in", str(root), "--out"]
        command = [sys.executable, "-m", "bench.cli", *arguments, str(tmp_path / "out")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("out/*/*.png")):
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("out/*/[0-9]*.png")}
        assert 1 <= len(kept) < 800, "the kill came in the middle"
        for file in kept:
            assert image(file).shape == (16, 16, 3)
        assert bench(*arguments, tmp_path / "out").code == 0
        assert bench(*arguments, tmp_path / "whole").code == 0
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert {file: file.stat().st_mtime_ns for file in kept} == kept

    def test_a_finished_job_is_checked_and_left_alone(self, tmp_path):
        root, out = pets(tmp_path / "pets"), tmp_path / "out"
        run(root, out)
        before = contents(out)
        again = protect("ops", root, out, 0, CPU, Steps())
        assert again.repeated
        assert contents(out) == before
        (out / "train/dog/2.png").write_bytes(before["train/dog/3.png"])
        with pytest.raises(StoreError, match=r"changed since: train/dog/2\.png; delete it"):
            run(root, out)
        (out / "train/dog/2.png").unlink()
        with pytest.raises(StoreError, match=r"changed since: train/dog/2\.png; delete it"):
            run(root, out)

    def test_another_job_is_told_from_this_one(self, tmp_path):
        root, out = pets(tmp_path / "pets"), tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            run(root, out, stop=40)
        assert (out / ".protect" / "job.json").exists()
        with pytest.raises(ConfigError, match=r"another seed \(0; now 1\)"):
            run(root, out, seed=1)
        with pytest.raises(ConfigError, match=r"another defense \(ops\(pixels=1, share=1\.0\); now ops\(pixels=2"):
            run(root, out, "ops(pixels=2)")
        run(root, out)
        save(root / "train/cat/1.png", noise(7, 9, 3) // 9)
        with pytest.raises(ConfigError, match="another input"):
            run(root, out)


    def test_images_that_were_planted_are_never_released(self, tmp_path):
        root, out = pets(tmp_path / "pets"), tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            run(root, out, stop=40)
        kept = out / ".protect" / "images.safetensors"
        content = bytearray(kept.read_bytes())
        content[-9] ^= 64
        kept.write_bytes(content)
        with pytest.raises(StoreError, match=r"images\.safetensors is not what was written there; delete it"):
            run(root, out)
        save_file({"images": torch.zeros(12, 3, 7, 9, dtype=torch.uint8)}, kept)
        np.save(out / ".protect" / "images.npy", np.zeros((12, 3, 7, 9), np.uint8))
        assert run(root, out)["output"]["images_and_labels"] == released(root)[1].fingerprint()

    @pytest.mark.parametrize("name", ["/etc/passwd", "../pets/about.txt", "train/../../x", ""])
    def test_manifests_that_name_files_elsewhere_are_refused(self, tmp_path, name):
        root, out = pets(tmp_path / "pets"), tmp_path / "out"
        manifest = run(root, out)
        for files in ({**manifest["files"], name: "0" * 64}, None, ["x"]):
            changed = {**manifest, "files": files} if files else {key: manifest[key] for key in {*manifest} - {"files"}}
            (out / "manifest.json").write_text(json.dumps(changed))
            with pytest.raises(ConfigError, match="was not written by bench protect"):
                run(root, out)
        (out / "manifest.json").write_text("[" * 100_000)
        with pytest.raises(ConfigError, match="was not written by bench protect"):
            run(root, out)

    def test_an_output_folder_with_links_is_left_alone(self, tmp_path):
        root, out = pets(tmp_path / "pets"), tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            run(root, out, stop=40)
        (tmp_path / "mine").mkdir()
        (out / "test").symlink_to(tmp_path / "mine")
        with pytest.raises(ConfigError, match=r"holds links \(test\)"):
            run(root, out)
        assert not list((tmp_path / "mine").iterdir())


class TestRefusals:
    def test_an_output_folder_with_other_things_stays_as_it_is(self, tmp_path):
        root = pets(tmp_path / "pets")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years")
        with pytest.raises(ConfigError, match=r"holds other things \(thesis\.tex\); choose a new or empty folder"):
            run(root, tmp_path / "out")
        (tmp_path / "out" / "manifest.json").write_text("[]")
        with pytest.raises(ConfigError, match="was not written by bench protect"):
            run(root, tmp_path / "out")
        assert contents(tmp_path / "out") == {"thesis.tex": b"years", "manifest.json": b"[]"}
        with pytest.raises(ConfigError, match="is a file; choose a folder"):
            run(root, tmp_path / "out" / "thesis.tex")

    @pytest.mark.parametrize("inside", [".", "out", ".."])
    def test_input_and_output_lie_apart(self, tmp_path, inside):
        root = pets(tmp_path / "home" / "pets")
        with pytest.raises(ConfigError, match="lie in each other; choose a folder beside"):
            run(root, root / inside)

    @pytest.mark.parametrize(
        ("defense", "message"),
        [
            ("rnd", r"rnd acts at the output stage.*data-stage defense: .*\bops\b"),
            ("pgd-at", r"pgd-at acts at the training stage.*data-stage defense: .*\bops\b"),
            ("none", r"names 0 defenses; images take one at the data stage: .*\bops\b"),
            ("ops + rnd", r"names 2 defenses; images take one at the data stage: .*\bops\b"),
            ("opps", "did you mean 'ops'"),
            ("USER:Floats", r"released torch\.float32 images .*returns uint8"),
            ("USER:Shuffles", r"changed labels or their order"),
        ],
    )
    def test_what_is_no_data_defense_is_refused(self, tmp_path, user, defense, message):
        root = pets(tmp_path / "pets")
        with pytest.raises(BenchError, match=message):
            run(root, tmp_path / "out", defense.replace("USER", str(user)))
        assert not list(tmp_path.glob("out/*"))

    def test_the_command_line_says_so_in_one_line(self, tmp_path):
        arguments = ("protect", "--in", pets(tmp_path / "pets"), "--out", tmp_path / "out")
        assert "data-stage defense" in complaint(bench(*arguments, "--defense", "rnd"))
        assert "device 'tpu' is not there" in complaint(bench(*arguments, "--defense", "ops", "--device", "tpu"))


class TestTelling:
    def test_the_command_says_what_it_did(self, tmp_path):
        arguments = ("protect", "--defense", "ops", "--in", pets(tmp_path / "pets"), "--out", tmp_path / "out")
        ended = bench(*arguments)
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.startswith("protected 12 training images of 2 classes with ops(pixels=1, share=1.0)\n")
        for told in ("at most 1, by up to", "PSNR", "SSIM", "copied unchanged: val/dog/0.jpg", "cat/0.jpg -> ",
                     "left out, as they are no training images: about.txt", "contact-sheet.png"):  # fmt: skip
            assert told in ended.out
        assert bench(*arguments).out.startswith("already protected 12")

    def test_an_interrupt_is_no_traceback(self, tmp_path, user):
        arguments = ("--in", pets(tmp_path / "pets"), "--out", tmp_path / "out")
        ended = bench("protect", "--defense", f"{user}:Stops", *arguments)
        assert ended.code == 130
        assert "the same command resumes" in ended.err
        assert "Traceback" not in ended.err

    def test_an_unchanged_set_is_called_so(self, tmp_path, user):
        arguments = ("--in", pets(tmp_path / "pets"), "--out", tmp_path / "out")
        ended = bench("protect", "--defense", f"{user}:Nothing", *arguments)
        assert "no pixel changed" in ended.out
        assert f"running code from {user}" in ended.err
        assert "Infinity" not in (tmp_path / "out" / "manifest.json").read_text()

    def test_the_sheet_shows_originals_protected_images_and_differences(self):
        images = torch.full((6, 3, 20, 30), 100, dtype=torch.uint8)
        images[:, :, :, :15] += torch.arange(6, dtype=torch.uint8)[:, None, None, None]
        after = images.clone()
        after[:, 0, 3, 4] += 10
        before, nothing = Split(images, torch.arange(6) % 2), Split(images[:0], torch.arange(0))
        data = Dataset("mine", ("a", "b"), before, nothing, nothing)
        coded = contact_sheet(data, Split(after, before.labels), "Title", ["line"])
        sheet = image(io.BytesIO(coded))
        tile = images[0].permute(1, 2, 0).numpy().repeat(4, axis=0).repeat(4, axis=1)
        left = MARGIN + NAMES
        found = [y for y in range(len(sheet) - 80) if np.array_equal(sheet[y : y + 80, left : left + 120], tile)]
        assert len(found) == 1
        difference = sheet[found[0] : found[0] + 80, left + 252 : left + 252 + 120]
        assert difference[12:16, 16:20].reshape(-1, 3).tolist() == [[250, 0, 0]] * 16  # 10 levels, 25 times
        assert np.count_nonzero(difference) == 16
