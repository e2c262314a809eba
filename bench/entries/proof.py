"""Final examples asked about again: what records say of them, held against the images and the model."""

import math
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.dataset import Dataset, Split
from bench.entries.folder import NETWORKS
from bench.entries.remade import Unknown, Untrue, data_of, names_code, plain, remade
from bench.errors import RefereeError, StoreError
from bench.measure.judgement import Judgement, judge
from bench.measure.keys import data_defense, defense_key, release_key
from bench.measure.perturbation import perturbation
from bench.measure.pipeline import Pipeline
from bench.norms import lp_norm
from bench.oracle.served import ServedModel
from bench.plan.cell import Cell
from bench.plan.tasks import Loader, Task, sample_ids
from bench.protection import check_release
from bench.protocols import FittedDefense
from bench.registry import attacks
from bench.results.examples import SUFFIX, read_examples
from bench.results.shards import Stored
from bench.rng import SampleRng
from bench.system.sealed import kept_tensors

CLOSE = 1e-3  # what another machine's rounding may change, of a probability or relative to a larger number
BALL = 1e-5  # what float32 may add to a distance


def unproven(stored: Stored) -> Iterator[str]:
    """What the votes of a shard do not prove of what it states; nothing of a certifier that does not say.

    Only certifiers that come with Parry are asked, in the version that they have today.
    """
    cell, told = stored.shard.cell, stored.columns
    if not cell.threat.proves or names_code(cell.attack):
        return
    certifier = attacks.create(cell.attack.spec)
    if getattr(certifier, "version", None) != cell.attack.version or not hasattr(certifier, "proven"):
        return
    if missing := [name for name in ("votes", "n0", "n", "alpha") if name not in told]:
        yield f"{', '.join(missing)} of each image are not there"
        return
    for name in ("n0", "n", "alpha"):
        if (told[name] != getattr(certifier, name)).any():
            yield f"{name} is not that of {cell.attack.spec}"
    radius, abstained = (part.numpy() for part in certifier.proven(torch.from_numpy(told["votes"])))
    if not np.allclose(told["radius"], radius, rtol=CLOSE, atol=CLOSE):
        yield "radius is not what the votes prove"
    if (told["abstained"] != abstained).any():
        yield "abstained is not what the votes say"


class Rescorer:
    """Asks models about the examples of one entry in ``folder``, each model made once.

    It trains nothing: a network that had to be trained is the one in the entry.
    """

    def __init__(self, folder: Path, loader: Loader, code: Path | None, device: torch.device) -> None:
        self.folder, self.loader, self.code, self.device = folder, loader, code, device
        self._pipeline = Pipeline(folder / NETWORKS, device, 256)
        self._models: dict[str, tuple[ServedModel | None, ServedModel | None, str]] = {}

    def problems(self, path: Path, stored: Stored) -> tuple[list[str], str]:
        """What is wrong with the proof of the shard whose JSON is at ``path``; and why some of it could not be seen.

        Raises:
            BenchError: the data are not here, so nothing of it could.
        """
        cell = stored.shard.cell
        data = data_of(cell, self.loader)
        if not cell.threat.asks:
            unseen = "what was proven: that needs its draws" if cell.threat.proves else (
                "what the learner reached: that needs its training"
            )
            return [*self._release(data, cell, stored), *unproven(stored)], unseen
        ids = stored.shard.ids
        if cell.ids != sample_ids(data, len(cell.ids)):
            raise Untrue(f"its samples are not the {len(cell.ids)} that Parry takes of {cell.dataset.spec}")
        rows = torch.tensor(ids)
        x, y = data.test.pixels(rows), data.test.labels[rows]
        found = list(path.parent.glob(f"{path.stem}-{'?' * 12}{SUFFIX}"))  # of a hash
        if len(found) != 1:
            raise StoreError(f"{path.with_suffix('')} has {len(found)} files of examples; one belongs there")
        final = read_examples(found[0], ids, data.test.shape)
        problems = [*_identity(stored, data.test, rows), *_sizes(stored, x, final)]
        served, twin, missing = self._asked(cell)
        records = stored.records
        noise = SampleRng.create(cell.seed, rows.to(self.device), "defense")
        x, y, final = x.to(self.device), y.to(self.device), final.to(self.device)
        if twin is not None:
            problems += _differing(records["twin_pred"].to_numpy(), judge(twin, x, y, noise), "twin_pred")
        if served is not None:
            problems += _judged(stored, "clean", judge(served, x, y, noise.fork("clean")))
            problems += _judged(stored, "final", judge(served, final, y, noise.fork("final")))
        return problems, missing

    def _asked(self, cell: Cell) -> tuple[ServedModel | None, ServedModel | None, str]:
        """The model as it is served and without its output defense, as far as they can be had; and why not further."""
        key = plain(cell).meaning
        if key not in self._models:
            served = twin = None
            missing = ""
            bare = replace(cell, defense=tuple(part for part in cell.defense if part.stage != "output"))
            try:
                twin = self._pipeline.undefended(self._ready(bare), "plain")
                if any(trait in part.traits for part in cell.defense for trait in ("stateful", "batch-dependent")):
                    raise Unknown("its answers depend on what else it is asked")
                served = self._pipeline.served(self._ready(cell), "plain")
            except Unknown as error:
                missing = str(error)
            except RefereeError as error:
                raise StoreError(str(error)) from None
            self._models[key] = served, twin, missing
        return self._models[key]

    def _ready(self, cell: Cell) -> Task:
        task = remade(cell, self.loader, self.code, whole=False)
        if task.service:
            raise Unknown(f"{task.cell.model.spec} is a service, which may answer otherwise today")
        if task.trains and not self._pipeline.has_network(task):
            raise Unknown(
                f"the network of {task.cell.model.spec} is not in {NETWORKS}/, and nothing is trained for this"
            )
        if isinstance(task.chain.output, FittedDefense) and not self._pipeline.has(defense_key(task)):
            raise Unknown(
                f"what {task.cell.defense_name} has learned is not in {NETWORKS}/, and nothing is trained for this"
            )
        return task

    def _release(self, data: Dataset, cell: Cell, stored: Stored) -> Iterator[str]:
        """What is wrong with the released images of ``cell``."""
        test, ids = data.test, torch.tensor(stored.shard.ids)
        if (stored.records["y"].to_numpy() != test.labels[ids].numpy()).any():
            yield "y is not the class of its sample"
        if data_defense(cell) is None:
            return
        key = release_key(cell)
        kept = kept_tensors(self.folder / NETWORKS / f"{key}.safetensors", key)
        if kept is None:
            raise StoreError(f"the released images of {cell.defense_name} are not in {NETWORKS}/")
        original = data.train
        try:
            released = check_release(Split(kept["images"], original.labels), original, cell.threat)
        except (RefereeError, KeyError) as error:
            yield str(error)
            return
        for name, value in perturbation(original, released).items():
            if not math.isclose(stored.shard.figures.get(name, math.nan), value, rel_tol=CLOSE, abs_tol=1e-9):
                yield f"{name} is {stored.shard.figures.get(name)}, and of the released images {value:.6g}"


def _identity(stored: Stored, test: Split, rows: Tensor) -> Iterator[str]:
    records = stored.records
    if (records["y"].to_numpy() != test.labels[rows].numpy()).any():
        yield "y is not the class of its sample"
    hashes = [blake2b(test.images[row].numpy().tobytes(), digest_size=8).hexdigest() for row in rows]
    if "input_hash" in records and records["input_hash"].tolist() != hashes:
        yield "input_hash is not of the sample's image"


def _sizes(stored: Stored, x: Tensor, final: Tensor) -> Iterator[str]:
    """Whether examples are inside, and as far from the images as the records say."""
    threat, records = stored.shard.cell.threat, stored.records
    delta = final - x
    if not final.isfinite().all():
        yield "an example has pixels that are no number"
        return
    distance = lp_norm(delta, threat.norm)
    outside = (distance > threat.eps + BALL) | ((final < 0) | (final > 1)).flatten(1).any(dim=1)
    if outside.any():
        yield f"{int(outside.sum())} examples are outside the ball or the box, up to {float(distance.max()):.4g} away"
    l2 = lp_norm(delta, "l2")
    sizes = {"norm_linf": lp_norm(delta, "linf"), "norm_l2": l2, "rmse": l2 / math.sqrt(x[0].numel())}
    sizes |= {"ball_violation": (distance - threat.eps).clamp(min=0)}
    sizes |= {"box_violation": (final - final.clamp(0, 1)).abs().flatten(1).amax(dim=1)}
    for name, values in sizes.items():
        if name in records and not np.allclose(records[name].to_numpy(), values.numpy(), rtol=CLOSE, atol=BALL):
            yield f"{name} is not the size of the example's change"


def _judged(stored: Stored, when: str, judged: Judgement) -> Iterator[str]:
    records = stored.records
    yield from _differing(records[f"{when}_pred"].to_numpy(), judged, f"{when}_pred")
    for name, values in judged.columns(when).items():
        if name.endswith("_pred") or name not in records:
            continue
        theirs, ours = records[name].to_numpy().astype(float), values.cpu().numpy().astype(float)
        off = ~np.isclose(theirs, ours, rtol=10 * CLOSE, atol=10 * CLOSE, equal_nan=True)
        if off.any():
            yield f"{name} of {int(off.sum())} samples is not what the model answers"


def _differing(stated: np.ndarray, judged: Judgement, name: str) -> Iterator[str]:
    """Classes that the model does not give, but for ties that rounding may turn."""
    top = judged.probabilities.topk(min(2, judged.probabilities.shape[1]), dim=1).values
    tied = (top[:, 0] - top[:, -1]) < CLOSE
    wrong = (torch.from_numpy(stated.copy()).to(judged.prediction.device) != judged.prediction) & ~tied
    if wrong.any():
        yield f"{name} of {int(wrong.sum())} samples is not what the model answers"
