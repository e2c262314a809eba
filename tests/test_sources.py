"""Transfer between named models: what the key knows of them, who they are, and what they are never told."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.mi_fgsm import MIFGSM
from attacks.pgd import PGD
from attacks.transfer import Transfer
from bench.errors import ConfigError
from bench.measure.attacked import attack_served
from bench.oracle import NEVER
from bench.oracle.served import ServedModel, Target
from bench.oracle.surrogate import Surrogate
from bench.plan.cell import Cell
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, expand
from bench.registry import attacks, describe
from tests.problems import Linear, attack_with, images, referee

LOADER = Loader(None, None)


def planned(attack, model="cnn(width=4)", **settings):
    suite = {"dataset": "digits", "n": 20, "eps": 0.15, "queries": 5, "seed": [0], "defense": ["none"]}
    (task,) = expand(load_suite(None, {**suite, "model": [model], "attack": [attack], **settings}), LOADER)
    return task


def test_a_named_source_makes_another_cell_that_is_no_control():
    plain, named = planned("transfer"), planned("transfer(from=cnn(width=8))")
    assert plain.cell.attack.control
    assert not named.cell.attack.control
    assert plain.cell.key != named.cell.key
    assert "sources" not in plain.cell._keyed
    for cell in (plain.cell, named.cell):
        assert Cell.from_json(cell.as_json()) == cell


def test_a_control_stays_one_whatever_its_row_says():
    lie = replace(planned("transfer").cell, attack=replace(planned("transfer").cell.attack, control=False))
    assert Cell.from_json(lie.as_json()).attack.control


def test_spellings_of_one_source_are_one_cell_and_weights_make_another():
    one = planned("transfer(from=cnn(width=8), attack=apgd(steps=5, loss=ce))").cell
    same = planned("transfer(attack='apgd(steps=5)', from='cnn( width=8.0 )')").cell
    assert one.key == same.key
    assert one.attack.spec == same.attack.spec
    other = replace(one, sources=(replace(one.sources[0], weights_hash="another"),))
    assert other.key != one.key
    newer = replace(one, replays=replace(one.replays, version=99))
    assert newer.key != one.key


def test_a_source_is_trained_from_another_seed_so_it_is_never_the_attacked_network():
    task = planned("mi-fgsm(from=cnn(width=4) + cnn(width=8))")
    assert [source.cell.model for source in task.sources] == [source.model for source in task.cell.sources]
    assert [source.cell.seed for source in task.sources] == [1, 1]
    assert task.sources[0].cell.defense == ()


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ("transfer(from=cnn(width=8) + cnn(width=8))", "names one source twice"),
        ("transfer(from=nothing)", "no model is named 'nothing'"),
        ("transfer(attack=square)", "asks for scores, and examples are made by gradients; name one that"),
        ("transfer(attack=mi-fgsm)", r"asks for labels, .*; write mi-fgsm\(from=...\)"),
        ("transfer(attack=apgd, steps=5)", "steps and rel_step are those of its own PGD"),
        ("transfer(attack=apgd(stepz=5))", "did you mean 'steps'"),
    ],
)
def test_mistakes_are_told_before_anything_runs(attack, said):
    with pytest.raises(ConfigError, match=said):
        planned(attack)


def test_the_attacked_network_is_no_source(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef net():\n"
        "    torch.manual_seed(0)\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    model = f"{tmp_path / 'mine.py'}:net"
    with pytest.raises(ConfigError, match="is the attacked network itself; name another, or leave from= out"):
        planned(f"transfer(from={model})", model)
    cell = planned(f"transfer(from={model})", "cnn(width=4)").cell
    assert cell.sources[0].model.spec == "mine.py:net"
    assert cell.attack.params["from"] == "mine.py:net"  # wherever it lies


def test_parameters_named_as_words_of_python_are_written_without_underscore():
    made = attacks.create("transfer(from=resnet20)")
    assert made.sources == ("resnet20",)
    assert describe(made)["from"] == "resnet20"
    assert "from" not in describe(attacks.create("transfer"))
    with pytest.raises(ConfigError, match="no parameter 'from_'"):
        attacks.create("transfer(from_=resnet20)")


class Counted(nn.Module):
    """Notes whether anybody could have differentiated it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, x):
        assert not x.requires_grad, "the target was differentiated"
        self.asked += len(x)
        return self.model(x)


@pytest.mark.parametrize(
    ("attack", "forwards", "backwards"),
    [
        (Transfer(from_="a", attack="pgd(steps=7)"), 8, 7),
        (Transfer(from_="a", steps=7, rel_step=0.5), 8, 7),
        (Transfer(from_="a", attack="fgsm"), 2, 1),
        (Transfer(from_="a", attack="apgd(steps=7)"), 8, 7),
        (MIFGSM(from_="a", steps=7), 7, 7),
    ],
)
def test_examples_are_the_source_s_and_the_target_tells_a_label(attack, forwards, backwards):
    """On linear models: the corner that the source likes least, whatever the target thinks."""
    x, y = images(8, (1, 6, 6)), torch.zeros(8, dtype=torch.int64)
    source, target = Linear((1, 6, 6), seed=1), Counted(Linear((1, 6, 6), seed=2))
    surrogate = Surrogate([source])
    oracle = referee(
        target, x, y, eps=0.02, access="labels", rules=attack.rules, surrogate=ServedModel(surrogate), classes=2
    )
    final = attack_with(attack, oracle, x, y)
    corner = x - 0.02 * (source.weight[0] - source.weight[1]).sign().view(1, 6, 6)
    torch.testing.assert_close(final, corner, rtol=0, atol=1e-9)
    assert target.asked == 8
    assert oracle.ledger.forwards.tolist() == [1] * 8
    assert oracle.ledger.backwards.tolist() == [0] * 8
    assert (surrogate.forwards, surrogate.backwards) == (8 * forwards, 8 * backwards)
    right = source(x).argmax(1) == y
    assert right.any()
    assert not right.all()  # those that the source gets wrong are pushed on all the same


def test_several_sources_answer_with_their_mean_and_each_counts():
    x = images(3, (1, 6, 6)).requires_grad_(True)
    one, two = Linear((1, 6, 6), seed=1), Linear((1, 6, 6), seed=2)
    both = Surrogate([one, two])
    logits = both(x)
    torch.testing.assert_close(logits, (one(x) + two(x)) / 2)
    logits.sum().backward()
    assert (both.forwards, both.backwards) == (6, 6)
    both.networks[1](x[:2]).sum().backward()
    assert (both.forwards, both.backwards) == (8, 8)


def test_a_shard_measures_the_named_network_and_says_what_it_cost():
    """Three networks: attacked, undefended twin and source; examples must be the source's."""
    task = planned("transfer(from=cnn(width=8), steps=5)")
    torch.manual_seed(0)
    flat = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval().requires_grad_(False) for _ in range(3)]
    served, twin, source = (ServedModel(network) for network in flat)
    target = Target(served, served, twin, twin, (source,))
    table = attack_served(task, target, list(task.cell.ids), torch.device("cpu"))
    attacked = table["first_hit"] != 0
    assert attacked.any()
    assert set(table["surrogate_forwards"][attacked]) == {6.0}
    assert set(table["surrogate_backwards"][attacked]) == {5.0}
    assert (table["forwards"][attacked] == 1).all()
    assert (table["rmse"][attacked] > 0.05).all()
    x, y = task.data.test.pixels(list(task.cell.ids)), task.data.test.labels[list(task.cell.ids)]
    alone = referee(flat[2], x, y, eps=0.15, access="gradients", budget=6, falls=False)
    final = attack_with(PGD(steps=5, rel_step=0.1, loss="margin", schedule="constant"), alone, x, y)
    assert (alone.ledger.first_hit == NEVER).all()
    assert flat[2](final).argmax(1).ne(y).sum() >= flat[2](x).argmax(1).ne(y).sum()
