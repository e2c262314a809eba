"""Pictures of what came of an entry: images as they are and as an attack left them, or as they are released.

Clean images are those of the data set here, and only where it is the one that was used; what is anybody's is the file
of final examples, or of released images, which is read with suspicion and shown as pixels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.dataset import Dataset, Split, grey_levels
from bench.entries.folder import NETWORKS
from bench.entries.remade import Unknown, data_of
from bench.errors import BenchError
from bench.measure.keys import data_defense, release_key
from bench.measure.perturbation import in_words, perturbation
from bench.plan.tasks import Loader
from bench.protection import check_release
from bench.release.contact_sheet import contact_sheet, sheet
from bench.results.examples import SUFFIX, read_examples
from bench.results.shards import KEY_DIGITS
from bench.results.store import Row
from bench.system.sealed import kept_tensors

MOST = 6  # examples on a picture


class Pictures:
    """The pictures that ``folders``, of results or entries, have something for."""

    def __init__(self, folders: Iterable[Path], loader: Loader) -> None:
        self._loader = loader
        self._examples: dict[str, list[Path]] = {}  # by the beginning of the key of their cell
        self._kept: dict[str, Path] = {}            # released images, among networks
        for folder in folders:
            self._kept |= {path.stem: path for path in folder.rglob(f"{NETWORKS}/*.safetensors")}
            for path in folder.rglob(f"*{SUFFIX}"):
                self._examples.setdefault(path.parent.name.rpartition("-")[2], []).append(path)
        self.missing: dict[str, str] = {}  # by data set, why there are none of it

    def of(self, row: Row) -> bytes | None:
        """A PNG of the final examples of ``row``, or of the images that were released for it; nothing without any."""
        try:
            if row.cell.threat.asks:
                paths = next(filter(None, (self._examples.get(row.cell.key[:digits]) for digits in KEY_DIGITS)), None)
                return _attacked(row, data_of(row.cell, self._loader), paths) if paths else None
            if data_defense(row.cell) is None:
                return None
            kept = self._kept.get(release_key(row.cell))
            return _released(row, data_of(row.cell, self._loader), kept) if kept and not kept.is_symlink() else None
        except Unknown as error:
            self.missing[row.cell.dataset.spec] = str(error)
        except BenchError:  # whoever validates the entry hears of that
            pass
        return None


def _attacked(row: Row, data: Dataset, paths: Sequence[Path]) -> bytes | None:
    """Some images that have fallen, beside what is left of them; of any other images where none has."""
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


def _released(row: Row, data: Dataset, path: Path) -> bytes | None:
    kept = kept_tensors(path, path.stem)
    if kept is None or "images" not in kept:
        return None
    original = Split(grey_levels(data.train), data.train.labels)
    released = check_release(Split(kept["images"], original.labels), original, row.cell.threat)
    lines = [f"{len(released):,} images", in_words(perturbation(original, released))]
    return contact_sheet(replace(data, train=original), released, row.cell.defense_label, lines)
