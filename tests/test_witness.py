"""A model that answers attacks unlike anybody else is seen; one that does not is not."""

import pytest
import torch
from torch import nn

from bench.measure.pipeline import Pipeline
from bench.measure.witness import FLAG, Witness
from bench.oracle.served import ServedModel
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, expand
from bench.registry import defenses
from bench.results.store import Store
from bench.rng import SampleRng
from bench.run.runner import run
from tests.test_lent import MODEL
from tests.test_runner import Silent

X = torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Honest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
        self.calls = 0

    def forward(self, x):
        return self.body(x)


class Counting(Honest):
    """Gives up defending after a few calls, as a test might not."""

    def forward(self, x):
        self.calls += 1
        return self.body(x) if self.calls <= 10 else self.body(x).flip(1)


class LongMemory(Honest):
    """Answers every question a little less surely than the one before."""

    def forward(self, x):
        self.calls += 1
        return self.body(x) * 0.99**self.calls + torch.arange(5) / 50


class BreaksWhenNew(Honest):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        self.calls += 1
        if self.calls == 1 and not torch.equal(x, X):
            raise self.error("asked too early")
        return self.body(x)


class Noisy(Honest):
    """Draws numbers that belong to no sample, which is another fault."""

    def forward(self, x):
        return self.body(x) + torch.randn(len(x), 5)


def witnessed(module: nn.Module, calls: int = 70, random: bool = False):
    model = ServedModel(module.eval(), random=random)
    witness = Witness(model)
    watched = witness.watch(model)
    streams = SampleRng.create(0, torch.arange(40), "test")
    with torch.no_grad():
        for call in range(calls):
            few = torch.arange(40 - call % 3)
            x = (X + 0.01 * call).clamp(max=1)[few]
            assert watched(x, streams[few].fork(call)).shape == (len(few), 5)
    return witness.finding()


@pytest.mark.parametrize("module", [Honest, Noisy])
def test_nothing_is_said_of_one_that_answers_all_alike(module):
    assert not witnessed(module()).fired


def test_nothing_is_said_of_keyed_randomness():
    rnd = defenses.create("rnd(sigma=0.1)")(Honest().eval(), None, 0)
    assert not witnessed(rnd, random=True).fired


def test_one_that_counts_its_calls_is_seen():
    finding = witnessed(Counting())
    assert finding.fired
    assert finding.statistic == 1
    assert "4 calls of an attack" in finding.evidence  # the 1st, 4th, 16th and 64th


def test_one_that_changes_a_little_with_each_call_is_seen():
    assert witnessed(LongMemory()).fired


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_one_that_fails_when_asked_again_is_seen_and_costs_nothing(error):
    finding = witnessed(BreaksWhenNew(error))
    assert finding.fired
    assert f"{error.__name__}: asked too early" in finding.evidence


def test_rows_say_so(tmp_path):
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "counting.py").write_text(
        "from torch import nn\n\n\nclass Counting(nn.Module):\n"
        "    stage, random, version, paper = 'output', False, 1, ''\n\n"
        "    def __call__(self, model, calibration, seed):\n        return Served(model)\n\n\n"
        "class Served(nn.Module):\n    def __init__(self, model):\n        super().__init__()\n"
        "        self.model, self.calls = model, 0\n\n"
        "    def forward(self, x):\n        self.calls += 1\n"
        "        return self.model(x) * (-1 if self.calls > 3 else 1)\n"
    )
    settings = {"dataset": "digits", "model": [f"{tmp_path}/net.py:Net"], "n": 20, "eps": 0.1, "queries": 20}
    settings["attack"] = ["square"]
    chains = {"defense": ["none", f"{tmp_path}/counting.py:Counting"]}
    tasks = expand(load_suite(None, settings | chains), Loader(None, None))
    store = Store(tmp_path / "out").open()
    run(tasks, store, Pipeline(tmp_path / "networks", torch.device("cpu"), 256), 256, 256, Silent())
    findings = [store.row(task.cell).shards[0].findings for task in tasks]
    fired = [{finding["flag"] for finding in found if finding["fired"]} for found in findings]
    assert FLAG not in fired[0]
    assert FLAG in fired[1]
