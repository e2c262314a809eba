"""Every component once on a GPU, beside the CPU; the pretended device of test_device.py needs none."""

import pytest
import torch
from torch import nn

from bench.check.attack import fitted
from bench.check.problem import CLASSES, pretrained, to_train
from bench.measure.fitting import around
from bench.norms import lp_norm
from bench.oracle.served import ServedModel
from bench.protocols import Job
from bench.registry import attacks, defenses
from bench.rng import SampleRng
from bench.threat import Threat
from bench.training import Recipe
from tests.problems import asks_for, attack_with, referee
from tests.registered import BUDGET, BY_STAGE, LEARNERS, QUERYING, build, learned, network, radius, small
from tests.test_device import few

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU, or torch cannot use it"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")

# Sums of up to 400 float32 terms, in another order, through three layers; each term is off by at most half a last bit.
SUMS = 3 * 400 * 2**-24


def attacked(name: str, norm: str, device: torch.device) -> torch.Tensor:
    attack = attacks.create(name)
    x = torch.rand(12, 3, 15, 15, generator=torch.Generator().manual_seed(1)).double()
    model = network().double()
    y = model(x).argmax(1)
    model, x, y, ids = model.to(device), x.to(device), y.to(device), torch.arange(12, device=device)
    known = fitted(attack, Threat(norm, radius(norm), attack.access, BUDGET), device=device)
    oracle = referee(model, x, y, norm=norm, eps=radius(norm), budget=BUDGET, ids=ids, fitted=known, classes=CLASSES,
                     **asks_for(attack, model))  # fmt: skip
    x_adv = attack_with(attack, oracle, x, y, ids=ids)
    assert x_adv.is_cuda == (device.type == "cuda")
    assert (lp_norm(x_adv - x, norm) <= radius(norm) + 1e-6).all()
    return oracle.ledger.first_hit.cpu()


@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name, norm in QUERYING if ":" not in name])
def test_an_attack_falls_the_same_samples(name, norm):
    """In float64 no rounding of the network decides; normal draws differ by some last bits of float32, which can turn
    a comparison of two nearly equal margins, and so the way of a sample: of one in twelve, at most."""
    there, here = attacked(name, norm, GPU), attacked(name, norm, CPU)
    assert (there != here).sum() <= 1


@pytest.mark.parametrize("name", BY_STAGE["output"])
def test_an_output_defense_answers_alike(name):
    data, defense, answers = few(), defenses.create(name), []
    known = learned(defense, data)
    for device in (CPU, GPU):
        torch.manual_seed(0)
        model = build().eval().to(device)
        module = around(defense, model, data.calibration.to(device), 0, known, "it")
        served = ServedModel(module, defense.random)
        rng = SampleRng.create(0, torch.arange(60, device=device), "defense")
        with torch.no_grad():
            answers.append(served(data.test.pixels().to(device), rng).cpu())
    here, there = answers
    near = (there - here).abs().amax(dim=1) <= 10 * SUMS * (here.amax() - here.amin())
    assert near.float().mean() >= 0.95  # one in twenty may lie at a step of its defense: a border, a rounding, a sign


@pytest.mark.parametrize(
    ("registry", "name"), [(attacks, name) for name in LEARNERS] + [(defenses, name) for name in BY_STAGE["training"]]
)
def test_training_goes_the_same_way(registry, name):
    """Adam moves a weight by its rate at a step, whatever the size of the gradient, whose sign rounding may turn."""
    component = small(name, registry)
    make, data = to_train(component, few())
    trained = [component(make, data, Job(device=device, pretrained=pretrained())) for device in (CPU, GPU)]
    here, there = (nn.utils.parameters_to_vector(model.parameters()).cpu() for model in trained)
    steps = -(-len(data.train) // Recipe.for_dataset(data).batch_size)
    assert next(trained[1].parameters()).is_cuda
    assert (there - here).abs().max() <= 2 * steps * Recipe.for_dataset(data).lr * 1.01


@pytest.mark.parametrize("name", BY_STAGE["data"])
def test_a_data_defense_releases_what_it_may(name):
    data, defense = few(), small(name, defenses, checkpoints=1, steps=2, rounds=1, draws=1, adv_steps=1)
    released = defense(data, Job(device=GPU))
    change = released.images.cpu().double() - data.train.images.double()
    size = lp_norm(change / (1 if defense.norm == "l0" else 255), defense.norm)
    assert 0 < size.max() <= defense.eps + 1e-9
