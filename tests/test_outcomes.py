"""Every figure of a row, against the networks that it was measured on."""

import math

import pytest
import torch

from bench.measure.pipeline import Pipeline
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, expand
from bench.report.figures import figures
from bench.report.outcomes import final, robust
from bench.results.store import Store
from bench.rng import SampleRng
from bench.run.runner import run
from tests.test_runner import Silent

DEFENSES = ["none", "temperature(temperature=4)", "output-noise(sigma=2)"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory, trained):
    """The rows of three defenses by name, their tasks, and what built them."""
    folder = tmp_path_factory.mktemp("outcomes")
    settings = {"dataset": "digits", "model": ["cnn(width=8)"], "n": 120, "eps": 0.15, "queries": 40}
    tasks = expand(load_suite(None, {**settings, "defense": DEFENSES, "attack": ["square"]}), Loader(None, None))
    store, pipeline = Store(folder).open(), Pipeline(trained, torch.device("cpu"), 256)
    run(tasks, store, pipeline, 50, 256, Silent())
    return {task.cell.defense_name: (store.row(task.cell), task) for task in tasks}, pipeline


def logits_of(measured, name):
    rows, pipeline = measured
    _, task = rows[name]
    ids = torch.tensor(task.cell.ids)
    pipeline.train(task, lambda done, total: None)
    model = pipeline.served(task, "plain")
    with torch.no_grad():
        return model(task.data.test.pixels(ids), SampleRng.create(0, ids, "defense")), task.data.test.labels[ids]


def test_an_undefended_model_changes_nothing(measured):
    row, _ = measured[0]["none"]
    found = figures(row)
    assert found["changed_predictions"] == found["logit_change"] == found["probability_change"] == 0
    assert 0.2 < found["cost"] < 5  # one network against itself


def test_what_a_temperature_does_is_what_a_division_by_it_does(measured):
    found = figures(measured[0]["temperature(temperature=4)"][0])
    logits, y = logits_of(measured, "none")
    colder, warmer = logits.softmax(1), (logits / 4).softmax(1)
    assert found["changed_predictions"] == 0
    assert found["logit_change"] == pytest.approx((logits * 3 / 4).norm(dim=1).mean().item(), rel=1e-4)
    assert found["probability_change"] == pytest.approx(((warmer - colder).abs().sum(1) / 2).mean().item(), rel=1e-4)
    assert found["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits / 4, y).item(), rel=1e-4)
    true = torch.nn.functional.one_hot(y, 10)
    assert found["brier"] == pytest.approx((warmer - true).square().sum(1).mean().item(), rel=1e-4)


def test_scores_are_judged_before_and_after_the_attack(measured):
    found = figures(measured[0]["none"][0])
    assert found["attacked_nll"] > found["nll"]
    assert found["attacked_brier"] > found["brier"]
    assert found["attacked_ece"] > found["ece"]


def test_a_random_defense_is_judged_by_all_of_its_votes(measured):
    row, _ = measured[0]["output-noise(sigma=2)"]
    found = figures(row)
    assert final(row).value > found["expected_accuracy"] - 1e-9 or final(row).value > robust(row, 40).value
    assert 0 < found["expected_accuracy"] < 1
    assert found["logit_change"] == pytest.approx(2 * math.sqrt(10 / 16), rel=0.1)  # noise averaged over 16 votes


def test_final_changes_have_the_size_of_the_ball(measured):
    found = figures(measured[0]["none"][0])
    assert 0 < found["rmse"] <= found["linf"] <= 0.15 + 1e-6
    assert found["linf"] == pytest.approx(0.15, abs=0.01)
