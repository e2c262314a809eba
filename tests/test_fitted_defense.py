"""Output defenses that are trained: once for each network and seed, on no test images, and found again."""

import signal
from pathlib import Path

import pytest
import torch

from bench.check import Broken, subject
from bench.check.output import is_copied, learns
from bench.entries.about import About
from bench.entries.assemble import assemble
from bench.entries.proof import Rescorer
from bench.errors import ConfigError
from bench.measure.keys import defense_key, fit_key
from bench.measure.pipeline import Pipeline
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, expand
from bench.report.outcomes import failure
from bench.results.shards import SHARDS, read_shard
from bench.results.store import Store
from bench.run.estimate import estimate
from bench.run.executor import Local
from bench.spec import Spec
from bench.system.interrupt import Stopped
from tests.test_executors import run_in
from tests.test_fitted import BOTH, NET, fits
from tests.test_runner import grid
from tests.test_runner import run_in as run_tasks

OWN = """
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import torch
from torch import nn
from bench.training import seeded

@dataclass(frozen=True, kw_only=True)
class Scaled:
    "Logits times a factor that it has learned."
    gives: str = "tensors"
    steps: int = 4
    random: ClassVar = False
    stage: ClassVar = "output"
    version: ClassVar = 1
    paper: ClassVar = "nobody"
    def fit(self, model, data, job):
        assert len(data.test) == 0 and len(data.train) > 100 and not model.training
        with Path(__file__).with_name("fits").open("a") as file:
            file.write(f"{job.seed}\\n")
        done, value = job.scratch.load("state") or (0, 0.0)
        network = model.networks[0] if self.gives == "few of one" else model
        for step in range(done, self.steps):
            value += float(network(data.train.pixels(slice(step, step + 1))).detach().abs().mean())
            job.scratch.save("state", [step + 1, value])
            job.progress(step + 1, self.steps)
        if self.gives in ("nan", "number"):
            return {"value": torch.tensor(float("nan"))} if self.gives == "nan" else 3
        asked = 0 if self.gives.startswith("few") else self.steps
        return {"value": torch.tensor(value), "queries": torch.tensor(asked), "some": torch.arange(3.0)}
    def __call__(self, model, calibration, seed, fitted):
        return Times(model, fitted["value"]).eval()

class Times(nn.Module):
    def __init__(self, model, value):
        super().__init__()
        self.model = model
        self.register_buffer("value", value)
    def forward(self, x):
        return self.value * self.model(x)
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN + NET)
    return f"{tmp_path}/own.py:Scaled"


@pytest.fixture
def net(own):
    """A network that needs no training, and knows little."""
    return own.replace("Scaled", "net")


@pytest.mark.parametrize("executor", BOTH)
def test_it_is_trained_once_for_each_network_and_seed_and_for_all_attacks(own, net, tmp_path, executor):
    attack = ["pgd(steps=1)", "fgsm"]  # that need gradients, so that no process is started for the defense
    tasks = grid(attack=attack, defense=[own], n=6, seed=[0, 1], model=[net], queries=3)
    store, outcome, told = run_in(tmp_path / "out", tasks, executor)
    assert (outcome.ran, outcome.failed) == (4, 0)
    assert sorted(fits(own)) == ["0", "1"]
    assert len(told.made) == 2
    figures = store.row(tasks[0].cell).figures
    assert figures["defense_value"] > 0
    assert figures["defense_queries"] == 4
    assert "defense_some" not in figures


def test_one_of_a_users_file_serves_from_its_own_process_with_what_it_has_learned(own, net, tmp_path):
    inside = grid(attack=["pgd(steps=1)"], defense=[own], n=5, model=[net])  # gradients need our process
    outside = grid(attack=["noise"], defense=[own], n=5, model=[net], queries=3)
    store, outcome, _ = run_in(tmp_path / "out", [*inside, *outside], Local())
    assert outcome.failed == 0
    rows = [store.row(task.cell) for task in (*inside, *outside)]
    places = [row.shards[0].provenance["defense"] for row in rows]
    assert places == ["in the process of the referee", "in a process of its own"]
    confidence = [row.records["clean_confidence"].tolist() for row in rows]
    assert confidence[0] == pytest.approx(confidence[1])
    assert len(fits(own)) == 1


@pytest.mark.parametrize(("gives", "said"), [
    ("nan", "gave value with NaN"), ("number", "gave a int; give tensors"), ("few", "says that it asked 0 queries"),
    ("'few of one'", "says that it asked 0 queries, and asked 4"),
])  # fmt: skip
def test_what_it_learns_is_looked_at(own, net, tmp_path, gives, said):
    tasks = grid(attack=["noise"], defense=[f"{own}(gives={gives})"], n=5, model=[net], queries=3)
    store, outcome, _ = run_in(tmp_path / "out", tasks, Local())
    assert outcome.failed == 1
    assert said in failure(store.row(tasks[0].cell))


def planned(own, attack="noise", **settings):
    suite = {"dataset": "digits", "n": 20, "eps": 0.15, "queries": 5, "seed": [0], "defense": [own]}
    suite |= {"model": ["cnn(width=4)"], "attack": [attack], **settings}
    (task,) = expand(load_suite(None, suite), Loader(None, None))
    return task


def test_its_key_is_of_all_that_decides_it_and_of_nothing_else(own):
    key = defense_key(planned(own))
    same = [planned(own, queries=9), planned(own, n=30), planned(own, eps=0.1), planned(own, "square")]
    assert {defense_key(task) for task in same} == {key}
    other = [planned(f"{own}(steps=3)"), planned(own, seed=[1]), planned(own, model=["cnn(width=8)"]),
             planned(f"pgd-at(epochs=1) + {own}")]  # fmt: skip
    assert len({defense_key(task) for task in other} | {key}) == len(other) + 1
    assert fit_key(planned(own, "uap")) == fit_key(planned("none", "uap"))


def test_a_training_that_was_killed_goes_on_to_the_same_and_another_process_finds_it(own, net, tmp_path):
    task = planned(own, model=[net])

    def learned(folder, stop=0):
        def progress(done, total):
            told.append(done)
            if done == stop:
                raise Stopped(signal.SIGTERM)

        told = []
        try:
            return Pipeline(folder, torch.device("cpu"), 64).fitted_defense(task, progress), told
        except Stopped:
            return None, told

    assert learned(tmp_path / "killed", stop=2) == (None, [1, 2])
    again, told = learned(tmp_path / "killed")
    assert told == [3, 4]
    whole, _ = learned(tmp_path / "whole")
    assert all(torch.equal(again[name], whole[name]) for name in ("value", "queries", "some"))
    assert not list((tmp_path / "killed" / "unfinished").glob("*/"))
    assert learned(tmp_path / "whole")[1] == []


def test_an_entry_holds_what_it_has_learned_and_is_unproven_without_it(own, net, tmp_path):
    suite = load_suite(None, {"dataset": "digits", "n": 5, "eps": 0.15, "queries": 3, "defense": [own],
                              "model": [net], "attack": ["noise"]})  # fmt: skip
    tasks = expand(suite, Loader(None, None))
    store, _, _ = run_in(tmp_path / "out", tasks, Local())
    pipeline = Pipeline(tmp_path / "out" / "networks", torch.device("cpu"), 64)
    entry, code = tmp_path / "entry", Path(own.partition(":")[0])
    assemble(tasks, store, pipeline, entry, About(name="Scaled", authors=["nobody"]), suite, [Spec.parse(own)])
    (kept,) = (entry / "networks").iterdir()
    assert kept.stem == defense_key(tasks[0])

    def ask():
        return Rescorer(entry, Loader(None, None), code, torch.device("cpu")).problems(where, stored)

    where, stored = next((path, read_shard(path)) for path in (entry / "rows").rglob(SHARDS))
    assert ask() == ([], "")
    kept.unlink()
    problems, unseen = ask()
    assert not problems
    assert "has learned is not in networks/, and nothing is trained for this" in unseen


def test_who_has_nothing_to_train_on_is_told_before_anything_runs(own, net, tmp_path):
    (tmp_path / "bare.py").write_text(
        "from bench.dataset import Dataset\nfrom bench.registry import datasets\n\n"
        "class Bare:\n    def __call__(self, folder):\n"
        "        digits = datasets.create('digits')(None)\n        nothing = digits.train.subset(slice(0))\n"
        "        return Dataset('bare', digits.classes, nothing, nothing, digits.test)\n"
    )
    with pytest.raises(ConfigError, match=r"this output defense is trained on images that .* has none"):
        planned(own, dataset=f"{tmp_path}/bare.py:Bare", model=[net])


def test_a_plan_times_its_training_and_leaves_its_queries_open_until_it_is_trained(own, net, tmp_path):
    tasks = grid(attack=["pgd(steps=1)", "fgsm"], defense=[own], n=5, model=[net], queries=3)
    before = estimate(tasks, Store(tmp_path / "out"), torch.device("cpu"), 5)
    assert [plan.training > 0 for plan in before] == [True, False]
    assert [plan.seconds for plan in before] == [None, None]
    run_in(tmp_path / "out", tasks[:1], Local())
    (after,) = estimate(tasks[1:], Store(tmp_path / "out"), torch.device("cpu"), 5)
    assert after.training == 0
    assert after.seconds > 0


def test_check_trains_it_and_says_what_it_has_learned(own):
    assert "learns 3 tensors" in learns(subject(own))
    assert is_copied(subject(own)) == "copies and pickles"
    broken = Path(own.partition(":")[0])
    broken.write_text(OWN.replace("value += float(", "value += float(torch.rand(1)) * float("))
    with pytest.raises(Broken, match="one seed gives two fits"):
        learns(subject(own))


FORGETFUL = """
class Forgetful:
    "A factor that it keeps to itself. It names no version and no paper, which are nobody's duty."
    random: ClassVar = False
    stage: ClassVar = "output"
    factor = 1.0
    def fit(self, model, data, job):
        self.factor = 3.0
        return {"something": torch.tensor(0.0)}
    def __call__(self, model, calibration, seed, fitted=None):
        assert fitted is not None
        return Times(model, torch.tensor(self.factor)).eval()
"""


def test_it_serves_the_same_in_the_run_that_trains_it_and_in_a_later_one(own, net, tmp_path):
    Path(own.partition(":")[0]).write_text(OWN + NET + FORGETFUL)
    networks, rows = tmp_path / "networks", []
    for run in ("first", "later"):
        (task,) = grid(attack=["fgsm"], defense=[own.replace("Scaled", "Forgetful")], n=5, model=[net], queries=3)
        outcome, store = run_tasks(tmp_path / run, [task], networks=networks)
        assert outcome.failed == 0, failure(store.row(task.cell))
        rows.append(store.row(task.cell).records["clean_confidence"].tolist())
    assert rows[0] == rows[1]
