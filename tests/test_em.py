"""EM: noise goes down the loss inside its ball, by sample or by class, until the network has nothing left to learn."""

import pytest
import torch
from torch.nn import functional as F

from attacks.learners.standard import Standard
from bench.data.digits import Digits
from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.models import resolve
from bench.norms import lp_norm
from bench.protocols import Job
from bench.training import Recipe, initialised
from defenses.em import ErrorMinimising, error, means_by, shuffled
from defenses.surrogate import surrogate, surrogate_job
from tests.problems import curved, images, linear_problem

NETWORK = "cnn(width=8)"
QUICK = {"network": NETWORK, "steps": 2, "rel_step": 0.7, "eps": 64 / 255}  # digits hold out against 8/255


@pytest.fixture(scope="module")
def digits() -> Dataset:
    data = Digits()(None)
    return data.released(data.train.subset(slice(0, 400)))


def train_loss(data: Dataset) -> float:
    """What is left of the loss after four epochs of a fresh network."""
    network = resolve(NETWORK)
    model = Standard(epochs=4)(lambda: network(10, data.train.shape, None), data, Job())
    with torch.no_grad():
        return F.cross_entropy(model(data.train.pixels()), data.train.labels).item()


def test_on_a_linear_network_the_noise_is_the_whole_ball_towards_the_true_class():
    model, x, y, _ = linear_problem()
    radius = 8 / 255
    noise = ErrorMinimising().descend(model, x, y, torch.zeros_like(x), radius)
    towards = (model.weight[y] - model.weight[1 - y]).sign().view_as(x)
    torch.testing.assert_close(noise, radius * towards)
    assert ErrorMinimising(by="class").descend(model, x, y, torch.zeros_like(x), radius).abs().max() <= radius / 9.9


def test_descent_is_that_of_a_plain_loop_over_samples():
    model, x = curved(), images(6, (1, 5, 5))
    y, radius = torch.arange(6) % 4, 0.05
    found = ErrorMinimising(steps=5, rel_step=0.3).descend(model, x, y, torch.zeros_like(x), radius)
    for row in range(6):
        noise = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
        for _ in range(5):
            x_adv = (x[row : row + 1] + noise).requires_grad_(True)
            loss = torch.logsumexp(model(x_adv), dim=1) - model(x_adv)[:, y[row]]
            loss.sum().backward()
            noise = torch.clamp(noise - 0.3 * radius * x_adv.grad.sign(), -radius, radius)
        assert torch.equal(found[row], noise[0])
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("by", ["sample", "class"])
def test_a_fresh_network_learns_protected_images_sooner_than_clean_ones(digits, by):
    defense = ErrorMinimising(by=by, **QUICK)
    released = defense(digits, Job())
    change = released.images.int() - digits.train.images.int()
    assert change.abs().max() == 64
    assert torch.equal(released.labels, digits.train.labels)
    assert train_loss(digits.released(released)) < 0.95 * train_loss(digits)


def test_classes_share_their_noise():
    labels = torch.arange(60) % 3
    train = Split(torch.full((60, 1, 8, 8), 128, dtype=torch.uint8), labels)  # mid-grey: nothing is cut off
    data = Dataset("grey", ("a", "b", "c"), train, train.subset(slice(0)), train.subset(slice(0)))
    quick = {"network": NETWORK, "rounds": 1}
    released = ErrorMinimising(by="class", **quick)(data, Job()).images
    assert len(released.unique(dim=0)) == 3
    assert all(len(released[labels == label].unique(dim=0)) == 1 for label in range(3))


def test_means_by_owner_keep_who_has_none():
    owner, values = torch.tensor([2, 0, 2]), torch.tensor([[1.0], [5.0], [4.0]])
    default = torch.tensor([[7.0], [8.0], [9.0]])
    assert means_by(owner, values, default).flatten().tolist() == [5.0, 8.0, 2.5]


def test_it_stops_once_few_enough_released_images_are_wrong(digits):
    def turns(**settings) -> list[int]:
        done: list[int] = []
        ErrorMinimising(by="class", **QUICK, **settings)(digits, Job(progress=lambda turn, total: done.append(turn)))
        return done

    assert turns(stop_error=1.0) == [1]
    assert turns(rounds=2, stop_error=0.0, train_steps=1) == [1, 2]

    own = surrogate_job(Job())
    defense, model = ErrorMinimising(by="class", **QUICK), surrogate(digits, NETWORK, own)
    noise = defense.minimise(model, digits.train, 10, Recipe.for_dataset(digits), own)
    assert lp_norm(noise, "linf").max() <= 64 / 255 + 1e-7
    noisy = Split((digits.train.images + (255 * noise).round()).clamp(0, 255).byte(), digits.train.labels)
    assert error(model, noisy) <= 0.1 < error(model, digits.train)


def test_batches_go_through_all_rows_again_and_again():
    batches = shuffled(10, 4, Job(seed=3))
    first, second = (torch.cat([next(batches) for _ in range(3)]) for _ in range(2))
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert not torch.equal(first, second)


def test_the_defender_does_not_know_the_first_weights_of_the_learner(digits):
    network = resolve(NETWORK)
    learner = initialised(lambda: network(10, digits.train.shape, None), Job())
    own = surrogate(digits, NETWORK, surrogate_job(Job()))
    assert not torch.equal(learner.linear.weight, own.linear.weight)
    assert surrogate_job(Job()).seed != surrogate_job(Job(seed=1)).seed


def test_impossible_parameters_are_refused():
    for settings, message in (
        ({"eps": 0.001}, "one grey level"),
        ({"rounds": 0}, "rounds is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"rel_step": 0}, "rel_step is 0"),
        ({"stop_error": 2}, "stop_error is 2"),
        ({"network": "resnet18(weights=x.pt)"}, "comes with its weights"),
        ({"network": "resnet"}, "no model is named"),
    ):
        with pytest.raises(ConfigError, match=message):
            ErrorMinimising(**settings)
