"""Pictures of images before and after: what a data defense releases, what an attack has made, and the difference."""

import io
import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from bench.dataset import Dataset, Split, grey_levels
from bench.measure.keys import data_defense, release_key
from bench.measure.perturbation import in_words, perturbation
from bench.measure.pipeline import Pipeline
from bench.plan.tasks import Task
from bench.report.escape import in_terminal
from bench.system.files import keep_file, slug

ROWS, EXAMPLES = 8, 3  # classes shown, and images of each
TILE, LARGEST = 128, 256  # pixels on the sheet: smaller images are magnified, larger ones reduced
MARGIN, GAP, GROUP = 28, 6, 24  # pixels around the sheet, between tiles, and between examples
NAMES, LINE = 132, 22  # width of the class names, height of a line of text
PAPER, INK, FAINT, EDGE = (250, 250, 248), (24, 24, 28), (116, 116, 124), (214, 214, 210)


def contact_sheet(original: Dataset, released: Split, title: str, lines: Sequence[str]) -> bytes:
    """A PNG: a row for each of some classes, a few images of each as original, protected and their difference.

    Args:
        original: all images in ``train``, uint8 as in ``released``.
        lines: what stands below the title.
    """
    chosen = _choose(original.train.labels, len(original.classes))
    rows = torch.tensor([row for found in chosen.values() for row in found])
    before, after = original.train.images[rows].float(), released.images[rows].float()
    names = [(original.classes[label], len(found)) for label, found in chosen.items()]
    return sheet(names, before, after, ("original", "protected"), title, lines)


def sheet(
    names: Sequence[tuple[str, int]],
    before: Tensor,
    after: Tensor,
    heads: tuple[str, str],
    title: str,
    lines: Sequence[str],
) -> bytes:
    """A PNG: pairs of images beside each other with their difference.

    The difference is absolute, magnified so that the largest one shown has full brightness; its factor is printed.

    Args:
        names: of each row, and how many pairs are in it.
        before, after: the pairs, row by row, (n, C, H, W) float32 on the scale from 0 to 255.
        heads: what the two are.
        lines: what stands below the title.
    """
    delta = (after - before).abs()
    largest = float(delta.max())
    factor = max(1, math.floor(255 / largest)) if largest else 1
    tiles = [[_tile(part[place], pool) for place in range(len(before))] for part, pool in (
        (before, avg_pool2d), (after, avg_pool2d), ((delta * factor).clamp(max=255), max_pool2d),
    )]  # fmt: skip
    width, height = tiles[0][0].size
    step = 3 * width + 2 * GAP + GROUP
    pairs = max(count for _, count in names)
    top = MARGIN + 36 + len(lines) * LINE + 34
    size = MARGIN + NAMES + pairs * step - GROUP + MARGIN, top + len(names) * (height + GAP) - GAP + MARGIN
    paper = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(paper)
    room = size[0] - 2 * MARGIN
    _write(draw, (MARGIN, MARGIN), title, 24, INK, room)
    for number, line in enumerate(lines):
        _write(draw, (MARGIN, MARGIN + 36 + number * LINE), line, 15, FAINT, room)
    for pair in range(pairs):
        for place, heading in enumerate((*heads, f"difference, {factor}x")):
            left = MARGIN + NAMES + pair * step + place * (width + GAP)
            _write(draw, (left, top - 22), heading, 14, FAINT, width)
    number = 0
    for line_number, (name, count) in enumerate(names):
        y = top + line_number * (height + GAP)
        _write(draw, (MARGIN, y + height // 2 - 9), name, 16, INK, NAMES - 12)
        for pair in range(count):
            for place in range(3):
                x = MARGIN + NAMES + pair * step + place * (width + GAP)
                draw.rectangle((x - 1, y - 1, x + width, y + height), outline=EDGE)
                paper.paste(tiles[place][number], (x, y))
            number += 1
    file = io.BytesIO()
    paper.save(file, "PNG")
    return file.getvalue()


def write_sheets(tasks: Iterable[Task], pipeline: Pipeline, folder: Path) -> None:
    """A sheet in ``folder`` for each data set that a defense of ``tasks`` has released, where there is none yet.

    Raises:
        StoreError: the disk is full or the folder cannot be made.
    """
    for task in tasks:
        defense = data_defense(task.cell)
        if defense is None:
            continue
        path = folder / f"{slug(task.cell.dataset.spec, defense.spec)}-{release_key(task.cell)[:8]}.png"
        released = None if path.exists() else pipeline.kept_release(task)
        if released is None or released.images.shape != task.data.train.images.shape:  # such a defense failed its cells
            continue
        original = replace(task.data, train=_in_levels(task.data.train))
        lines = [f"{len(released):,} images", in_words(perturbation(original.train, released))]
        title = f"{task.data.name}, protected with {defense.spec}"
        keep_file(path, contact_sheet(original, _in_levels(released), title, lines))


def _in_levels(split: Split) -> Split:
    return Split(grey_levels(split), split.labels)


def _choose(labels: Tensor, classes: int) -> dict[int, list[int]]:
    """The first images of some classes, spread evenly over those that have any."""
    present = [label for label in range(classes) if bool((labels == label).any())]
    count = min(ROWS, len(present))
    spread = [present[index * len(present) // count] for index in range(count)]
    return {label: (labels == label).nonzero()[:EXAMPLES, 0].tolist() for label in spread}


def _tile(image: Tensor, pool: Callable[..., Tensor]) -> Image.Image:
    """An image (C, H, W) in levels, enlarged in whole steps to about ``TILE`` or pooled to at most ``LARGEST``."""
    side = max(image.shape[1:])
    if side > LARGEST:
        image = pool(image, math.ceil(side / LARGEST), ceil_mode=True)
    levels = image.round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).contiguous()
    tile = Image.fromarray(levels.numpy())
    times = max(1, TILE // side)
    return tile.resize((tile.width * times, tile.height * times), Image.Resampling.NEAREST)


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, colour: tuple[int, int, int], room: int
) -> None:
    """One line of text, cut short where it needs more than ``room`` pixels; Pillow's own font has ASCII alone."""
    base = (char for char in unicodedata.normalize("NFKD", in_terminal(text)) if not unicodedata.combining(char))
    text = "".join(base).encode("ascii", "replace").decode()
    font = ImageFont.load_default(size)
    if draw.textlength(text, font) > room:
        while text and draw.textlength(f"{text}…", font) > room:
            text = text[:-1]
        text += "…"
    draw.text(at, text, fill=colour, font=font)
