"""What a run would cost, before it runs."""

import torch

from bench.results.store import Store
from bench.run import estimate as module
from tests.test_grid import plan


def test_a_network_is_timed_once_whatever_has_trained_it(tmp_path, monkeypatch):
    """Weights do not matter for speed: nine trainings of a large network were nine times the wait."""
    timed = []
    monkeypatch.setattr(module, "_seconds_per_query", lambda task, device, batch: timed.append(task) or 0.5)
    tasks = plan(defense=["none", "pgd-at", "fast-at", "ops + pgd-at", "aaa-linear", "pgd-at + aaa-linear"], queries=10)
    plans = module.estimate(tasks, Store(tmp_path), torch.device("cpu"), 32)
    assert [task.cell.defense_name for task in timed] == ["none", "aaa-linear"]
    assert {each.seconds for each in plans} == {20 * 10 * 0.5}
