"""HYPO, NTGA and TensorClog: what each says it makes small or large is so, against slow references."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.data.digits import Digits
from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.protocols import Job
from bench.training import Recipe
from defenses import ntga
from defenses.checkpoints import train_checkpoints
from defenses.features import features_of, last_linear
from defenses.hypo import HypocriticalPerturbations
from defenses.ntga import NeuralTangentGeneralizationAttack, learned, tangent_kernel
from defenses.surrogate import surrogate_job
from defenses.tensor_clog import TensorClog, clog, new_head

EPS = 16 / 255


@pytest.fixture(scope="module")
def digits() -> Dataset:
    whole = Digits()(None)
    return whole.released(whole.train.subset(slice(200)))


def protecting(data: Dataset, epochs: int = 15) -> nn.Module:
    """The network that a defense with these settings trains."""
    recipe = Recipe.for_dataset(data, epochs=epochs)
    (network,) = train_checkpoints(data, "cnn(width=4)", recipe, Job(), lambda epoch, _: epoch + 1 == epochs)
    return network


def noisy(data: Dataset, levels: int) -> torch.Tensor:
    signs = torch.randint(0, 2, data.train.images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (data.train.images.int() + levels * signs).clamp(0, 255) / 255


class TestHypo:
    def test_the_loss_of_its_own_classes_falls_and_of_noise_does_not(self, digits):
        defense = HypocriticalPerturbations(eps=EPS, steps=10, epochs=15, network="cnn(width=4)")
        released, network = defense(digits, Job()).pixels(), protecting(digits)

        def losses(x):
            with torch.no_grad():
                return F.cross_entropy(network(x), digits.train.labels, reduction="none")

        clean = losses(digits.train.pixels())
        assert losses(released).mean() < 0.88 * clean.mean()
        assert (losses(released) <= clean + 0.01).float().mean() > 0.98
        assert losses(noisy(digits, 16)).mean() > 0.95 * clean.mean()

    def test_images_are_those_of_a_loop_over_single_ones(self, digits):
        defense = HypocriticalPerturbations(eps=EPS, steps=5, rel_step=0.4, epochs=15, network="cnn(width=4)")
        released, network, differing = defense(digits, Job()).images, protecting(digits), 0
        for row in range(8):
            clean = digits.train.images[row : row + 1] / 255
            low, high = (clean - EPS).clamp(min=0), (clean + EPS).clamp(max=1)
            x = clean
            for _ in range(5):
                x = x.detach().requires_grad_(True)
                (slope,) = torch.autograd.grad(F.cross_entropy(network(x), digits.train.labels[row : row + 1]), x)
                x = (x.detach() - 0.4 * EPS * slope.sign()).clamp(low, high)
            differing += int(((255 * x[0]).round() != released[row]).sum())
        assert differing <= 8 * 64 / 50


class TestNtga:
    @pytest.mark.parametrize("depth", [1, 2])
    def test_the_kernel_is_that_of_wide_networks(self, depth):
        """The products of the gradients of finite networks by all of their weights, the mean over some of them."""
        x = torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        torch.manual_seed(1)
        width, tries, products = 600, 12, torch.zeros(4, 4, dtype=torch.float64)
        for _ in range(tries):
            sizes = [6, *[width] * depth, 1]
            weights = [torch.randn(out, into, dtype=torch.float64) for into, out in itertools.pairwise(sizes)]
            biases = [torch.randn(out, dtype=torch.float64) for out in sizes[1:]]
            parameters = [each.requires_grad_(True) for each in [*weights, *biases]]
            h = x
            for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                h = h.relu() if layer else h
                h = (ntga.WEIGHTS / weight.shape[1]) ** 0.5 * h @ weight.T + ntga.BIASES**0.5 * bias
            slopes = [torch.autograd.grad(out, parameters, retain_graph=True) for out in h]
            gradients = torch.stack([torch.cat([each.flatten() for each in of_one]) for of_one in slopes])
            products += gradients @ gradients.T / tries
        torch.testing.assert_close(products, tangent_kernel(x, x, depth), rtol=0.05, atol=0.0)

    def test_the_closed_form_is_gradient_flow_in_small_steps(self):
        generator = torch.Generator().manual_seed(2)
        x, others = (torch.rand(n, 5, generator=generator, dtype=torch.float64) for n in (6, 3))
        targets = F.one_hot(torch.tensor([0, 1, 2, 0, 1, 2])).double()
        within, across = tangent_kernel(x, x, 3), tangent_kernel(others, x, 3)
        here, there = torch.zeros(6, 3).double(), torch.zeros(3, 3).double()
        time, steps = 40.0, 4000
        for _ in range(steps):
            rest = (targets - here) * (time / steps / targets.numel())
            here, there = here + within @ rest, there + across @ rest
        torch.testing.assert_close(learned(x, targets, others, 3, time), there, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(learned(x, targets, x, 3, 1e7), targets, rtol=0, atol=1e-2)  # it learns them all

    def test_its_slope_is_that_of_differences_where_images_meet_themselves(self):
        generator = torch.Generator().manual_seed(3)
        x, held = (torch.rand(5, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
        labels = torch.tensor([0, 1, 2, 1, 0])
        defense = NeuralTangentGeneralizationAttack(depth=2)
        x.requires_grad_(True)
        (slope,) = torch.autograd.grad(defense.loss(x, labels, held, labels, 3), x)
        towards = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (defense.loss(x + s * 1e-5 * towards, labels, held, labels, 3) for s in (1, -1))
        assert float((ahead - behind) / 2e-5) == pytest.approx(float((slope * towards).sum()), rel=1e-3)

    def test_what_is_learned_of_others_becomes_wrong_and_of_noise_does_not(self, digits):
        """In two blocks, on images that it has not seen, too."""
        defense = NeuralTangentGeneralizationAttack(eps=4 * EPS, depth=1, block=100, steps=5, time=2000.0)
        released = defense(digits, Job()).images
        assert (released.int() - digits.train.images.int()).abs().max() == 64
        targets, test = F.one_hot(digits.train.labels, 10).double(), digits.test

        def accuracy(x):
            said = learned(x.double(), targets, test.pixels().double(), 1, 2000.0)
            return float((said.argmax(1) == test.labels).double().mean())

        clean = accuracy(digits.train.pixels())
        assert clean > 0.85
        assert accuracy(released / 255) < clean - 0.15
        assert accuracy(noisy(digits, 64)) > clean - 0.1

    def test_without_calibration_images_it_holds_out_training_images(self, digits):
        empty = Dataset("x", digits.classes, digits.train.subset(slice(30)), digits.train.subset(slice(0)), digits.test)
        released = NeuralTangentGeneralizationAttack(depth=1, steps=1)(empty, Job())
        assert isinstance(released, Split)
        assert not torch.equal(released.images, empty.train.images)




class TestTensorClog:
    def test_what_is_made_small_is_what_autograd_says_of_each_image(self):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 4))
        x, y, head = torch.rand(5, 3, 2, 2), torch.tensor([0, 3, 1, 1, 2]), new_head(network[3], 3)
        served = nn.Sequential(*network[:3], head.requires_grad_(True))
        norms = []
        for image, label in zip(x.split(1), y.split(1), strict=True):
            slopes = torch.autograd.grad(F.cross_entropy(served(image), label), [head.weight, head.bias])
            norms.append(sum(slope.norm() for slope in slopes))
        torch.testing.assert_close(clog(network, network[3], head)(x, y), torch.stack(norms))

    def test_a_network_that_ends_otherwise_is_refused_before_it_is_trained(self, digits):
        told = []
        with pytest.raises(ConfigError, match=r"ends in nn\.Linear"):
            TensorClog(epochs=1, network="cnn(width=2, heads=2)")(digits, Job(progress=lambda *it: told.append(it)))
        assert not told

    def test_a_new_head_is_drawn_anew_from_each_seed_alone(self):
        old = nn.Linear(30, 10)
        one, same, other = (new_head(old, seed) for seed in (1, 1, 2))
        assert torch.equal(one.weight, same.weight)
        assert torch.equal(one.bias, same.bias)
        assert not torch.equal(one.weight, other.weight)
        assert not torch.equal(one.bias, other.bias)
        assert one.weight.abs().max() <= (6 / 40) ** 0.5
        assert one.bias.abs().max() <= 30**-0.5

    def test_images_are_those_of_a_loop_over_single_ones(self, digits):
        defense = TensorClog(eps=EPS, steps=5, lr=0.002, epochs=15, network="cnn(width=4)")
        released, network, differing = defense(digits, Job()).images, protecting(digits), 0
        old = last_linear(network, digits.train.pixels(slice(2)))
        loss = clog(network, old, new_head(old, surrogate_job(Job()).seed))
        for row in range(8):
            clean = digits.train.images[row : row + 1] / 255
            low, high = (clean - EPS).clamp(min=0), (clean + EPS).clamp(max=1)
            x = clean
            for _ in range(5):
                x = x.detach().requires_grad_(True)
                cost = loss(x, digits.train.labels[row : row + 1]) + 0.05 * (x - clean).norm()
                (slope,) = torch.autograd.grad(cost.sum(), x)
                x = (x.detach() - 0.002 * slope).clamp(low, high)
            differing += int(((255 * x[0]).round() != released[row]).sum())
        assert not torch.equal(released, digits.train.images)
        assert differing <= 8 * 64 / 50

    def test_a_new_head_on_the_same_features_learns_less_and_of_noise_does_not(self, digits):
        defense = TensorClog(eps=64 / 255, steps=50, epochs=15, network="cnn(width=4)")
        released, network = defense(digits, Job()).pixels(), protecting(digits)
        old = last_linear(network, digits.train.pixels(slice(2)))

        def features(x):
            with features_of(old) as seen, torch.no_grad():
                network(x)
            return seen[0]

        def accuracy(x, seed):
            """On test images, of a head that was trained on ``x`` by gradient descent."""
            head, learned_from = new_head(old, seed).requires_grad_(True), features(x)
            optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
            for _ in range(200):
                optimizer.zero_grad()
                F.cross_entropy(head(learned_from), digits.train.labels).backward()
                optimizer.step()
            return float((head(features(digits.test.pixels())).argmax(1) == digits.test.labels).float().mean())

        for seed in (surrogate_job(Job()).seed, 1):  # the head that it was made for, and another
            clean, protected = accuracy(digits.train.pixels(), seed), accuracy(released, seed)
            assert protected < clean - 0.2
            assert accuracy(noisy(digits, 64), seed) > clean - 0.1
