"""Image files as pixels: what changes their meaning is kept, told or refused, whoever reads them."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from bench.data.folders import files_below
from bench.data.images import Frame, read_pictures
from bench.errors import ConfigError, DataError
from tests.test_data import load, noise, save


def pictures(*coded, **settings):
    return read_pictures([f"image {row}" for row in range(len(coded))], lambda row: io.BytesIO(coded[row]), **settings)


def written(image, form="PNG", **settings):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **settings)
    return file.getvalue()


def oriented(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bits_become_the_nearest_of_256_levels(form):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    found = pictures(written(levels, form))
    assert np.array_equal(found.pixels[0, ..., 0], levels // 257)
    assert found.changes == {"16 bits a channel, now 8": [0]}


def test_a_16_bit_photograph_has_the_mean_it_shows(tmp_path):
    save(tmp_path / "a" / "deep.png", np.full((8, 8), 129 * 257, np.uint16))
    data = load(f"imagefolder(path='{tmp_path}', size=8)")
    assert (data.test.images == 129).all()  # 254 where the high byte is cut to 8 bits


def test_colours_of_16_bits_are_told():
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    row = b"\0" + np.full((4, 3), 0x8181, ">u2").tobytes()
    coded = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    found = pictures(coded + chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b""))
    assert (found.pixels == 0x81).all()
    assert found.changes == {"16 bits a channel, now 8": [0]}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation):
    upright = noise(6, 4, 3)
    turns = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }  # fmt: skip
    stored = written(np.ascontiguousarray(turns[orientation]), exif=oriented(orientation))
    found = pictures(stored, written(upright))
    assert np.array_equal(found.pixels[0], upright)
    assert found.changes == ({} if orientation == 1 else {"turned upright": [0]})


def test_a_mirrored_photograph_is_read_upright_by_the_benchmark(tmp_path):
    (tmp_path / "a").mkdir()
    upright = noise(8, 8, 3)
    (tmp_path / "a" / "phone.png").write_bytes(written(np.ascontiguousarray(upright[::-1, ::-1]), exif=oriented(3)))
    data = load(f"imagefolder(path='{tmp_path}', size=8)")
    assert np.array_equal(data.test.images[0].permute(1, 2, 0).numpy(), upright)


def test_opacity_is_handed_over_where_it_is_not_full():
    coloured = np.dstack((noise(5, 7, 3), np.full((5, 7), 255, np.uint8)))
    hole = coloured.copy()
    hole[0, 0, 3] = 9
    palette = Image.fromarray(noise(5, 7, 3)).convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    found = pictures(written(coloured), written(hole), written(palette))
    assert np.array_equal(found.pixels[:2], [coloured[..., :3]] * 2)
    assert sorted(found.alpha) == [1, 2]
    assert np.array_equal(found.alpha[1], hole[..., 3])
    assert found.alpha[2][0, 0] == 0
    with Image.open(io.BytesIO(found.png(1, found.pixels[1]))) as again:
        assert np.array_equal(np.asarray(again), hole)
    grey = Image.merge("LA", [Image.fromarray(noise(5, 7)), Image.fromarray(hole[..., 3])])
    found = pictures(written(grey))
    assert found.pixels.shape == (1, 5, 7, 1)
    with Image.open(io.BytesIO(found.png(0, found.pixels[0]))) as again:
        assert np.array_equal(np.asarray(again), np.asarray(grey))


def test_transparent_images_are_refused_where_nobody_can_keep_it(tmp_path):
    (tmp_path / "a").mkdir()
    hole = np.zeros((8, 8, 4), np.uint8)
    (tmp_path / "a" / "hole.png").write_bytes(written(hole))
    with pytest.raises(DataError, match=r"1 of 1 images are transparent in places, such as .*hole\.png"):
        load(f"imagefolder(path='{tmp_path}', size=8)")
    hole[..., 3] = 255
    (tmp_path / "a" / "hole.png").write_bytes(written(hole))
    assert load(f"imagefolder(path='{tmp_path}', size=8)").test.images.sum() == 0


def test_a_colour_profile_goes_with_the_pixels_it_holds_for():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found = pictures(written(noise(5, 7, 3), "JPEG", icc_profile=profile), written(noise(5, 7)))
    with Image.open(io.BytesIO(found.png(0, found.pixels[0]))) as again:
        assert again.info["icc_profile"] == profile
    assert found.profile.keys() == {0}


@pytest.mark.parametrize(
    ("coded", "reason"),
    [
        (b"", "empty"),
        (b"hello", "no image in BMP, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n", "no image in BMP, JPEG"),
        (written(np.zeros((4, 4), np.float32), "TIFF"), "its pixels are F"),
        (written(np.zeros((4, 4), np.int32), "TIFF"), "its pixels are I,"),
        (written(Image.new("L", (4, 4)), "TIFF", save_all=True, append_images=[Image.new("L", (4, 4))]), "2 frames"),
        (written(Image.new("RGB", (4, 4)), "PNG", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")]),
         "2 frames"),
        (b"BM" + written(noise(4, 4, 3), "BMP")[2:22] + b"\0\0\0\0" + written(noise(4, 4, 3), "BMP")[26:], ""),
    ],
)
def test_what_has_no_one_meaning_is_refused(coded, reason):
    with pytest.raises(DataError, match=rf"image 0 cannot be read as an image \(.*{reason}"):
        pictures(coded)


def test_a_photograph_with_its_preview_is_a_photograph():
    photo, preview = Image.fromarray(noise(16, 16, 3)), Image.fromarray(noise(8, 8, 3))
    coded = written(photo, "MPO", save_all=True, append_images=[preview])
    assert pictures(coded).pixels.shape == (1, 16, 16, 3)


def test_frames_bring_pictures_to_one_size():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    coded = written(wide), written(wide.transpose(1, 0, 2))
    assert (pictures(*coded, frame=Frame(8)).pixels == 255).all()
    squeezed = pictures(*coded, frame=Frame(8, crop="squeeze")).pixels
    assert squeezed.shape == (2, 8, 8, 3)
    assert 80 < squeezed.mean() < 90, "a third of each is bright"
    with pytest.raises(ConfigError, match="crop is 'top'; use one of centre, squeeze"):
        Frame(8, crop="top")
    with pytest.raises(ConfigError, match="expected 1 <= size <= resize"):
        Frame(0)


def test_nothing_is_enlarged_without_a_word(tmp_path):
    save(tmp_path / "a" / "large.png", noise(40, 40, 3))
    save(tmp_path / "a" / "small.png", noise(12, 30, 3))
    spec = f"imagefolder(path='{tmp_path}', size=32"
    with pytest.raises(DataError, match=r"1 of 2 images are smaller than 32 pixels, such as .*small\.png \(30x12\)"):
        load(f"{spec})")
    assert load(f"{spec}, enlarge=true)").test.images.shape == (2, 3, 32, 32)


def test_more_than_memory_holds_is_refused_before_it_is_asked_for():
    with pytest.raises(DataError, match=r"1 images of 9000000x9000000 take 243,000\.0 GB, and this machine has"):
        pictures(written(noise(4, 4, 3)), frame=Frame(9_000_000, enlarge=True))


def test_folders_are_searched_as_torchvision_does(tmp_path):
    for name in ("cat/a/x.png", "cat/a-b/x.png", "cat/z.png", "dog/1.TIF", "dog/.hidden/2.png", "dog/.3.png",
                 ".git/4.png", ".ipynb_checkpoints/5.png", "__MACOSX/6.png", "Thumbs.db/7.png"):  # fmt: skip
        save(tmp_path / "pets" / name, noise(4, 4, 3))
    (tmp_path / "pets" / "dog" / "loop").symlink_to("..")
    os.mkfifo(tmp_path / "pets" / "dog" / "pipe.png")
    data = load("imagefolder(path=pets, size=4)", tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.test.labels.tolist() == [0, 0, 0, 1]
    names = [str(file.relative_to(tmp_path / "pets")) for file in files_below(tmp_path / "pets")]
    assert names == ["cat/z.png", "cat/a/x.png", "cat/a-b/x.png", "dog/1.TIF"]
    torchvision = pytest.importorskip("torchvision.datasets.folder")
    theirs = torchvision.make_dataset(str(tmp_path / "pets"), {"cat": 0}, extensions=(".png",))
    assert [file for file, _ in theirs] == [str(file) for file in files_below(tmp_path / "pets" / "cat")]


def test_ordinary_photographs_read_as_they_always_did(tmp_path):
    """The hash of a data set is in the keys of its rows."""
    for index, (height, width) in enumerate([(20, 30), (33, 17), (16, 16)]):
        save(tmp_path / "ab"[index % 2] / f"{index}.png", noise(height, width, 3))
    expected = []
    for index in (0, 2, 1):
        with Image.open(tmp_path / "ab"[index % 2] / f"{index}.png") as image:
            short = min(image.size)
            width, height = (max(12, round(side * 12 / short)) for side in image.size)
            small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - 12) // 2, (height - 12) // 2
        expected.append(np.asarray(small.crop((left, top, left + 12, top + 12))))
    found = load(f"imagefolder(path='{tmp_path}', size=12)").test.images
    assert torch.equal(found, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2))
