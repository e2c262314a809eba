"""What one step keeps for a later one is taken up only as it was written."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.errors import StoreError
from bench.measure.keys import recipe_key, release_key
from bench.measure.pipeline import Pipeline
from bench.system.sealed import keep_tensors, kept_tensors
from tests.test_runner import grid


def test_tensors_come_back_with_types_and_shapes(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.tensor(0.5), "c": torch.zeros(0, 3, dtype=torch.uint8)}
    keep_tensors(tmp_path / "x", tensors, "mine")
    found = kept_tensors(tmp_path / "x", "mine")
    assert found is not None
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    assert kept_tensors(tmp_path / "y", "mine") is None


def test_writing_to_what_was_taken_up_changes_no_file(tmp_path):
    keep_tensors(tmp_path / "x", {"a": torch.zeros(5000)}, "mine")
    kept_tensors(tmp_path / "x", "mine")["a"].fill_(1)
    assert kept_tensors(tmp_path / "x", "mine")["a"].sum() == 0


@pytest.mark.parametrize("what", ["a value", "a name", "another's place", "a part", "text"])
def test_what_was_altered_is_refused_by_name(tmp_path, what):
    path = tmp_path / "x"
    keep_tensors(path, {"a": torch.zeros(50)}, "mine")
    content = path.read_bytes()
    if what == "a value":
        path.write_bytes(content[:-1] + b"\1")
    elif what == "a name":
        path.write_bytes(content.replace(b'"a":', b'"b":'))
    elif what == "another's place":
        keep_tensors(path, {"a": torch.zeros(50)}, "theirs")
    else:
        path.write_bytes(content[:100] if what == "a part" else b"hello")
    with pytest.raises(StoreError, match=r"/x .*; delete it: it will be made again"):
        kept_tensors(path, "mine")


@pytest.fixture
def task():
    (found,) = grid(attack=["pgd(steps=1)"], defense=["pgd-at(epochs=2, steps=1)"], n=60, model=["cnn(width=4)"])
    return found


def accuracy(folder, task):
    """Of the network that a new run finds in ``folder``, or trains there."""
    pipeline = Pipeline(folder, torch.device("cpu"), 60)
    pipeline.train(task, lambda done, total: None)
    test = task.data.test
    with torch.no_grad():
        return float((pipeline.served(task, "plain").module(test.pixels()).argmax(1) == test.labels).float().mean())


def test_zeroed_weights_never_pass_for_those_that_were_trained(tmp_path, task):
    trained = accuracy(tmp_path, task)
    (path,) = tmp_path.glob("*.safetensors")
    content, weights = path.read_bytes(), load_file(path)
    assert trained > 0.3
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, path)
    assert accuracy(tmp_path, task) == trained, "what nobody vouches for, as before there were seals, is made again"
    assert path.read_bytes() == content
    path.write_bytes(content.replace(weights[max(weights)].numpy().tobytes(), bytes(weights[max(weights)].nbytes)))
    with pytest.raises(StoreError, match=rf"{path.name} is not what was written there; delete it"):
        accuracy(tmp_path, task)
    path.unlink()
    assert accuracy(tmp_path, task) == trained


def test_a_release_under_the_name_of_another_is_refused(tmp_path):
    one, two = grid(attack=["standard"], defense=["ops", "ops(pixels=2)"], n=20)
    pipeline = Pipeline(tmp_path, torch.device("cpu"), 10)
    pipeline.released(one, lambda done, total: None)
    (path,) = tmp_path.glob("*.safetensors")
    pipeline.released(two, lambda done, total: None)
    (other,) = set(tmp_path.glob("*.safetensors")) - {path}
    path.rename(other)
    with pytest.raises(StoreError, match="delete it"):
        pipeline.kept_release(two)


SOURCE = """
from dataclasses import replace
from bench.registry import datasets
def moved():
    return lambda folder: replace(datasets.create("digits")(folder), shift={shift})
"""


def test_a_network_is_not_taken_up_under_other_augmentations(tmp_path):
    """The hash of the images does not tell how they are flipped and shifted in training."""
    x = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 1), dtype=np.uint8)
    y = np.arange(200) % 10
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    named = [f"npz(path={tmp_path}/mine.npz{more})" for more in ("", ", flip=true", ", shift=2")]
    for shift in (0, 3):
        (tmp_path / f"{shift}").mkdir()
        (tmp_path / f"{shift}" / "mine.py").write_text(SOURCE.format(shift=shift))
        named.append(f"{tmp_path}/{shift}/mine.py:moved")
    tasks = [grid(dataset=name, attack=["square"], defense=["ops + pgd-at"], n=5)[0] for name in named]
    assert len({task.cell.data_hash for task in tasks}) == 2
    assert len({recipe_key(task) for task in tasks}) == len({release_key(task.cell) for task in tasks}) == len(tasks)
