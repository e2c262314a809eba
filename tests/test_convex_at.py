"""Convex adversarial training: the worst loss it computes is the network's at every corner, and as low as it gets."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from bench.ascent import pgd
from bench.data.digits import Digits
from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.models.two_layer import TwoLayer
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, expand
from bench.protocols import Job
from bench.rng import SampleRng
from bench.threat import Threat
from defenses.convex_at import ConvexAdversarialTraining, Program, deepest_direction, draw, write

BETA = 1e-3


def problem(count=14, size=4, seed=1) -> tuple[Tensor, Tensor]:
    """Pixels (N, size) in [0.1, 1] and a class that no line tells."""
    x = 0.1 + 0.9 * torch.rand(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, 2.0 * ((x[:, 0] > x[:, 1]) ^ (x[:, 2] > x[:, 3])) - 1


def program(eps, count=14, size=4, patterns=12) -> Program:
    x, y = problem(count, size)
    return Program.of(x, y, eps, BETA, draw(x, eps, patterns, 0))


def answers(network, x: Tensor) -> Tensor:
    """The second logit less the first."""
    first, second = network.double()(x[:, None, None]).unbind(1)
    return (second - first).detach()


@pytest.mark.parametrize("eps", [0.0, 0.02, 0.05])
def test_the_loss_that_is_computed_is_the_networks_at_its_worst_corner(eps):
    made = program(eps)
    v, w = made.solve(60, 0.3, Job())
    assert float(made.outside(v).max()) < 1e-12
    assert float(made.outside(w).max()) < 1e-12
    network = TwoLayer(width=2 * len(made.on))(2, (1, 1, 4), None).double()
    write(network, v, w)
    corners = torch.tensor(list(itertools.product([-eps, eps], repeat=4)), dtype=torch.float64)
    loss = [(1 - made.y * answers(network, made.x + corner)).clamp(min=0) for corner in corners]
    torch.testing.assert_close(torch.stack(loss).amax(dim=0), made.losses(v - w), rtol=0, atol=1e-6)
    inner = [(1 - made.y * answers(network, made.x + corner / 2)).clamp(min=0) for corner in corners]
    assert (torch.stack(inner).amax(dim=0) <= made.losses(v - w) + 1e-6).all()
    weights = torch.cat([v, w])
    cost = network.hidden.weight.square().sum() / 2 + 2 * network.linear.weight[0].square().sum()
    torch.testing.assert_close(cost, torch.linalg.vector_norm(weights, dim=1).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.03, 0.0])
def test_the_descent_comes_as_low_as_a_solver_of_constrained_programs(eps):
    """SLSQP on the program as it is written down, on six images of two pixels."""
    x, _ = problem(6, 4)
    x, y = x[:, :2], torch.tensor([1.0, -1, 1, -1, -1, 1]).double()
    made = Program.of(x, y, eps, 0.01, draw(x, eps, 6, 0))
    v, w = made.solve(1000, 0.1, Job())
    count, signs, z = len(made.on), (2 * made.on - 1).numpy(), x.numpy()

    def parts(flat):
        return flat.reshape(2, count, 2)

    def value(flat):
        v, w = parts(flat)
        act = made.on.numpy().T @ (v - w)
        loss = np.maximum(0, 1 - y.numpy() * (z * act).sum(1) + eps * np.abs(act).sum(1)).mean()
        return loss + 0.01 * np.sqrt((parts(flat) ** 2).sum(2) + 1e-12).sum()

    def inside(flat):
        return np.concatenate([(signs * (u @ z.T) - eps * np.abs(u).sum(1)[:, None]).ravel() for u in parts(flat)])

    tries = [
        minimize(value, np.random.default_rng(seed).normal(size=4 * count), method="SLSQP",
                 constraints={"type": "ineq", "fun": inside}, options={"maxiter": 500})
        for seed in range(2)
    ]  # fmt: skip
    lowest = min(each.fun for each in tries if inside(each.x).min() > -1e-7)
    assert float(made.objective(v, w)) <= lowest * 1.005


def test_at_no_radius_it_is_the_standard_program():
    """The constraints are those of signs, and the loss is the hinge."""
    made = program(0.0)
    v, w = made.solve(60, 0.3, Job())
    signs = 2 * made.on - 1
    assert (signs * (v @ made.x.T) >= -1e-12).all()
    plain = (v @ made.x.T).clamp(min=0).sum(dim=0) - (w @ made.x.T).clamp(min=0).sum(dim=0)
    torch.testing.assert_close(made.losses(v - w), (1 - made.y * plain).clamp(min=0))


def test_what_has_left_its_cone_comes_back_without_a_change_of_what_acts():
    made = program(0.04)
    generator = torch.Generator().manual_seed(3)
    v, w = (torch.randn(made.inside.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    assert float(made.outside(v).max()) > 0.1
    back, other = made.put_back(v, w)
    assert float(torch.maximum(made.outside(back), made.outside(other)).max()) < 1e-9
    torch.testing.assert_close(back - other, v - w)


def test_no_random_direction_is_deeper_in_its_cone_than_the_deepest():
    x, _ = problem()
    signs = 2 * draw(x, 0.0, 10, 0)[3] - 1
    direction = deepest_direction(x, signs, 0.01)

    def margin(v):
        return float((signs * (x @ v)).min() - 0.01 * v.abs().sum())

    assert float(direction.abs().sum()) <= 1 + 1e-9
    others = torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert margin(direction) > 1e-4
    assert max(margin(other / other.abs().sum()) for other in others) <= margin(direction) + 1e-8


def test_patterns_are_those_of_directions_and_none_comes_twice():
    x, _ = problem(20)
    patterns = draw(x, 0.05, 40, 7)
    assert len(patterns.unique(dim=0)) == len(patterns)
    assert (patterns.sum(dim=1) == 20).any()
    assert torch.equal(patterns, draw(x, 0.05, 40, 7))
    assert not torch.equal(patterns[:5], draw(x, 0.05, 40, 8)[:5])


def hinge(model, x, y):
    first, second = model(x).unbind(1)
    return (1 - (2.0 * y - 1) * (second - first)).clamp(min=0)


def test_no_attack_on_a_training_image_goes_beyond_the_worst_case():
    data = Digits(classes="3+8")(None)
    data = data.released(data.train.subset(slice(60)))
    seen = {}
    defense = ConvexAdversarialTraining(eps=0.05, patterns=15, epochs=15)
    network = defense(lambda: TwoLayer(width=32)(2, (1, 8, 8), None), data, Job(note=seen.__setitem__))
    x, y = data.train.pixels(), data.train.labels
    found = pgd(network, x, y, Threat("linf", 0.05, "gradients"), SampleRng.create(0, torch.arange(60), "a"), 30, 0.1)
    with torch.no_grad():
        clean, attacked = hinge(network, x, y).mean(), hinge(network, found, y).mean()
    assert clean < attacked <= seen["worst_loss"] + 1e-5
    assert seen["worst_loss"] < 1  # what zero weights have
    assert 2 <= seen["patterns"] <= 16
    assert float(attacked) > 0.7 * seen["worst_loss"]  # the network is that of the loss; the box binds the attack alone


@pytest.mark.parametrize(
    ("dataset", "model", "said"),
    [
        ("digits", "two-layer", "tells two classes apart, and the data have 10; take two, as in classes=3"),
        ("digits(classes=3+8)", "cnn", "trains the model two-layer alone, not cnn"),
    ],
)
def test_a_plan_refuses_what_it_cannot_train(dataset, model, said):
    suite = {"dataset": dataset, "n": 20, "model": [model], "defense": ["convex-at"], "attack": ["pgd"], "seed": [0]}
    with pytest.raises(ConfigError, match=said):
        expand(load_suite(None, suite), Loader(None, None))


def test_a_narrow_network_and_a_hopeless_radius_are_refused():
    data = Digits(classes="3+8")(None)
    with pytest.raises(ConfigError, match=r"take two-layer\(width=128\), or fewer patterns"):
        ConvexAdversarialTraining()(lambda: TwoLayer(width=8)(2, (1, 8, 8), None), data, Job())
    black = data.released(Split(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])))
    with pytest.raises(ConfigError, match=r"no pattern of .* holds within eps=0.1 of all images"):
        ConvexAdversarialTraining(eps=0.1, patterns=3)(lambda: TwoLayer(width=8)(2, (1, 8, 8), None), black, Job())


def test_a_data_set_of_some_classes_keeps_their_samples_in_the_order_given():
    whole, some = Digits()(None), Digits(classes="8+3")(None)
    assert some.classes == ("8", "3")
    kept = (whole.train.labels == 8) | (whole.train.labels == 3)
    assert torch.equal(some.train.images, whole.train.images[kept])
    assert torch.equal(some.train.labels, (whole.train.labels[kept] == 3).long())
    assert some.fingerprint != Digits(classes="3+8")(None).fingerprint
    for wrong, said in (("3", "1 different"), ("3+3", "1 different"), ("3+x", "no class 'x'")):
        with pytest.raises(Exception, match=said):
            Digits(classes=wrong)(None)
    assert isinstance(some, Dataset)


def test_the_network_has_no_bias_and_a_layer_of_relus():
    network = TwoLayer(width=5)(3, (2, 4, 4), None)
    x = torch.rand(6, 2, 4, 4)
    expected = F.relu(x.flatten(1) @ network.hidden.weight.T) @ network.linear.weight.T
    torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(network(2 * x), 2 * network(x))
