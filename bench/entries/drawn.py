"""Drawn examples of an entry: images as they are and as an attack left them, or as they are released.

Clean images are those of the data set here, and only where it is the one that was used; what is anybody's is the file
of final examples, or of released images, which is read with suspicion and shown as pixels.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.dataset import Dataset, Split, grey_levels
from bench.entries.remade import Unknown, data_of
from bench.measure.perturbation import in_words, perturbation
from bench.plan.tasks import Loader
from bench.protection import check_release
from bench.release.contact_sheet import contact_sheet, sheet
from bench.results.examples import read_examples
from bench.results.store import Row
from bench.system.sealed import kept_tensors

__all__ = ["Unknown", "attacked", "released"]

MOST = 6  # examples on a picture


def attacked(row: Row, loader: Loader, paths: Sequence[Path]) -> bytes | None:
    """Some images that have fallen, beside what is left of them; of any other images where none has.

    Raises:
        Unknown: the data set is not there, or not the one that was used.
        BenchError: a file is no proof of these samples.
    """
    data = data_of(row.cell, loader)
    shard = row.shards[0]
    path = next((path for path in sorted(paths) if path.name.startswith(f"{shard.stem}-")), None)
    if path is None or path.is_symlink() or max(shard.ids) >= len(data.test):
        return None
    final = read_examples(path, shard.ids, data.test.shape)
    met = row.records[row.records["sample_id"].isin(shard.ids)].set_index("sample_id").loc[shard.ids]
    fell = (met["final_pred"] != met["y"]) & (met["clean_pred"] == met["y"])
    places = [*np.flatnonzero(fell), *np.flatnonzero(~fell)][:MOST]
    ids = torch.tensor([shard.ids[place] for place in places])
    before = data.test.pixels(ids) * 255
    after = final[torch.tensor(places)].nan_to_num().clamp(0, 1) * 255
    classes = [_class(data, int(met.iloc[place]["final_pred"])) for place in places]
    truth = [_class(data, int(data.test.labels[number])) for number in ids]
    names = [f"{one} > {other}" for one, other in zip(truth, classes, strict=True)]
    lines = [f"{row.cell.defense_label}, {row.cell.threat}", "class > class of the final example"]
    return sheet([(name, 1) for name in names], before, after, ("clean", "attacked"), row.cell.attack.label, lines)


def _class(data: Dataset, number: int) -> str:
    return data.classes[number] if 0 <= number < len(data.classes) else "?"


def released(row: Row, loader: Loader, path: Path) -> bytes | None:
    """Images as their owner has them, beside what the file at ``path`` holds of those that were released for ``row``.

    Raises:
        Unknown, BenchError: as for :func:`attacked`.
    """
    data = data_of(row.cell, loader)
    kept = kept_tensors(path, path.stem)
    if kept is None or "images" not in kept:
        return None
    original = Split(grey_levels(data.train), data.train.labels)
    images = check_release(Split(kept["images"], original.labels), original, row.cell.threat)
    lines = [f"{len(images):,} images", in_words(perturbation(original, images))]
    return contact_sheet(replace(data, train=original), images, row.cell.defense_label, lines)
