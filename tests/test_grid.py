"""From a suite to cells: what is one cell, what is none, and what its key depends on."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.dataset import Dataset
from bench.errors import BenchError
from bench.plan.cell import Cell, Component, Source
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, Task, expand, sample_ids
from bench.registry import load_plugins
from bench.threat import Threat
from bench.tracks import track_of

load_plugins()

LOADER = Loader(None, None)  # keeps digits and the networks between tests

TRAINED = """
import torch
def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""


def plan(limit: int | None = None, **grid: Any) -> list[Task]:
    keys = {"dataset": "digits", "model": "cnn", "attack": "square", "n": 20, **grid}
    return expand(load_suite(None, keys), LOADER, limit)


def refusal(**grid: Any) -> str:
    with pytest.raises(BenchError) as caught:
        plan(**grid)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return LOADER.dataset("digits")[1]


@pytest.fixture
def trained(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(TRAINED)
    return f"{tmp_path / 'net.py'}:linear"


def test_a_grid_is_a_product_in_the_order_it_is_written():
    tasks = plan(defense=["none", "pgd-at + aaa-linear"], attack=["square", "pgd"], seed=[0, 1])
    assert [str(task.cell) for task in tasks] == [
        f"digits | cnn | {defense} | {attack} | seed {seed}"
        for defense in ("none", "pgd-at + aaa-linear")
        for attack in ("square", "pgd")
        for seed in (0, 1)
    ]


def test_the_threat_takes_its_access_from_the_attack():
    square, pgd, standard = plan(attack=["square", "pgd", "standard"], eps="4/255", queries=7)
    assert square.cell.threat == Threat("linf", 4 / 255, "scores", 7)
    assert pgd.cell.threat == Threat("linf", 4 / 255, "gradients", 7)
    assert standard.cell.threat == Threat("linf", 0.0, "training-data")
    assert [track_of(task.cell).name for task in (square, pgd, standard)] == ["query", "white-box", "data"]


def test_a_learner_meets_the_threat_that_the_data_defense_allows_itself():
    (task,) = plan(attack="standard", defense="ops(pixels=2)")
    assert task.cell.threat == Threat("l0", 2.0, "training-data")


def test_equal_cells_come_once():
    assert len(plan(attack=["square", "square()", "  square"])) == 1
    assert len(plan(attack=["square", "pgd"], model=["cnn", "cnn"])) == 2


def test_defenses_act_in_the_order_of_their_stages_however_they_are_written():
    one, other = plan(defense="pgd-at + rnd"), plan(defense="rnd + pgd-at")
    assert one[0].cell.key == other[0].cell.key
    assert [part.stage for part in one[0].cell.defense] == ["training", "output"]
    assert one[0].cell.defense_name == "pgd-at + rnd"


@pytest.mark.parametrize(
    ("grid", "complaint"),
    [
        ({"defense": "aaa-linear + rnd"}, "aaa-linear and rnd both act at the output stage"),
        ({"defense": "rnd + rnd"}, "both act at the output stage"),
        ({"attack": "standard", "defense": "rnd"}, "rnd has no say; use data defenses or none"),
        ({"attack": "standard", "defense": "pgd-at"}, "pgd-at has no say"),
        ({"attack": "simba", "norm": "l1"}, "works in l2, linf, not in l1"),
        ({"n": 501}, "n is 501, but digits has 500 test images; lower n"),
        ({"eps": 8}, "write 8/255 for levels"),
        ({"attack": "sqare"}, "did you mean 'square'?"),
        ({"defense": "rnd(sigm=1)"}, "did you mean 'sigma'?"),
        ({"model": "ccn"}, "did you mean 'cnn'?"),
        ({"dataset": "digit"}, "did you mean 'digits'?"),
        ({"dataset": "cifar10"}, "--data-dir"),
    ],
)
def test_an_impossible_cell_is_refused_before_anything_runs(grid, complaint):
    message = refusal(**grid)
    assert complaint in message
    assert " | " in message, "the message says which cell"


@pytest.mark.parametrize("grid", [{"defense": "pgd-at"}, {"defense": "ops"}, {"attack": "standard"}])
def test_a_network_with_weights_is_not_trained_again(grid, trained):
    assert "comes with its weights; name an untrained model" in refusal(model=trained, **grid)
    assert not plan(model=trained, defense="rnd")[0].trains


def test_a_network_of_another_shape_is_refused(tmp_path):
    (tmp_path / "net.py").write_text(TRAINED.replace("10", "7"))
    assert "expected logits (2, 10)" in refusal(model=f"{tmp_path / 'net.py'}:linear")
    (tmp_path / "net.py").write_text(TRAINED.replace("64", "65"))
    assert "fails on images (1, 8, 8)" in refusal(model=f"{tmp_path / 'net.py'}:linear")


@pytest.mark.parametrize("ends", ["sys.exit(0)", "{}['no such key']", "1 / 0"])
@pytest.mark.parametrize("name", ["Answers", "takes", "Source"])
def test_a_file_that_ends_where_cells_are_made_is_refused_by_name(tmp_path, name, ends):
    file = tmp_path / "quits.py"
    file.write_text(
        "import sys\nfrom torch import nn\n"
        f"class Answers(nn.Module):\n    def forward(self, x): {ends}\n"
        f"class Source:\n    def __call__(self, data_dir): {ends}\n"
        f"def takes(classes, shape, model_dir): {ends}\n"
    )
    assert "quits.py" in refusal(**{"dataset" if name == "Source" else "model": f"{file}:{name}"})


def test_what_a_file_does_to_the_process_on_import_reaches_no_cell(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n"
        "torch.set_num_threads(torch.get_num_threads() + 1)\n"
        "class Same:\n    stage, random, version, paper = 'output', False, 1, ''\n"
        "    def __call__(self, model, calibration, seed): return model\n"
    )
    threads = torch.get_num_threads()
    plan(defense=f"{file}:Same")
    assert (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()) == (
        torch.float32, True, threads
    )  # fmt: skip


def test_samples_are_ascending_and_nested(digits):
    ids = {n: sample_ids(digits, n) for n in (1, 10, 100, 500)}
    for n, chosen in ids.items():
        assert list(chosen) == sorted(set(chosen))
        assert len(chosen) == n
    assert set(ids[1]) < set(ids[10]) < set(ids[100]) < set(ids[500]) == set(range(500))
    assert ids[10] != tuple(range(10)), "the order of the file decides nothing"


def test_samples_come_from_everywhere_in_the_file(digits):
    chosen = torch.tensor(sample_ids(digits, 100)).float()
    # The mean of 100 of 500 without replacement; three standard errors.
    assert abs(chosen.mean() - 249.5) < 3 * (500 / 12**0.5) / 100**0.5 * 0.8**0.5


def test_a_limit_marks_the_cells_that_lose_samples_and_leaves_their_key():
    (full,), (cut,), (same,) = plan(n=10), plan(n=20, limit=10), plan(n=10, limit=30)
    assert (full.cell.limited, cut.cell.limited, same.cell.limited) == (False, True, False)
    assert cut.cell.ids == full.cell.ids
    assert cut.cell.key == full.cell.key == same.cell.key


def test_every_field_but_limited_is_in_the_key():
    (task,) = plan(defense="pgd-at + rnd")
    cell = task.cell
    changes: dict[str, Any] = {
        "dataset": replace(cell.dataset, version=2),
        "model": replace(cell.model, params={"width": 33}),
        "defense": cell.defense[:1],
        "attack": replace(cell.attack, spec="pgd"),
        "threat": replace(cell.threat, query_budget=999),
        "ids": cell.ids[1:],
        "seed": 1,
        "numerics": "plain",
        "quantise": True,
        "data_hash": "other",
        "weights_hash": "other",
        "sources": (Source(cell.model),),
        "replays": cell.attack,
    }
    assert set(changes) == set(asdict(cell)) - {"limited"}
    keys = {replace(cell, **{name: value}).key for name, value in changes.items()}
    assert len(keys | {cell.key}) == len(changes) + 1
    assert replace(cell, limited=True).key == cell.key


def test_arguments_decide_the_key_and_spelled_out_defaults_are_seen_in_it():
    keys = [plan(attack=attack)[0].cell.key for attack in ("pgd", "pgd(steps=41)", "pgd(restarts=2)")]
    assert len(set(keys)) == 3


def test_a_cell_comes_back_from_its_file():
    for defense in ("none", "ops + pgd-at(eps=0.1) + rnd"):
        (task,) = plan(defense=defense)
        back = Cell.from_json(task.cell.as_json())
        assert back == task.cell
        assert back.key == task.cell.key


def test_traits_that_tables_mark_are_pinned():
    (task,) = plan(defense="rnd", attack="square(preset=eccv2020)")
    assert task.cell.attack.traits == ("rescaled",)
    assert task.cell.defense[0].traits == ("random",)
    assert isinstance(task.cell.model, Component)


def test_an_edited_user_file_is_another_cell(tmp_path, trained):
    before = plan(model=trained)[0].cell
    Path(trained.partition(":")[0]).write_text(TRAINED.replace("seed(0)", "seed(1)"))
    fresh = expand(
        load_suite(None, {"dataset": "digits", "model": trained, "attack": "square", "n": 20}), Loader(None, None)
    )
    assert fresh[0].cell.key != before.key
    assert fresh[0].cell.weights_hash != before.weights_hash


def test_tables_tell_versions_of_a_users_code_apart():
    cell = plan()[0].cell
    evil = Component("evil.py:Defense(a=1)", "3+ab12cd345678")
    assert evil.label == "evil.py:Defense(a=1) #ab12cd"
    assert replace(cell, defense=(Component("pgd-at"), evil)).defense_label == f"pgd-at + {evil.label}"
    assert replace(cell, defense=()).defense_label == "none"
    assert Component("square", 2).label == "square"


def test_a_defense_at_no_stage_is_refused_and_never_left_out(tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    stage = 'otput'\n    def __call__(self): ...\n")
    assert "declares stage = 'otput'; write stage = " in refusal(defense=f"{tmp_path / 'mine.py'}:Mine")
