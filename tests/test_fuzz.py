"""Whatever comes from outside ends in a result or in one error of ours, never in a traceback.

A few dozen seeded cases for each door run with the other tests; ``make fuzz`` tries thousands of new ones.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import bench.data
import bench.models  # noqa: F401 registers them
from bench.errors import BenchError
from bench.models import resolve
from bench.models.weights import load_weights
from bench.plan.suite import load_suite
from bench.registry import attacks, datasets, defenses, models
from bench.spec import parse_chain

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
fuzz = settings(
    max_examples=int(EXAMPLES or 60), derandomize=EXAMPLES is None, database=None, deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore")]

SPECS = [
    "square", "square(preset=aaa)", "simba(basis=dct, step=0.2)", "pgd(steps=40, rel_step=0.1, restarts=2)", "rays",
    "nes(samples=10, lr=1/255)", "torchattacks:PGD(steps=2)", "standard(epochs=2, lr=0.1)", "jpeg(quality=10)",
    "aaa-linear(offset=secret, temperature=tuned)", "unig(delta=0.5)", "rnd(sigma=0.02)", "ops(pixels=8)",
    "sep(checkpoints=10, eps=8/255, network='cnn(width=16)')", "pgd-at(eps=0.1) + aaa-linear", "lsp", "dent(steps=6)",
    "resnet20(weights=w.safetensors)", "cnn(width=8)", "wide-resnet28-10", "timm:resnet18(pretrained=false)",
    "digits", "npz(path=x.npz, classes=3)", "cifar10(n=10)", "imagefolder(path=x, size=32)", "none",
]  # fmt: skip
TOKENS = [
    "(", ")", "=", ",", "+", ":", "'", '"', "[", "]", "{", "}", "..", "/", "\\", "\0", "\n", "\r", "\t", "\x1b[2J", "|",
    "nan", "inf", "-inf", "-1", "0", "1e400", "1e-400", "9" * 30, "9" * 5000, "0x10", "1_000", "1/0", "8/255", "None",
    "true", "False", "1j", "é", "☃", "\u202e", "\ud800", "eps", "seed", "queries", ".py:", "x.py:y", "../../etc/passwd",
    "lambda: 0", "__import__('os')", "(" * 300, "[" * 3000, "a" * 3000, "[[grid]]", "#", '"""',
]  # fmt: skip
SUITE = """
title = "Noise"
budgets = [100, 500]

[[grid]]
dataset = "digits"
n = 100
model = "cnn(width=8)"
defense = ["none", "rnd(sigma=0.02)"]
attack = ["square", "square(preset=aaa)"]
eps = "8/255"
norm = "linf"
queries = 500
seed = [0, 1]
"""


@contextmanager
def one_error_at_most() -> Iterator[None]:
    """Nothing may leave but an error of ours, with something to say, and not too much."""
    said = "a result"
    try:
        yield
    except BenchError as error:
        said = str(error)
    assert 0 < len(said.strip()) < 5000


@st.composite
def edited(draw: Callable[..., str], texts: list[str]) -> str:
    """One of ``texts`` with a few tokens put in, put in place of others, doubled or cut."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.sampled_from([0, 0, 1, 2, 5, 20])))
        text = text[:start] + draw(st.sampled_from([*TOKENS, text[start:stop] * 2, ""])) + text[stop:]
    return text


@st.composite
def damaged(draw: Callable[..., int], content: bytes) -> bytes:
    """``content`` cut, or with some of its bytes changed, most of them in the header."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, draw(st.sampled_from([40, 400, len(found)]))))
        if place < len(found):
            found[place] = draw(st.sampled_from([0, 1, 0x20, 0x30, 0x39, 0x7F, 0x80, 0xFF, found[place] ^ 1]))
    return bytes(found[: draw(st.sampled_from([len(found), len(found), len(found) // 2, 3]))])


@pytest.mark.parametrize("registry", [attacks, defenses, models, datasets], ids=lambda registry: registry.kind)
@fuzz
@given(text=edited(SPECS))
def test_specs(registry, text):
    with one_error_at_most():
        registry.create(text)


@fuzz
@given(text=edited(SPECS))
def test_chains_and_models(text):
    with one_error_at_most():
        parse_chain(text)
    with one_error_at_most():
        resolve(text)


@fuzz
@given(text=edited([SUITE]))
def test_suites(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "suite.toml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with one_error_at_most():
        load_suite(str(file), {})


def archive(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


LABELS = np.arange(6) % 3
ARCHIVE = archive(x_test=np.zeros((6, 3, 8, 8), np.uint8), y_test=LABELS, x_train=np.zeros((6, 3, 8, 8), np.uint8),
                  y_train=LABELS)  # fmt: skip


@fuzz
@given(content=damaged(ARCHIVE))
def test_archives(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "mine.npz"
    file.write_bytes(content)
    with one_error_at_most():
        datasets.create("npz(path=mine.npz)")(file.parent)


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 6, 8]), max_size=5).map(tuple)
KINDS = st.sampled_from(["u1", "i1", "i8", "u8", "f2", "f4", "f8", "c8", "?", "S3", "U2", "M8[s]", ">f4", ">i8"])
FILLS = st.sampled_from([0, 1, -1, 2, 255, 0.5, float("nan"), float("inf"), 2**40])


@fuzz
@given(shape=SHAPES, kind=KINDS, fill=FILLS, labels=KINDS, label=FILLS)
def test_arrays_of_any_type_and_shape(tmp_path_factory, shape, kind, fill, labels, label):
    file = tmp_path_factory.getbasetemp() / "arrays.npz"
    try:
        images, classes = np.full(shape, fill).astype(kind), np.full(shape[:1], label).astype(labels)
    except (ValueError, OverflowError, TypeError):
        return  # there is no such array
    file.write_bytes(archive(x_test=images, y_test=classes))
    with one_error_at_most():
        data = datasets.create("npz(path=arrays.npz)")(file.parent)
        pixels = data.test.pixels()
        assert pixels.min() >= 0
        assert pixels.max() <= 1


def picture(mode: str, form: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, form)
    return file.getvalue()


@fuzz
@given(content=st.one_of(*(damaged(picture(*kind)) for kind in (("RGB", "PNG"), ("L", "JPEG"), ("I;16", "PNG")))))
def test_pictures(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "pictures"
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            (folder / split / label / "0.png").write_bytes(picture("RGB", "PNG"))
    (folder / "test" / "dog" / "1.png").write_bytes(content)
    with one_error_at_most():
        datasets.create("imagefolder(path=pictures, size=8)")(folder.parent)


NETWORK = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))


def pickled() -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": NETWORK.state_dict()}, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"), [("w.safetensors", safetensors.torch.save(NETWORK.state_dict())), ("w.pt", pickled())]
)
def test_weights(tmp_path, name, content):
    @fuzz
    @given(damage=damaged(content))
    def try_one(damage: bytes) -> None:
        (tmp_path / name).write_bytes(damage)
        with one_error_at_most():
            load_weights(NETWORK, tmp_path / name, None)

    try_one()
