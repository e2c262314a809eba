"""FMN: distances that are known, and the curve over radii from one run."""

import pytest
import torch

from attacks.fmn import FMN
from bench.errors import ConfigError
from bench.oracle import NEVER
from tests.problems import asks_for, attack_with, curved, images, linear_problem, referee


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_distance_to_the_boundary_of_a_linear_model_is_found(norm):
    model, x, y, distances = linear_problem(norm=norm)
    attack = FMN(steps=200)
    oracle = referee(model, x, y, norm=norm, eps=0.0, budget=200, **asks_for(attack, model))
    attack_with(attack, oracle, x, y)
    assert torch.allclose(oracle.ledger.best_distance, distances, rtol=0.03)
    assert (oracle.ledger.best_distance >= distances).all()
    assert oracle.ledger.forwards.tolist() == oracle.ledger.backwards.tolist() == [200] * 4


def test_one_run_gives_accuracy_at_every_radius():
    """Whoever falls within a radius does so in the run that was asked for that radius, too."""
    model, x = curved(), images(12, (1, 5, 5))
    y = model(x).argmax(1)
    attack = FMN(steps=40)

    def run(eps):
        oracle = referee(model, x, y, eps=eps, budget=100, **asks_for(attack, model))
        attack_with(attack, oracle, x, y)
        return oracle.ledger

    distance = run(0.0).best_distance
    eps = distance.median().item()
    ledger = run(eps)
    assert torch.equal(ledger.first_hit != NEVER, distance <= eps)


def test_impossible_parameters_are_refused():
    with pytest.raises(ConfigError, match="they are shares"):
        FMN(shrink=0.01, least_shrink=0.1)
