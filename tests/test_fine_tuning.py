"""Fine-tuning: whose weights it starts from, what it leaves alone, and what makes another cell of it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from attacks.learners.fine_tuning import FineTuning
from bench.data.digits import Digits
from bench.errors import BenchError, ConfigError, RefereeError
from bench.measure.learned import learn_released
from bench.measure.pipeline import Pipeline
from bench.models import resolve
from bench.models.pretrained import Pretrained, head_of
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, expand
from bench.protocols import Job
from bench.run.timing import seconds_of_training

CNN = "cnn(width=4)"


def network(classes=10):
    """Two layers for digits, with initial weights from the global generator."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


def source(classes=10) -> Pretrained:
    torch.manual_seed(5)
    return Pretrained("it", network(classes).state_dict(), frozenset({"4.weight", "4.bias"}))


def few():
    data = Digits()(None)
    return data.released(data.train.subset(slice(64)))


@pytest.fixture
def zoo(tmp_path):
    """ResNet-20 weights for 1x8x8 images of 10 and of 3 classes."""
    torch.manual_seed(0)
    for classes in (10, 3):
        save_file(resolve("resnet20")(classes, (1, 8, 8), None).state_dict(), tmp_path / f"{classes}.safetensors")
    return tmp_path


def planned(folder, attack, model="resnet20", defense="none"):
    suite = {"dataset": "digits", "n": 20, "model": [model], "attack": [attack], "defense": [defense], "seed": [0]}
    (task,) = expand(load_suite(None, suite), Loader(None, folder))
    return task


def test_a_step_of_no_size_leaves_the_source():
    """With a learning rate near zero, what comes back is the source, head and all."""
    given = source()
    learnt = FineTuning(from_="it", epochs=1, lr=1e-12)(network, few(), Job(pretrained=given))
    for name, value in learnt.named_parameters():
        torch.testing.assert_close(value.detach(), given.weights[name], rtol=0, atol=1e-9)


def test_the_head_is_new_where_the_source_has_other_classes():
    given = source(classes=3)
    learnt = FineTuning(from_="it", classes=3, epochs=1, lr=1e-12)(network, few(), Job(pretrained=given))
    torch.manual_seed(0)
    fresh = network()
    for name, value in learnt.named_parameters():
        expected = fresh.get_parameter(name).detach() if name in given.head else given.weights[name]
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-9)


def test_the_head_alone_leaves_every_other_weight_and_statistic():
    given = source(classes=3)
    learnt = FineTuning(from_="it", classes=3, layers="head", epochs=2)(network, few(), Job(pretrained=given))
    for name, value in learnt.state_dict().items():
        assert torch.equal(value, given.weights[name]) == (name not in given.head), name
    assert all(parameter.requires_grad for parameter in learnt.parameters())


def test_its_rate_is_a_tenth_unless_said():
    data = few()
    usual = FineTuning(from_="it", layers="head").recipe_for(data).lr
    assert FineTuning(from_="it").recipe_for(data).lr == pytest.approx(usual / 10)
    assert FineTuning(from_="it", lr=0.5).recipe_for(data).lr == 0.5


@pytest.mark.parametrize(
    ("model", "head"),
    [
        ("cnn(width=4)", {"linear.weight", "linear.bias"}),
        ("resnet20", {"linear.weight", "linear.bias"}),
        ("preact-resnet18", {"linear.weight", "linear.bias"}),
    ],
)
def test_the_head_is_what_depends_on_the_classes(model, head):
    found = head_of(lambda classes: resolve(model)(classes, (3, 32, 32), None), 10)
    assert found == head


def test_several_heads_are_all_heads():
    found = head_of(lambda classes: resolve("resnet20(heads=3)")(classes, (1, 8, 8), None), 10)
    assert len(found) == 6


def test_the_weights_of_the_source_are_in_the_key_and_its_place_is_not(zoo, tmp_path_factory):
    one = planned(zoo, "fine-tuning(from=resnet20(weights=10.safetensors))")
    assert one.cell.sources[0].weights_hash
    assert one.cell.attack.params["from"] == "resnet20(weights=10.safetensors)"
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "10.safetensors"
    elsewhere.write_bytes((zoo / "10.safetensors").read_bytes())
    assert planned(zoo, f"fine-tuning(from=resnet20(weights={elsewhere}))").cell.key == one.cell.key
    save_file({name: value + 1 for name, value in one.pretrained().weights.items()}, zoo / "10.safetensors")
    assert planned(zoo, "fine-tuning(from=resnet20(weights=10.safetensors))").cell.key != one.cell.key


def test_three_classes_make_a_head_for_ten(zoo):
    task = planned(zoo, "fine-tuning(from=resnet20(weights=3.safetensors), classes=3)")
    (owner,) = task.sources
    assert owner.build()(torch.rand(1, 1, 8, 8)).shape == (1, 3)
    assert task.pretrained().weights["linear.weight"].shape == (3, 64)


@pytest.mark.parametrize(
    ("attack", "model", "said"),
    [
        ("fine-tuning", "resnet20", r"needs from; write fine-tuning\(from=...\)"),
        ("fine-tuning(from=resnet20)", "resnet20", r"has no weights to start from; .* resnet20\(weights=FILE\)"),
        ("fine-tuning(from=resnet20 + cnn)", "resnet20", "from names 2 models; a training starts from one"),
        ("fine-tuning(from=resnet20(weights=3.safetensors))", "resnet20", "or say with classes=100"),
        ("fine-tuning(from=resnet20(weights=10.safetensors))", CNN, "does not fit SmallCnn"),
        ("fine-tuning(from=resnet20(weights=none.safetensors))", "resnet20", "no weights at"),
    ],
)
def test_mistakes_are_told_before_anything_runs(zoo, attack, model, said):
    with pytest.raises(BenchError, match=said):
        planned(zoo, attack, model)


def test_without_a_source_it_says_so():
    with pytest.raises(ConfigError, match=r"at job\.pretrained"):
        FineTuning(from_="it")(network, few(), Job())


def test_a_cell_is_measured_from_its_source_and_its_release_knows_nothing_of_it(zoo, tmp_path):
    """A head on a trained body learns digits; a learner who is given other weights than planned is refused."""
    save_file(resolve("resnet20")(10, (1, 8, 8), None).state_dict(), zoo / "10.safetensors")
    task = planned(zoo, "fine-tuning(from=resnet20(weights=10.safetensors), layers=head, epochs=1)", defense="ops")
    task = replace(task, data=few(), cell=replace(task.cell, data_hash=few().fingerprint))
    pipeline = Pipeline(tmp_path / "networks", torch.device("cpu"), 64)
    seen = []

    def protect(data, job):
        seen.append(job.pretrained)
        return data.train

    blind = replace(task, chain=replace(task.chain, data=Stand(protect)))
    released = pipeline.released(blind, lambda done, total: None)
    assert seen == [None]
    with pipeline.learning(task, lambda done, total: None) as job:
        assert job.pretrained.name == "resnet20(weights=10.safetensors)"
        measured = learn_released(task, released, list(task.cell.ids), job, task.build)
    assert len(measured.records) == 20
    assert seconds_of_training(task, torch.device("cpu")) > 0
    torch.manual_seed(9)
    save_file(resolve("resnet20")(10, (1, 8, 8), None).state_dict(), zoo / "10.safetensors")
    with pytest.raises(RefereeError, match="gives other weights at each call"):
        task.pretrained()


class Stand:
    """A data defense that does what it is told."""

    stage, norm, eps, version, paper = "data", "l0", 64.0, 1, ""

    def __init__(self, protect):
        self.protect = protect

    def __call__(self, data, job):
        return self.protect(data, job)
