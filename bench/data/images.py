"""Image files as pixels, by one set of rules for everyone who reads them.

- A picture is turned upright as its EXIF orientation says, so every reader sees what its owner sees.
- Channels of 16 bits become the nearest of 256 levels; inks (CMYK) and palettes become RGB.
- Transparency is handed over beside the colours, which are those stored: whoever cannot keep it has to refuse it.
- What has no one meaning is refused: several frames or pages, pixels that are floats or 32-bit numbers.
"""

import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from bench.errors import ConfigError, DataError
from bench.system.memory import check_memory

Pixels = NDArray[np.uint8]  # (N, H, W, C), C 1 or 3
Coded = Path | io.BytesIO   # an image file
Advance = Callable[[int], None]  # so many more images are done
Crop = Literal["centre", "squeeze"]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})  # torchvision's
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others can start programs, as EPS does
GREY, COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # Pillow's modes of 8 bits
DEEP = ("I;16", "I;16B", "I;16L", "I;16N")  # and of 16
FRAMED = ("PNG", "TIFF", "WEBP")  # a JPEG of several pictures (MPO) is a photograph with its preview
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT, ROUNDED, INKS = "turned upright", "16 bits a channel, now 8", "CMYK, now RGB"

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Frame:
    """How pictures become squares of ``size`` pixels a side.

    ``crop`` says how: "centre" resizes the shorter side to ``resize`` pixels (``size`` unless given) and cuts out the
    centre; "squeeze" resizes both sides to ``size``, which keeps everything but the proportions. Resizing is bilinear
    and antialiased. Smaller pictures are refused unless ``enlarge``.

    Raises:
        ConfigError: numbers that make no frame.
    """

    size: int
    resize: int | None = None
    crop: Crop = "centre"
    enlarge: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.shorter:
            raise ConfigError(f"size is {self.size} and resize {self.resize}; expected 1 <= size <= resize")
        if self.crop not in get_args(Crop):
            raise ConfigError(f"crop is {self.crop!r}; use one of {', '.join(get_args(Crop))}")

    @property
    def shorter(self) -> int:
        """The pixels that the shorter side is resized to."""
        return self.size if self.resize is None else self.resize

    def __call__(self, image: Image.Image) -> Image.Image:
        """The square of ``image``."""
        if self.crop == "squeeze":
            return image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        short = min(image.size)
        width, height = (max(self.shorter, round(side * self.shorter / short)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)  # Pillow widens the filter where it shrinks
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))


@dataclass(frozen=True)
class Header:
    """What a file says of its picture before it is decoded: (width, height) upright, and how reading changes it."""

    size: tuple[int, int]
    grey: bool
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Pictures:
    """Decoded pictures, and by row what PNG can keep of the rest of a file."""

    pixels: Pixels
    alpha: Mapping[int, Pixels]     # (H, W) opacity, where it is not full
    profile: Mapping[int, bytes]    # ICC colour profiles that hold for the pixels
    changes: Mapping[str, list[int]]  # the rows that reading has changed, by how

    def png(self, row: int, pixels: Pixels) -> bytes:
        """The picture at ``row`` as a PNG file, which loses nothing, with other ``pixels`` (H, W, C)."""
        channels = [*np.moveaxis(pixels, -1, 0), *([self.alpha[row]] if row in self.alpha else [])]
        image = Image.merge({1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[len(channels)], list(map(Image.fromarray, channels)))
        file = io.BytesIO()
        image.save(file, "PNG", icc_profile=self.profile.get(row))
        return file.getvalue()


def read_pictures(
    names: Sequence[str],
    load: Callable[[int], Coded],
    *,
    frame: Frame | None = None,
    colour: bool = False,
    advance: Advance = lambda count: None,
) -> Pictures:
    """All pictures, in the size of ``frame``, or where it is ``None`` in the one size that they have.

    They are grey only where all are, and never where ``colour``. ``load`` opens the file of a row, ``names`` are what
    errors call it, and ``advance`` hears of each picture twice: when its header was read, and when it was decoded.

    Raises:
        DataError: pictures that cannot be read (each counted and the first named with the reason), of several sizes,
            smaller than the frame, or more than the memory holds.
    """
    found = in_parallel(lambda row: _attempt(_header, load, row), range(len(names)), advance)
    headers = _readable(names, found)
    size = _one_size(names, headers) if frame is None else (frame.size, frame.size)
    if frame is not None and not frame.enlarge:
        _refuse_small(names, headers, frame.shorter if frame.crop == "centre" else frame.size)
    grey = not colour and all(header.grey for header in headers)
    shape = len(names), size[1], size[0], 1 if grey else 3
    check_memory(math.prod(shape), f"{len(names):,} images of {size[0]}x{size[1]}")
    pixels = np.empty(shape, dtype=np.uint8)
    alpha: dict[int, Pixels] = {}
    profile: dict[int, bytes] = {}

    def decode(row: int, image: Image.Image) -> None:
        kept = image.info.get("icc_profile") if (image.mode in GREY) == grey and image.mode != "CMYK" else None
        opaque, opacity = _decoded(image, grey)
        pixels[row] = np.asarray(frame(opaque) if frame else opaque).reshape(shape[1:])
        if opacity is not None:
            alpha[row] = np.asarray(frame(opacity) if frame else opacity)
        if isinstance(kept, bytes) and kept:
            profile[row] = kept

    _readable(names, in_parallel(lambda row: _attempt(partial(decode, row), load, row), range(len(names)), advance))
    changes: dict[str, list[int]] = {}
    for row, header in enumerate(headers):
        for change in header.changes:
            changes.setdefault(change, []).append(row)
    return Pictures(pixels, dict(sorted(alpha.items())), profile, changes)


def in_parallel(function: Callable[[T], R], items: Iterable[T], advance: Advance = lambda count: None) -> list[R]:
    """``function`` of each item, in order; the first exception ends it, and what has not begun is not done."""
    results = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for result in pool.map(function, items):
                results.append(result)
                advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


class _Broken(str):
    """Why an image cannot be read."""


def _attempt(look: Callable[[Image.Image], R], load: Callable[[int], Coded], row: int) -> R | _Broken:
    """What ``look`` finds in an image."""
    try:
        coded = load(row)
        empty = not (coded.stat().st_size if isinstance(coded, Path) else coded.getbuffer().nbytes)
        if empty:
            return _Broken("empty")
        with Image.open(coded, formats=FORMATS) as image:
            return look(image)
    except UnidentifiedImageError:
        return _Broken(f"no image in {', '.join(FORMATS)}")
    except Exception as error:  # bytes from anywhere meet decoders that raise whatever they trip over
        return _Broken(getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__)


def _header(image: Image.Image) -> Header:
    deep = image.mode in DEEP or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not deep and image.mode not in GREY + COLOUR:
        raise ValueError(f"its pixels are {image.mode}, not of 8 or 16 bits a channel")
    if deep and "transparency" in image.info:
        raise ValueError("it has 16 bits a channel and a transparent colour; save it with 8 bits")
    if image.format in FRAMED and getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"it has {getattr(image, 'n_frames', 2)} frames or pages, where one is expected")
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"it has {width}x{height} pixels")
    stored = str(getattr(image, "tile", ""))  # how, in Pillow's names: "RGB;16B" is read as RGB, from the high bytes
    rounded = deep or ";16" in stored
    orientation = image.getexif().get(ORIENTATION, 1)  # last, as it decodes a PNG whose EXIF may come at its end
    changes = {UPRIGHT: orientation in range(2, 9), ROUNDED: rounded, INKS: image.mode == "CMYK"}
    return Header(
        (height, width) if orientation in range(5, 9) else (width, height),
        deep or image.mode in GREY,
        tuple(name for name, holds in changes.items() if holds),
    )


def _decoded(image: Image.Image, grey: bool) -> tuple[Image.Image, Image.Image | None]:
    """The colours of ``image``, upright, and its opacity if that is not full everywhere."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode in (*DEEP, "I"):
        levels = np.asarray(upright).astype(np.int64)
        upright = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if not upright.has_transparency_data:
        return upright.convert("L" if grey else "RGB"), None
    coloured = upright.convert("RGBA")
    opacity = coloured.getchannel("A")
    full = opacity.getextrema()[0] == 255
    return upright.convert("L") if grey else coloured.convert("RGB"), None if full else opacity


def _one_size(names: Sequence[str], headers: Sequence[Header]) -> tuple[int, int]:
    first = {header.size: row for row, header in reversed([*enumerate(headers)])}
    if len(first) > 1:
        counts = Counter(header.size for header in headers).most_common()
        kinds = [f"{width}x{height} ({count}, as {names[first[width, height]]})" for (width, height), count in counts]
        more = f" and {len(kinds) - 3} more" if len(kinds) > 3 else ""
        raise DataError(
            f"the images have {len(kinds)} sizes: {', '.join(kinds[:3])}{more}; "
            "a defense needs one size: give --size, or resize or crop them all first"
        )
    return next(iter(first))


def _refuse_small(names: Sequence[str], headers: Sequence[Header], side: int) -> None:
    small = [(name, header.size) for name, header in zip(names, headers, strict=True) if min(header.size) < side]
    if small:
        name, (width, height) = small[0]
        least = min(min(size) for _, size in small)
        raise DataError(
            f"{len(small):,} of {len(names):,} images are smaller than {side} pixels, such as {name} "
            f"({width}x{height}), and enlarging invents what they do not show; take size {least}, leave them out, "
            "or ask to enlarge them"
        )


def _readable(names: Sequence[str], found: Sequence[R | _Broken]) -> list[R]:
    """What was found, which must be no failure."""
    broken = [(name, reason) for name, reason in zip(names, found, strict=True) if isinstance(reason, _Broken)]
    if broken:
        name, reason = broken[0]
        others = ", ".join(name for name, _ in broken[1:4]) + (", …" if len(broken) > 4 else "")
        more = f", nor can {len(broken) - 1} more: {others}" if others else ""
        raise DataError(f"{name} cannot be read as an image ({reason}){more}; replace or remove what is broken")
    return [one for one in found if not isinstance(one, _Broken)]
