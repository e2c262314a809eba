"""Work that was stopped goes on where it was, and ends with the same bits as work that was not."""

import signal
from dataclasses import replace
from functools import partial

import pytest
import torch

from attacks.learners.standard import Standard
from bench import scratch as module
from bench.errors import StoreError
from bench.measure.pipeline import Pipeline
from bench.models import resolve
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, expand
from bench.protocols import Job
from bench.registry import datasets, defenses
from bench.results.store import Store
from bench.run.runner import run
from bench.scratch import Scratch, scratch
from bench.system.claims import Held
from bench.system.interrupt import Stopped
from tests.test_runner import Silent


@pytest.fixture(autouse=True)
def always_due(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)


@pytest.fixture
def few():
    digits = datasets.create("digits")(None)
    return replace(digits, train=digits.train.subset(slice(200)))


def kill_at(limit):
    """A progress report that ends all at the ``limit``-th call."""
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) == limit:
            raise Stopped(signal.SIGTERM)

    return progress


def build():
    return torch.nn.Sequential(resolve("cnn(width=4)")(10, (1, 8, 8), None), torch.nn.Dropout(0.2))


def test_pieces_come_back_but_not_to_other_code(tmp_path):
    kept = {"weights": torch.arange(3.0), "done": 4, "parts": [torch.zeros(2, dtype=torch.uint8)]}
    Scratch(tmp_path / "job", "1").save("state", kept)
    back = Scratch(tmp_path / "job", "1").load("state")
    assert torch.equal(back["weights"], kept["weights"])
    assert back["done"] == 4
    assert Scratch(tmp_path / "job", "2").load("state") is None
    assert Scratch(tmp_path / "job", "1").load("other") is None
    content = (tmp_path / "job" / "state").read_bytes()
    (tmp_path / "job" / "other").write_bytes(content)
    assert Scratch(tmp_path / "job", "1").load("other") is None, "a piece of another name"
    (tmp_path / "job" / "state").write_bytes(content.replace(torch.arange(3.0).numpy().tobytes(), bytes(12)))
    assert Scratch(tmp_path / "job", "1").load("state") is None, "zeroed weights"
    (tmp_path / "job" / "state").write_bytes(b"cut off")
    assert Scratch(tmp_path / "job", "1").load("state") is None
    Scratch(tmp_path / "job", "1").clear()
    assert not (tmp_path / "job").exists()
    nowhere = Scratch()
    nowhere.save("state", kept)
    assert nowhere.load("state") is None
    assert not nowhere.due()


def test_two_processes_do_not_share_a_scratch(tmp_path):
    with scratch(tmp_path / "job", "1") as first:
        first.save("state", 1)
        with pytest.raises(Held), scratch(tmp_path / "job", "1"):
            pass
        assert first.load("state") == 1
    with scratch(tmp_path / "job", "1") as later:
        assert later.load("state") == 1


def test_a_full_disk_is_a_users_error_and_no_traceback(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot write"):
        Scratch(tmp_path / "file").save("state", 1)


def test_a_training_run_goes_on_to_the_same_weights(few, tmp_path):
    learner, place = Standard(epochs=5), partial(Scratch, tmp_path / "job")
    whole = learner(build, few, Job(seed=3)).state_dict()
    with pytest.raises(Stopped):
        learner(build, few, Job(seed=3, scratch=place(), progress=kill_at(4)))
    reported = []
    gone_on = learner(build, few, Job(seed=3, scratch=place(), progress=lambda done, total: reported.append(done)))
    assert reported == [3, 4, 5]
    assert all(torch.equal(value, gone_on.state_dict()[name]) for name, value in whole.items())


DEFENSES = [
    "sep(epochs=5, checkpoints=3, steps=2, network=cnn(width=4))",
    "sep(epochs=5, checkpoints=2, steps=2, network=cnn(width=4), variant=as-released)",
    "tap(epochs=4, steps=2, network=cnn(width=4))",
    "em(rounds=4, train_steps=2, steps=2, stop_error=0, network=cnn(width=4))",
    "rem(epochs=3, steps=1, draws=1, adv_steps=1, network=cnn(width=4))",
]


@pytest.mark.parametrize("name", DEFENSES)
def test_a_data_defense_goes_on_to_the_same_images(name, few, tmp_path):
    defense = defenses.create(name)
    whole = defense(few, Job(seed=1)).images
    with pytest.raises(Stopped):
        defense(few, Job(seed=1, scratch=Scratch(tmp_path / "job"), progress=kill_at(3)))
    assert any((tmp_path / "job").iterdir())
    assert torch.equal(defense(few, Job(seed=1, scratch=Scratch(tmp_path / "job"))).images, whole)


def test_images_that_are_moved_already_are_not_moved_again(few, tmp_path, monkeypatch):
    monkeypatch.setattr("defenses.checkpoints.CHUNK", 64)
    defense = defenses.create("sep(epochs=2, checkpoints=1, steps=2, network=cnn(width=4))")
    whole, moves = defense(few, Job(seed=1)).images, []
    walk = type(defense).walk

    def watched(self, direction, levels, target):
        moves.append(len(levels))
        if len(moves) == 3:
            raise Stopped(signal.SIGTERM)
        return walk(self, direction, levels, target)

    monkeypatch.setattr(type(defense), "walk", watched)
    with pytest.raises(Stopped):
        defense(few, Job(seed=1, scratch=Scratch(tmp_path / "job")))
    assert torch.equal(defense(few, Job(seed=1, scratch=Scratch(tmp_path / "job"))).images, whole)
    assert moves == [64, 64, 64, 64, 8]  # the third was cut off


class KilledOnce(Silent):
    """Ends the run at its ``limit``-th report of work."""

    def __init__(self, limit):
        self.progress = kill_at(limit)

    def work(self, unit, done, total, what):
        self.progress(done, total)


def test_a_cell_goes_on_and_remembers_its_peak(tmp_path):
    settings = {"dataset": "digits", "model": ["cnn(width=4)"], "n": 50, "defense": ["ops"]}
    tasks = expand(load_suite(None, {**settings, "attack": ["standard(epochs=4)"]}), Loader(None, None))
    rows = []
    for name, limits in {"whole": [], "stopped": [3]}.items():
        store = Store(tmp_path / name).open()
        pipeline = Pipeline(store.root / "networks", torch.device("cpu"), 256)
        for limit in limits:
            with pytest.raises(Stopped):
                run(tasks, store, pipeline, 50, 256, KilledOnce(limit))
            pieces = sorted(file.name.partition("-")[0] for file in store.root.glob("networks/unfinished/*/*"))
            assert pieces == ["history", "training"]
        run(tasks, store, pipeline, 50, 256, Silent())
        assert not any((store.root / "networks" / "unfinished").glob("*/"))
        rows.append(store.row(tasks[0].cell))
    assert rows[0].figures == rows[1].figures
    assert rows[0].figures["peak_epoch"] >= 1
