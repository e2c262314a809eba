"""Attacks that are fitted: once for each network and seed, on images that are not attacked, and found again."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from attacks.fg_uap import FGUAP
from attacks.universal import UniversalNoise
from bench.errors import AccessError, ConfigError
from bench.measure.attacked import attack_served
from bench.measure.keys import fit_key
from bench.oracle.served import ServedModel, Target
from bench.oracle.surrogate import Surrogate
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, expand
from bench.protocols import Job
from bench.registry import datasets
from bench.report.figures import figures
from bench.report.outcomes import failure
from bench.results.store import Store
from bench.run.estimate import estimate
from bench.run.executor import Local
from bench.run.processes import Processes
from bench.run.timing import seconds_of_fit
from bench.scratch import Scratch
from bench.system.interrupt import Stopped
from bench.threat import Threat
from tests.problems import images, referee
from tests.test_executors import run_in
from tests.test_runner import grid

OWN = """
import os
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import ClassVar
import torch
from attacks.sourced import Sourced
from bench.registry import added

@dataclass(frozen=True, kw_only=True)
class Attack(Sourced):
    gives: str = "tensors"
    access: ClassVar = "labels"
    norms: ClassVar = frozenset({"linf"})
    version: ClassVar = 1
    paper: ClassVar = ""
    def fit(self, model, data, threat, job):
        assert not model.training and len(data.test) == 0 and len(data.train) > 100
        assert threat.query_budget is None  # on which no key of a fit depends
        with Path(__file__).with_name("fits").open("a") as file:
            file.write(f"{job.seed} {threat.eps}\\n")
        if self.gives != "tensors":
            return {"shift": torch.tensor(float("nan"))} if self.gives == "nan" else 3
        return {"shift": torch.tensor(threat.eps), "some": torch.arange(3.0)}
    def apply(self, x, threat, fitted):
        return (x + fitted["shift"]).clamp(max=1)
    def __call__(self, oracle, x, y, threat, rng):
        x_adv = self.apply(x, threat, oracle.fitted)
        oracle.labels(x_adv)
        return x_adv
"""


NET = """
import torch

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py:Attack"


@pytest.fixture
def net(tmp_path):
    """A network that needs no training, and knows little."""
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path}/net.py:net"


def fits(own):
    return (Path(own).parent / "fits").read_text().splitlines()


BOTH = [
    pytest.param(Local(), id="local"),
    pytest.param(Processes([torch.device("cpu")] * 2), id="processes", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("executor", BOTH)
def test_it_is_fitted_once_for_each_network_and_seed_and_not_once_for_each_shard(own, net, tmp_path, executor):
    tasks = grid(attack=[own], defense=["none", "rounding"], n=10, seed=[0, 1], model=[net], queries=3)
    store, outcome, told = run_in(tmp_path / "out", tasks, executor)
    assert (outcome.ran, outcome.failed) == (4, 0)
    assert len(told.begun) == 8
    assert sorted(fits(own)) == ["0 0.15", "1 0.15"]  # defenses of the same network share it
    assert len(told.made) == 2
    row = store.row(tasks[0].cell)
    assert row.figures["fit_shift"] == pytest.approx(0.15)
    assert "fit_some" not in row.figures
    run_in(tmp_path / "again", tasks[:1], Local())
    assert len(fits(own)) == 3  # another folder knows nothing of it


def test_what_it_comes_to_is_looked_at(own, net, tmp_path):
    for gives, said in (("nan", "gave shift with NaN"), ("number", "gave a int; give tensors by name")):
        tasks = grid(attack=[f"{own}(gives={gives})"], defense=["none"], n=5, model=[net])
        store, outcome, _ = run_in(tmp_path / gives, tasks, Local())
        assert outcome.failed == 1
        assert said in failure(store.row(tasks[0].cell))


def planned(attack="fg-uap", **settings):
    suite = {"dataset": "digits", "n": 20, "eps": 0.15, "queries": 5, "seed": [0], "defense": ["none"]}
    suite |= {"model": ["cnn(width=4)"], "attack": [attack], **settings}
    (task,) = expand(load_suite(None, suite), Loader(None, None))
    return task


def test_its_key_is_of_all_that_decides_it_and_of_nothing_else():
    key = fit_key(planned())
    same = [planned(queries=9), planned(n=30), planned(defense=["rounding"]), planned("fg-uap(epochs=2)")]
    assert {fit_key(task) for task in same} == {key}
    other = [planned(eps=0.1), planned(norm="l2"), planned(seed=[1]), planned("fg-uap(epochs=3)"),
             planned("fg-uap(from=cnn(width=8))"), planned(model=["cnn(width=8)"]), planned("uap"),
             planned(defense=["pgd-at(epochs=1)"])]  # fmt: skip
    assert len({fit_key(task) for task in other} | {key}) == len(other) + 1


def test_a_network_is_fitted_on_once_whether_it_is_attacked_or_a_source():
    attacked, by_transfer = planned(), planned("fg-uap(from=cnn(width=8))")
    assert fit_key(replace(by_transfer, sources=(attacked,))) == fit_key(attacked)
    assert fit_key(replace(by_transfer, sources=(attacked, *by_transfer.sources))) != fit_key(attacked)


def test_without_from_it_is_a_control_and_with_it_an_attack():
    assert planned().cell.attack.control
    assert not planned("fg-uap(from=cnn(width=8))").cell.attack.control


def test_who_has_nothing_to_fit_on_is_told_before_anything_runs(net, tmp_path):
    (tmp_path / "bare.py").write_text(
        "from bench.dataset import Dataset\nfrom bench.registry import datasets\n\n"
        "class Bare:\n    def __call__(self, folder):\n"
        "        digits = datasets.create('digits')(None)\n        nothing = digits.train.subset(slice(0))\n"
        "        return Dataset('bare', digits.classes, nothing, nothing, digits.test)\n"
    )
    with pytest.raises(ConfigError, match=r"is fitted on other images than it attacks, and .* has none"):
        planned(dataset=f"{tmp_path}/bare.py:Bare", model=[net])


def test_who_names_no_version_and_no_paper_is_fitted_too(own, net, tmp_path):
    file = Path(own.partition(":")[0])
    bare = (line for line in file.read_text().splitlines() if "version" not in line and "paper" not in line)
    file.write_text("\n".join(["class Sourced: ...", *bare]).replace("from attacks.sourced import Sourced", ""))
    tasks = grid(attack=[own], defense=["none"], n=4, model=[net], queries=1)
    store, outcome, _ = run_in(tmp_path / "out", tasks, Local())
    assert outcome.failed == 0, failure(store.row(tasks[0].cell))
    assert "fit_shift" in store.row(tasks[0].cell).figures


def test_only_who_is_fitted_finds_something():
    x = images(1)
    oracle = referee(nn.Flatten(), x, torch.zeros(1, dtype=torch.int64), attack="sly")
    with pytest.raises(AccessError, match="sly asked for what it was fitted to; give it the methods fit and apply"):
        _ = oracle.oracle.fitted


class Written(UniversalNoise):
    """Writes into what it was fitted to."""

    def apply(self, x, threat, fitted):
        fitted["perturbation"].mul_(-1)
        return super().apply(x, threat, fitted)


def test_what_was_fitted_is_the_same_for_every_shard():
    task = replace(planned("universal-noise", n=20), attack=Written())
    served = ServedModel(flat(0).requires_grad_(False))
    target = Target(served, served, served, served, fitted={"perturbation": 0.15 * torch.ones(1, 1, 8, 8)})
    first, again = (attack_served(task, target, list(task.cell.ids), torch.device("cpu")) for _ in range(2))
    assert torch.equal(target.fitted["perturbation"], 0.15 * torch.ones(1, 1, 8, 8))
    assert first.equals(again)


def flat(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


def test_a_fit_that_was_killed_goes_on_to_the_same_perturbation(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.scratch.PAUSE", 0.0)
    digits, threat = datasets.create("digits")(None).lent(), Threat("linf", 0.1, "labels", 1)
    attack = FGUAP(epochs=4, images=200)

    def stop(done, total):
        if done == 2:
            raise Stopped(signal.SIGTERM)

    def fit(**job):
        return attack.fit(Surrogate([flat(0)]), digits, threat, Job(seed=1, **job))["perturbation"]

    with pytest.raises(Stopped):
        fit(scratch=Scratch(tmp_path / "job"), progress=stop)
    told = []
    again = fit(scratch=Scratch(tmp_path / "job"), progress=lambda done, total: told.append(done))
    assert told == [3, 4]
    assert torch.equal(again, fit())


def test_images_that_are_wrong_when_clean_are_judged_with_the_perturbation_too(tmp_path):
    task = planned("universal-noise", n=100)
    served = ServedModel(flat(0).requires_grad_(False))  # which gets a tenth right
    fitted = {"perturbation": 0.15 * torch.ones(1, 1, 8, 8)}
    table = attack_served(task, Target(served, served, served, served, fitted=fitted), list(task.cell.ids),
                          torch.device("cpu"))  # fmt: skip
    x = task.data.test.pixels(list(task.cell.ids))
    assert table["applied_pred"].tolist() == served.module((x + 0.15).clamp(0, 1)).argmax(1).tolist()
    assert (table["first_hit"] == 0).mean() > 0.5
    assert "surrogate_forwards" not in table


def test_figures_of_universal_perturbations_are_those_of_all_images(net, tmp_path):
    task = planned("universal-noise", n=50, model=[net])
    store, _, _ = run_in(tmp_path, [task], Local(), shard_size=50)
    row = store.row(task.cell)
    records, found = row.records, figures(row)
    assert found["fooling"] == (records["applied_pred"] != records["clean_pred"]).mean()
    counts = records["applied_pred"].value_counts().to_numpy()
    assert [found[f"dominance_{k}"] for k in (1, 3, 5)] == [counts[:k].sum() / 50 for k in (1, 3, 5)]
    assert {"fit_fooling", "fit_fooling_unclipped"} <= set(found)


def test_a_plan_counts_a_fit_at_the_first_cell_that_needs_it(monkeypatch, net, tmp_path):
    timed = []
    monkeypatch.setattr("bench.run.estimate.seconds_of_fit", lambda task, device: timed.append(task) or 7.0)
    tasks = grid(attack=["uap", "universal-noise", "noise"], defense=["none", "rounding"], n=5, model=[net])
    plans = estimate(tasks, Store(tmp_path), torch.device("cpu"), 5)
    assert sorted(plan.training for plan in plans) == [0.0] * 4 + [7.0] * 2
    assert len(timed) == 2
    monkeypatch.undo()
    assert 0 < seconds_of_fit(timed[0], torch.device("cpu")) < 60
