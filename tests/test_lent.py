"""Nobody's cell changes another's: networks, images, labels and answers are everybody's own."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.errors import RefereeError
from bench.measure.pipeline import Pipeline
from bench.models.lent import changes, contents, own
from bench.oracle.served import ServedModel
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, Task, expand
from bench.report.marks import marks_of
from bench.results.store import Row, Store
from bench.rng import SampleRng
from bench.run.runner import run
from tests.test_runner import Silent

MODEL = """
import torch
from torch import nn
from sklearn.datasets import load_digits

GAIN = 1.0

class Net(nn.Module):
    scale, table = 1.0, torch.ones(1)

    def __init__(self, change=""):
        super().__init__()
        bunch = load_digits()
        means = [torch.from_numpy(bunch.images[bunch.target == label].mean(0) / 16).float() for label in range(10)]
        self.linear = nn.Linear(64, 10)
        self.change = change
        with torch.no_grad():  # the nearest mean
            self.linear.weight.copy_(torch.stack(means).flatten(1))
            self.linear.bias.copy_(-self.linear.weight.square().sum(1) / 2)

    def forward(self, x):
        if self.change == "operator":
            x *= 0.9
        elif self.change == "data":
            x.data.mul_(0.9)
        elif self.change == "numpy":
            x.detach().numpy()[:] *= 0.9
        elif self.change == "none":
            x = x * 0.9
        return self.linear(x.flatten(1)) * (GAIN * self.scale * self.table)
"""

DEFENSES = """
import torch
from torch import nn
from bench.oracle import Rules

class Output:
    stage, random, version, paper = "output", False, 1, ""

class Hooking(Output):
    def __call__(self, model, calibration, seed):
        for part in model.modules():
            part.register_forward_hook(lambda part, given, out: out.roll(1, dims=-1))
        return model

class Nothing(Output):
    def __call__(self, model, calibration, seed):
        pass

class NothingTrained(Nothing):
    stage = "training"

class NothingLearned:
    access, version, paper = "training-data", 1, ""

    def __call__(self, build, data, job):
        pass

class LearnsNan:
    access, version, paper = "training-data", 1, ""

    def __call__(self, build, data, job):
        network = build()
        with torch.no_grad():
            network.linear.weight.fill_(float("nan"))
        return network

class Writing(Output):
    def __call__(self, model, calibration, seed):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        calibration.images.zero_()
        model.change = "none"
        return model

class Patching(Output):
    def __call__(self, model, calibration, seed):
        kind = next(type(part) for part in model.modules() if hasattr(part, "change"))
        plain = kind.forward
        kind.forward = lambda self, x: plain(self, x).roll(1, dims=-1)
        return model

def kind_of(model):
    return next(type(part) for part in model.modules() if hasattr(part, "change"))

class ClassNumber(Output):
    def __call__(self, model, calibration, seed):
        kind_of(model).scale = -1.0
        return model

class ClassNumberThenFails(Output):
    def __call__(self, model, calibration, seed):
        kind_of(model).scale = -1.0
        raise RuntimeError("gave up")

class ClassNumberInTraining:
    stage, version, paper = "training", 1, ""

    def __call__(self, build, data, job):
        network = build()
        type(network).scale = -1.0
        return network

class ClassTensor(Output):
    def __call__(self, model, calibration, seed):
        kind_of(model).table.fill_(-1)
        return model

class ModuleNumber(Output):
    def __call__(self, model, calibration, seed):
        kind_of(model).forward.__globals__["GAIN"] = -1.0
        return model

class Surrogate:
    access, norms, rules = "scores", frozenset({"linf"}), Rules(surrogate=True)

    def __call__(self, oracle, x, y, threat, rng):
        with torch.no_grad():
            for parameter in oracle.surrogate.module.parameters():
                parameter.zero_()
        return x

class MovesTheBall(Output):
    def __init__(self, inplace=True):
        self.inplace = inplace

    def __call__(self, model, calibration, seed):
        outer = self
        class Served(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, x):
                if outer.inplace:
                    x.mul_(0.5)
                else:
                    x = x * 0.5
                return self.model(x)

        return Served()

class Corrupting:
    stage, version, paper, norm, eps = "data", 1, "", "linf", 1.0

    def __call__(self, data, job):
        released = type(data.train)(data.train.images.clone(), data.train.labels.clone())
        for split in (data.train, data.test, data.calibration):
            split.images.zero_()
            split.labels.zero_()
        return released

class Peeking:
    stage, version, paper = "training", 1, ""

    def __call__(self, build, data, job):
        raise ValueError(f"sees {len(data.train)}, {len(data.calibration)}, {len(data.test)} of {data.test.shape}")

class HookedTraining:
    stage, version, paper = "training", 1, ""

    def __call__(self, build, data, job):
        network = build()
        network.register_forward_hook(lambda part, given, out: -out)
        return network
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(MODEL)
    Path("mine.py").write_text(DEFENSES)
    return tmp_path


FEW = {"dataset": "digits", "attack": "square", "n": 24, "eps": 0.2, "queries": 10, "numerics": "plain"}


def rows(folder: Path, batch_size: int = 256, **grid) -> list[Row]:
    return run_all(folder, cells(**({"model": "net.py:Net"} | grid)), batch_size)


def cells(**grid) -> list[Task]:
    return expand(load_suite(None, FEW | grid), Loader(None, None))


def run_all(folder: Path, tasks: list[Task], batch_size: int = 256) -> list[Row]:
    store, pipeline = Store(folder).open(), Pipeline(folder / "networks", torch.device("cpu"), batch_size)
    run(tasks, store, pipeline, 256, batch_size, Silent())
    return [store.row(task.cell) for task in tasks]


def same(a: Row, b: Row) -> bool:
    return a.records.drop(columns="seed").equals(b.records.drop(columns="seed"))


@pytest.mark.parametrize("name", ["Hooking", "Writing"])
@pytest.mark.parametrize("numerics", ["plain", "fast"])
def test_what_a_defense_does_to_its_network_stays_in_its_cell(here, name, numerics):
    (alone,) = rows(here / "alone", defense="none", numerics=numerics)
    defended, none = rows(here / "both", defense=[f"mine.py:{name}", "none"], numerics=numerics)
    assert alone.records["clean_pred"].eq(alone.records["y"]).mean() > 0.8
    assert defended.records["clean_pred"].eq(defended.records["y"]).mean() < 0.5
    assert same(none, alone)
    assert list(defended.records["twin_pred"]) == list(alone.records["twin_pred"])


@pytest.mark.parametrize(
    ("name", "changed"),
    [("Patching", "Net.forward"), ("ClassNumber", "Net.scale"), ("ClassTensor", "Net.table"),
     ("ModuleNumber", "net.GAIN")],
)  # fmt: skip
def test_what_networks_share_fails_the_cell_that_changed_it_by_name(here, name, changed):
    (alone,) = rows(here / "alone", defense="none")
    row, none = rows(here / "both", defense=[f"mine.py:{name}", "none"])
    assert not row.complete
    assert same(none, alone)
    assert f"mine.py:{name}" in row.errors[0]
    assert changed in row.errors[0]


def test_what_networks_share_is_put_back_by_a_cell_that_fails_for_another_reason(here):
    """The next cell has a network of its own, which is first looked at when it is made."""
    other = {"model": "net.py:Net(change=none)"}
    (alone,) = rows(here / "alone", defense="none", **other)
    tasks = [
        *cells(model="net.py:Net", defense="mine.py:ClassNumberThenFails", attack="pgd(steps=2)"),  # in this process
        *cells(**other),
    ]
    broken, none = run_all(here / "both", tasks)
    assert "mine.py:ClassNumberThenFails" in broken.errors[0]
    assert "Net.scale" in broken.errors[0]
    assert "gave up" in broken.errors[0]
    assert same(none, alone)


def test_a_training_that_changes_what_networks_share_fails_by_name(here):
    Path("net.py").write_text(
        MODEL + "\n\nclass Late:\n    trained, version, paper = False, 1, ''\n\n"
        "    def __call__(self, classes, shape, model_dir):\n        return Net()\n"
    )
    tasks = [
        *cells(model="net.py:Late", defense="mine.py:ClassNumberInTraining"),
        *cells(model="net.py:Net"),
    ]
    trained, none = run_all(here / "both", tasks)
    assert "mine.py:ClassNumberInTraining" in trained.errors[0]
    assert "Net.scale" in trained.errors[0]
    assert none.records["clean_pred"].eq(none.records["y"]).mean() > 0.8


@pytest.mark.parametrize("change", ["operator", "data", "numpy"])
@pytest.mark.parametrize("attack", ["square", "noise"])
def test_a_network_that_writes_into_its_input_is_the_function_that_it_computes(here, change, attack):
    written, plain = rows(
        here / "rows", model=[f"net.py:Net(change={change})", "net.py:Net(change=none)"], attack=attack
    )
    assert plain.records["first_hit"].gt(0).any()
    assert same(written, plain)


def test_an_output_defense_that_writes_into_its_input_moves_no_ball(here):
    written, plain = rows(here / "rows", defense=["mine.py:MovesTheBall", "mine.py:MovesTheBall(inplace=false)"])
    assert same(written, plain)
    assert written.records["norm_linf"].max() <= 0.2 + 1e-6


def test_what_an_attack_does_to_its_surrogate_stays_with_it(here):
    (row,) = rows(here / "rows", attack="mine.py:Surrogate", batch_size=8)
    assert row.records["twin_pred"].equals(row.records["clean_pred"])
    assert not [found["flag"] for found in row.shards[0].findings if found["fired"]]


def test_a_data_defense_cannot_reach_the_baseline(here):
    shown = {"model": "cnn(width=4)", "attack": "standard(epochs=1)"}
    (alone,) = rows(here / "alone", defense="none", **shown)
    corrupted, none = rows(here / "both", defense=["mine.py:Corrupting", "none"], **shown)
    assert corrupted.complete
    assert same(none, alone)
    assert same(corrupted, alone)  # it releases what it was given


def test_who_trains_sees_no_test_images(here):
    (row,) = rows(here / "rows", model="cnn(width=4)", defense="mine.py:Peeking")
    assert "sees 1000, 297, 0 of (1, 8, 8)" in row.errors[0]


@pytest.mark.parametrize(
    "grid",
    [
        {"defense": "mine.py:Nothing"},
        {"model": "cnn(width=4)", "defense": "mine.py:NothingTrained"},
        {"model": "cnn(width=4)", "attack": "mine.py:NothingLearned"},
    ],
)
def test_what_forgets_to_return_a_network_is_told_to(here, grid):
    (row,) = rows(here / "rows", **grid)
    said = row.errors[0].strip()
    assert re.search(r"mine\.py:Nothing\w* #\w+ returned a NoneType; return a torch\.nn\.Module$", said), said


def test_a_learner_that_returns_nan_is_marked(here):
    (row,) = rows(here / "rows", model="cnn(width=4)", attack="mine.py:LearnsNan")
    assert row.complete
    assert row.records["invalid"].all()
    assert "invalid" in marks_of(row)


def test_a_gradient_attack_says_what_is_wrong_with_a_network_that_gives_none(here):
    Path("net.py").write_text(MODEL.replace("    def forward", "    @torch.no_grad()\n    def forward"))
    scores, gradients = rows(here / "rows", attack=["noise", "pgd(steps=2)"])
    assert scores.complete
    assert "gives no gradients" in gradients.errors[0]


def test_a_trained_network_is_its_weights_and_nothing_around_them(here):
    (row,) = rows(here / "rows", model="cnn(width=4)", defense="mine.py:HookedTraining")
    assert "mine.py:HookedTraining" in row.errors[0]
    assert "answers otherwise than its weights" in row.errors[0]
    assert not list((here / "rows" / "networks").glob("*.safetensors"))


def test_changed_images_fail_the_cell_by_name(here):
    tasks = expand(
        load_suite(None, {"dataset": "digits", "model": "net.py:Net", "attack": "noise", "n": 10}), Loader(None, None)
    )
    pipeline = Pipeline(here, torch.device("cpu"), 256)
    with pytest.raises(RefereeError, match=r"net.py:Net .* changed images or labels"), pipeline.serving(tasks[0]):
        tasks[0].data.train.images[0] += 1


def test_neither_side_of_a_served_model_holds_the_others_tensors():
    kept = torch.zeros(3, 2)

    class Lazy(nn.Module):
        def forward(self, x):
            kept.fill_(float(x.sum()))
            x.zero_()
            return kept

    x, streams = torch.ones(3, 1, 2, 2), SampleRng.create(0, torch.arange(3), "test")
    model = ServedModel(Lazy())
    first = model(x, streams)
    second = model(2 * x, streams)
    assert x.eq(1).all()
    assert (first[0, 0], second[0, 0]) == (12, 24)


def test_an_answer_that_is_no_scores_says_what_it_is():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(RefereeError, match=r"Pair answers 3 images with a tuple; expected \(B, K\)"):
        ServedModel(Pair())(torch.ones(3, 1, 2, 2), SampleRng.create(0, torch.arange(3), "test"))


class Uncopied(nn.Module):
    """Gives itself for a copy."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def __deepcopy__(self, memo):
        return self


def test_what_cannot_be_copied_is_built_again_with_its_weights():
    network = Uncopied()
    assert copy.deepcopy(network) is network
    made = own(network, Uncopied)
    assert made is not network
    assert made.linear.weight is not network.linear.weight
    assert made.linear.weight.equal(network.linear.weight)
    with pytest.raises(RefereeError, match="Uncopied can be neither copied nor built again"):
        own(network, lambda: network)


def test_everything_that_decides_an_answer_is_compared():
    def build():
        network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        network.scale, network.table, network.more = 1.0, torch.ones(2), {"a": [1, 2]}
        return network.eval()

    network = build()
    before = contents(network)
    network(torch.rand(5, 4))
    assert changes(before, contents(network)) == []
    network[0].weight.data[0] += 1
    network[1].running_mean.data[0] += 1
    network[1].register_forward_pre_hook(lambda part, given: None)
    network.scale, network.more["a"][0] = 2.0, 3
    network.table[0] = 0
    network.add_module("2", nn.ReLU())
    found = set(changes(before, contents(network)))
    assert found >= {
        "0.weight", "1._forward_pre_hooks", "1.running_mean", "2", "more", "scale", "table", "ReLU.forward"
    }  # fmt: skip
    assert not any(name.startswith(("0.bias", "1.running_var", "Linear", "Module")) for name in found)


def test_a_release_outside_its_ball_fails_its_cells(here):
    stronger = DEFENSES.replace('"linf", 1.0', '"linf", 2 / 255').replace(
        "data.train.images.clone()", "255 - data.train.images"
    )
    Path("stronger.py").write_text(stronger)
    shown = {"model": "cnn(width=4)", "defense": "stronger.py:Corrupting"}
    learnt, attacked = rows(here / "rows", attack=["standard(epochs=1)", "square"], **shown)
    for row in (learnt, attacked):
        assert "released 1,000 of 1,000 images outside its linf ball of 0.007843, up to 1 away" in row.errors[0]
    assert not list((here / "rows" / "networks").glob("*.safetensors"))
