"""A data owner's own images under a data defense: the protected set, what was done to it, and a picture of that."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import __version__ as pillow
from pydantic import BaseModel, field_validator
from torch import Tensor

import bench
from bench.data.images import Frame, in_parallel
from bench.dataset import Dataset, Split
from bench.errors import ConfigError, DataError, RefereeError, StoreError
from bench.measure.perturbation import in_words, perturbation
from bench.plan.pin import pin
from bench.protection import check_release, declared_threat
from bench.protocols import DataDefense, Job
from bench.registry import code_hash, defenses
from bench.release.contact_sheet import contact_sheet
from bench.release.layouts import Bar, Source, digest_files, pixels, read_source
from bench.results.provenance import commit
from bench.results.store import Store
from bench.scratch import scratch
from bench.spec import Spec, parse_chain
from bench.system.claims import Held
from bench.system.files import BESIDE, keep_file, reachable
from bench.system.sealed import keep_tensors, kept_tensors
from bench.system.threads import training_threads

MANIFEST, SHEET = "manifest.json", "contact-sheet.png"
STATE, JOB = ".protect", "job.json"  # of a job that is not finished: what it is, and beside it what the defense made
UNFINISHED = "unfinished"            # there: what the defense is at
NAMES = {"parry": "version of Parry", "libraries": "set of libraries"}  # parts of a job, for people


@dataclass(frozen=True)
class Protected:
    """What a finished job wrote."""

    manifest: Mapping[str, Any]
    repeated: bool  # it was finished before, and is as it was


def protect(
    defense: str, path: Path, out: Path, seed: int, device: torch.device, bar: Bar, frame: Frame | None = None
) -> Protected:
    """Run a data-stage ``defense`` on the training images at ``path`` and write the released set to ``out``.

    ``frame`` brings the images to one size first; without it, they have to be of one.

    Every file appears under its name when it is whole, the manifest last. A job that was stopped goes on where it was
    and ends with the same bytes; a slow defense keeps what it has done twice a minute.

    Raises:
        ConfigError: no data-stage defense, or an ``out`` that is not for this.
        DataError: a source that cannot be read.
        StoreError: ``out`` cannot be written, or what is there was altered.
    """
    spec, component = _data_defense(defense)
    code = code_hash()
    _refuse_foreign(path, out)
    try:
        root = path if path.is_dir() else path.parent
        source = read_source(path, bar, frame, unsorted=not getattr(component, "needs_classes", True))
        digests = digest_files({str(file.relative_to(root)): file for file in source.inputs})
    except OSError as error:
        raise DataError(f"cannot read {error.filename or path}: {error.strerror or error}; check its rights") from None
    job = {
        "parry": bench.__version__,
        "commit": commit(),
        "libraries": {"torch": torch.__version__, "numpy": np.__version__, "pillow": pillow},
        "defense": _described(spec, component),
        "seed": seed,
        "device": device.type,
        "layout": source.layout,
        "frame": frame and asdict(frame),
        "input": {
            "files": len(digests),
            "sha256": sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(),
            "images_and_labels": source.data.train.fingerprint(),
        },
    }
    finished = _finished(out, json.loads(json.dumps(job)), bar)
    if finished is not None:
        return Protected(finished, repeated=True)
    kept, recipe = out / STATE / "images.safetensors", sha256(json.dumps(job).encode()).hexdigest()
    made = kept_tensors(kept, recipe)
    if made is None:
        Store(out).open()
        bar.step(f"running {spec.name}", unit="steps")
        with _alone(out), scratch(out / STATE / UNFINISHED, code + recipe) as unfinished, training_threads():
            images = _released(component, source.data, Job(seed, device, bar.work, scratch=unfinished), str(spec))
            keep_file(out / STATE / JOB, json.dumps(job).encode())
            keep_tensors(kept, made := {"images": images}, recipe)
            unfinished.clear()
    train = Split(made["images"], source.data.train.labels)
    change = perturbation(source.data.train, train)
    figures = {"linf_max_levels": round(255 * change["linf_max"]), **change}
    _write_all(source, train, out, bar)
    lines = [f"{len(train):,} images", in_words(figures)]
    keep_file(out / SHEET, contact_sheet(source.data, train, f"{source.data.name}, protected with {spec}", lines))
    bar.step("checking what was written")
    again = read_source(out if path.is_dir() else out / path.name, bar).data.train
    if again.fingerprint() != train.fingerprint():
        raise StoreError(f"the files in {out} do not hold what the defense made; delete the folder and run again")
    written = sorted((*source.files, *source.copies, SHEET))
    manifest = job | _account(source, train, figures) | {"files": digest_files({name: out / name for name in written})}
    keep_file(out / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    shutil.rmtree(out / STATE)
    return Protected(manifest, repeated=False)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    try:
        yield
    except Held:
        raise StoreError(f"another process is at work in {out}; wait for it, or choose another --out") from None


def report(done: Protected, out: Path) -> list[str]:
    """What a user is told of a finished job, in lines."""
    manifest = done.manifest
    figures = manifest["perturbation"]
    count = f"{manifest['images']:,} training images of {len(manifest['classes'])} classes"
    lines = [
        f"{'already ' if done.repeated else ''}protected {count} with {manifest['defense']['spec']}",
        in_words(figures),
    ]
    if frame := manifest.get("frame"):
        lines.append(_framed(frame, " now"))
    lines += [f"{how}: {_some(names)}" for how, names in manifest.get("changed", {}).items()]
    if manifest["copied"]:
        lines.append(f"copied unchanged: {_some(manifest['copied'])}")
    if manifest["renamed"]:
        lines.append(f"PNG, as JPEG would undo the changes, so the names are now: {_renamed(manifest['renamed'])}")
    if manifest["left_out"]:
        lines.append(f"left out, as they are no training images: {_some(manifest['left_out'])}")
    lines += [manifest["note"]] if manifest["note"] else []
    return [*lines, f"{out} holds them, {MANIFEST} with every figure and hash, and {SHEET} to look at"]


def _data_defense(text: str) -> tuple[Spec, DataDefense]:
    """The one defense that ``text`` names, which must act on data, and its name with every parameter."""
    specs = parse_chain(text)
    known = ", ".join(name for name in defenses.names() if getattr(defenses.factory(name), "stage", None) == "data")
    if len(specs) != 1:
        raise ConfigError(f"{text!r} names {len(specs)} defenses; images take one at the data stage: {known}")
    component = defenses.create(specs[0])
    if component.stage != "data":
        raise ConfigError(
            f"{specs[0].name} acts at the {component.stage} stage, on models; images take a data-stage defense: {known}"
        )
    values = asdict(component) if is_dataclass(component) else specs[0].args
    return Spec(specs[0].name, values), component


def _described(spec: Spec, component: DataDefense) -> dict[str, Any]:
    """What the manifest says of the defense, every parameter and not only those that were given."""
    described = {
        "spec": str(spec),
        "name": spec.name,
        "version": pin(str(spec), component).version,
        "paper": getattr(component, "paper", ""),
        "parameters": dict(spec.args),
    }
    traits = {name: getattr(component, name) for name in ("share", "norm", "eps") if hasattr(component, name)}
    return described | traits


def _refuse_foreign(path: Path, out: Path) -> None:
    """Refuse an output folder that holds what no such job has written, or that is part of the input."""
    source, target = (Path(os.path.realpath(place)) for place in (path, out))
    if source == target or source in target.parents or target in source.parents:
        raise ConfigError(f"--out {out} and --in {path} lie in each other; choose a folder beside")
    if reachable(out) and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; choose a folder")
    if not reachable(out, Path.is_dir):
        return
    if (out / STATE).is_dir() or (out / MANIFEST).is_file():
        linked = [Path(place, name) for place, *inside in os.walk(out) for name in chain(*inside)]
        if links := sorted(str(path.relative_to(out)) for path in linked if path.is_symlink()):
            raise ConfigError(f"--out {out} holds links ({_some(links)}), which no such job writes; delete the folder")
        return
    found = sorted(child.name for child in out.iterdir())
    if found:
        raise ConfigError(f"--out {out} holds other things ({_some(found)}); choose a new or empty folder")


def _finished(out: Path, job: Mapping[str, Any], bar: Bar) -> dict[str, Any] | None:
    """The manifest where ``job`` is finished; where it was stopped, what it left half-written goes.

    Raises:
        ConfigError: another job's results are there.
        StoreError: results of this job that were altered.
    """
    if (out / MANIFEST).is_file():
        manifest = _read(out / MANIFEST, _Manifest)
        _same(job, manifest, out)
        bar.step("checking what is there")
        files = {name: out / name for name in manifest["files"]}
        gone = [name for name, file in files.items() if not file.is_file()]
        altered = gone or [name for name, hashed in digest_files(files).items() if hashed != manifest["files"][name]]
        if altered:
            raise StoreError(f"{out} was finished, but changed since: {_some(altered)}; delete it and run again")
        shutil.rmtree(out / STATE, ignore_errors=True)
        return manifest
    if (out / STATE / JOB).is_file():
        _same(job, _read(out / STATE / JOB, _Unfinished), out)
    for file in [file for file in out.rglob(".*.tmp") if BESIDE.fullmatch(file.name)]:
        file.unlink()
    return None


def _same(job: Mapping[str, Any], found: Mapping[str, Any], out: Path) -> None:
    """Refuse to go on with another job than ``found``, by what first tells them apart."""
    for name, value in job.items():
        if found.get(name) != value:
            came, was = (_short(one, name) for one in (value, found.get(name)))
            raise ConfigError(
                f"--out {out} holds a set made with another {NAMES.get(name, name)} ({was}; now {came}); "
                "choose another folder, or delete that one"
            )


def _short(value: Any, name: str) -> str:
    """What a job says under ``name``, in words and whatever a strange file holds there."""
    match name, value:
        case "defense", {"spec": spec}:
            value = spec
        case "input", {"sha256": digest}:
            value = digest
        case "frame", {"size": _, "crop": _}:
            value = _framed(value)
        case "frame", None:
            value = "images as they are"
        case _, dict():
            value = ", ".join(f"{key} {part}" for key, part in value.items())
    return str(value)[:80]


def _framed(frame: Mapping[str, Any], when: str = "") -> str:
    how = {"centre": "the centre cut out", "squeeze": "squeezed into a square"}.get(crop := str(frame["crop"]), crop)
    enlarged = ", small ones enlarged" if frame.get("enlarge") else ""
    return f"{frame['size']}x{frame['size']} pixels{when}, {how}{enlarged}"


def _released(component: DataDefense, data: Dataset, job: Job, name: str) -> Tensor:
    """The images (N, C, H, W) uint8 as the defense releases them."""
    released = component(data.lent(), job)
    try:
        return check_release(released, data.train, declared_threat(component)).images
    except RefereeError as error:
        raise ConfigError(f"{name} {error}") from None


def _write_all(source: Source, train: Split, out: Path, bar: Bar) -> None:
    """Write and copy what is not there yet."""
    images = pixels(train)
    bar.step("writing", len(images), "images")
    for name, file in source.copies.items():
        if not (out / name).exists():
            keep_file(out / name, partial(shutil.copyfile, file))
    single = len(source.files) == len(images)  # else a file holds many images and says itself how far it is

    def write(name: str) -> None:
        if not (out / name).exists():
            keep_file(out / name, source.files[name](images, (lambda count: None) if single else bar.advance))

    in_parallel(write, source.files, bar.advance if single else lambda count: None)


def _account(source: Source, train: Split, figures: Mapping[str, float]) -> dict[str, Any]:
    """What the manifest says of the images, beside the job itself."""
    counts = train.labels.bincount(minlength=len(source.data.classes)).tolist()
    return {
        "output": {"images_and_labels": train.fingerprint()},
        "images": len(train),
        "shape": list(train.shape),
        "classes": dict(zip(source.data.classes, counts, strict=True)),
        "perturbation": dict(figures),
        "note": source.note,
        "copied": sorted(source.copies),
        "renamed": dict(source.renamed),
        "changed": {how: list(names) for how, names in source.changed.items()},
        "left_out": list(source.left_out),
    }


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _renamed(names: Mapping[str, str]) -> str:
    return _some([f"{old} -> {new}" for old, new in names.items()])


class _Unfinished(BaseModel):
    """What the file of an unfinished job must say."""

    defense: dict[str, Any]
    input: dict[str, Any]


class _Manifest(_Unfinished):
    """What a manifest must say, too."""

    files: dict[str, str]
    images: int
    classes: dict[str, int]
    perturbation: dict[str, float]
    copied: list[str]
    renamed: dict[str, str]
    left_out: list[str]
    changed: dict[str, list[str]] = {}
    note: str

    @field_validator("files")
    @classmethod
    def _below(cls, files: dict[str, str]) -> dict[str, str]:
        if not all(name and Path(name).parts[0] != "/" and ".." not in Path(name).parts for name in files):
            raise ValueError("a file elsewhere")
        return files


def _read(file: Path, kind: type[_Unfinished]) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind.model_validate(content)
        str(content["defense"]["spec"])
    except (OSError, ValueError, KeyError, RecursionError):
        raise ConfigError(f"{file} was not written by bench protect; choose a new or empty folder as --out") from None
    return content
