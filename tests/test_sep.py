"""SEP: the released images are those of a slow reference, and each checkpoint forgets their class."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from attacks.learners.standard import Standard
from bench.data.digits import Digits
from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.models import resolve
from bench.protocols import Job
from bench.registry import defenses
from bench.rng import SampleRng
from bench.training import Recipe
from defenses.checkpoints import (
    LevelBox,
    cross_entropy,
    gradient,
    mean_cosine,
    recognised,
    select,
    train_checkpoints,
)
from defenses.sep import FeatureAligned, SelfEnsemble, VarianceReduced


class Double(nn.Module):
    """A small network in float64 that also takes float32 images."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh()).double()
        self.last = nn.Linear(12, 10).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x.double()))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return Digits()(None)


@pytest.fixture(scope="module")
def networks() -> list[nn.Module]:
    return [Double(seed).eval().requires_grad_(False) for seed in range(4)]


@pytest.fixture(scope="module")
def trained(digits) -> list[nn.Module]:
    few = replace(digits, train=digits.train.subset(slice(500)))
    return SelfEnsemble(epochs=10, checkpoints=3, network="cnn(width=8)").ensemble(few, Job(seed=1))


def moved(defense: SelfEnsemble, networks: list[nn.Module], data: Dataset, rows: slice) -> Tensor:
    levels, target = data.train.images[rows].double(), (data.train.labels[rows] + 5) % 10
    return defense.move(defense.direction(networks, data, Job(seed=7)), levels, target)


def reference(name: str, networks: list[nn.Module], data: Dataset, row: int, eps: int, steps: int, inner: int):
    """One image at a time, on the pixel scale, as section 3 of the paper and the released scripts have it."""
    clean = data.train.images[row : row + 1].double() / 255
    target = (data.train.labels[row : row + 1] + 5) % 10
    means = []
    for network in networks:
        features = network.body(data.train.pixels().double())
        means.append(torch.stack([features[data.train.labels == label].mean(dim=0) for label in range(10)]))

    def slope(k: int, x: Tensor, anchor: int) -> Tensor:
        x = x.clone().requires_grad_(True)
        if name == "sep":
            loss = nn.functional.cross_entropy(networks[k](x), target)
        else:
            loss = nn.functional.mse_loss(networks[k].body(x), means[anchor][target])
        loss.backward()
        return x.grad

    def clipped(x: Tensor) -> Tensor:
        return torch.max(torch.min(x, clean + eps / 255), clean - eps / 255).clamp(0, 1)

    x, count = clean.clone(), len(networks)
    for step in range(steps):
        slopes = [slope(k, x, k) for k in range(count)]
        mean = sum(slopes) / count
        if not name.startswith("sep-fa-vr"):
            x = clipped(x - mean.sign() / 255)
            continue
        drawn = SampleRng.create(7, torch.tensor([step]), "drawn checkpoints").integers(count, inner)[0]
        v, total = x.clone(), torch.zeros_like(x)
        for r in drawn.tolist():
            anchor = count - 1 if name.endswith("as-released") else r
            total += slope(r, v, anchor) - (slopes[r] - mean)
            v = clipped(v - total.sign() / 255)
        x = clipped(x - total.sign() / 255)
    return x * 255


VARIANTS = {
    "sep": SelfEnsemble(eps=3 / 255, steps=5),
    "sep-fa": FeatureAligned(eps=3 / 255, steps=5),
    "sep-fa-vr": VarianceReduced(eps=3 / 255, steps=5, inner=6),
    "sep-fa-vr as-released": VarianceReduced(eps=3 / 255, steps=5, inner=6, variant="as-released"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_images_are_those_of_the_reference(name, networks, digits):
    ours = moved(VARIANTS[name], networks, digits, slice(6))
    for row in range(6):
        slow = reference(name, networks, digits, row, eps=3, steps=5, inner=6)
        assert torch.equal(ours[row], slow[0].round())
        assert (slow[0] - slow[0].round()).abs().max() < 1e-9  # on the grid without rounding


def test_variants_differ(networks, digits):
    results = [moved(defense, networks, digits, slice(6)) for defense in VARIANTS.values()]
    for i in range(len(results)):
        for j in range(i):
            assert not torch.equal(results[i], results[j])


def test_one_checkpoint_is_targeted_pgd(networks, digits):
    network, rows, eps = networks[2], slice(10, 40), 4 / 255
    clean, target = digits.train.images[rows].double() / 255, (digits.train.labels[rows] + 5) % 10
    x = clean.clone()
    for _ in range(9):
        x.requires_grad_(True)
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(network(x), target), x)
        x = (clean + (x.detach() - slope.sign() / 255 - clean).clamp(-eps, eps)).clamp(0, 1)
    ours = moved(SelfEnsemble(eps=eps, steps=9), [network], digits, rows)
    assert torch.equal(ours, (255 * x).round())


def test_a_walk_of_one_step_is_feature_alignment_with_the_intended_anchor_alone(networks, digits):
    plain = moved(FeatureAligned(steps=6), networks, digits, slice(20))
    assert torch.equal(moved(VarianceReduced(steps=6, inner=1), networks, digits, slice(20)), plain)
    released = moved(VarianceReduced(steps=6, inner=1, variant="as-released"), networks, digits, slice(20))
    assert not torch.equal(released, plain)


def test_an_image_does_not_see_its_batch(networks, digits):
    defense = VarianceReduced(steps=3, inner=3)
    whole = moved(defense, networks, digits, slice(8))
    parts = [moved(defense, networks, digits, slice(start, start + 2)) for start in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", ["sep", "sep-fa", "sep-fa-vr(inner=4)"])
def test_released_images_stay_inside_and_checkpoints_forget_their_class(name, trained, digits):
    name, _, more = name.rstrip(")").partition("(")
    defense = defenses.create(f"{name}(eps=64/255, steps=64, checkpoints=3, {more})")
    job, few = Job(seed=1), replace(digits, train=digits.train.subset(slice(50)))
    direction = defense.direction(trained, digits, job)

    levels, labels = few.train.images.float(), few.train.labels
    box, image = LevelBox.around(levels, defense.eps), levels
    recognisers, followers = [], []
    for step in range(defense.steps + 1):
        if step % 16 == 0:
            recognisers.append(recognised(trained, image, labels).float().mean().item())
            followers.append(recognised(trained, image, (labels + 5) % 10).float().mean().item())
        if step < defense.steps:
            image = box.project(image - direction(image, (labels + 5) % 10, box, step).sign())
    assert recognisers == sorted(recognisers, reverse=True)
    assert followers == sorted(followers)
    assert recognisers[0] > 2.4  # of 3
    assert recognisers[-1] < 0.4
    assert torch.equal(image, defense.move(direction, levels, (labels + 5) % 10))

    released = defenses.create(f"{name}(steps=3, epochs=2, checkpoints=2, network='cnn(width=8)', share=0.3)")(few, job)
    change = released.images.int() - few.train.images.int()
    assert change.abs().max() == 2
    assert (change != 0).flatten(1).any(dim=1).sum() == 15
    assert torch.equal(released.labels, labels)


def test_checkpoints_far_apart_have_gradients_less_alike_than_neighbours(digits):
    levels, target = digits.train.images[:200].float(), (digits.train.labels[:200] + 5) % 10
    few, recipe = replace(digits, train=digits.train.subset(slice(500))), Recipe.for_dataset(digits, epochs=16)
    networks = train_checkpoints(few, "cnn(width=8)", recipe, Job(), lambda *_: True)
    slopes = [gradient(cross_entropy(network), levels, target) for network in networks]
    spread = [slopes[position] for position in select(16, 4)]
    assert mean_cosine(spread).mean() < mean_cosine(slopes[-4:]).mean() - 0.1


def test_as_released_checkpoints_are_those_that_improved(digits):
    defense = SelfEnsemble(epochs=10, checkpoints=3, network="cnn(width=8)", variant="as-released")
    x, y = digits.calibration.images.float(), digits.calibration.labels
    right = [recognised([network], x, y).sum().item() for network in defense.ensemble(digits, Job())]
    assert len(right) == 3
    assert right[0] < right[1] < right[2]
    untuned = replace(digits, calibration=digits.calibration.subset(slice(0)))
    with pytest.raises(ConfigError, match="no calibration images"):
        defense(untuned, Job())


def test_training_on_protected_digits_costs_accuracy_on_clean_ones(digits):
    few = replace(digits, train=digits.train.subset(slice(600)))
    defense = SelfEnsemble(eps=64 / 255, steps=64, epochs=10, checkpoints=3, network="cnn(width=8)")
    released = few.released(defense(few, Job()))

    def accuracies(data: Dataset) -> list[float]:
        network = Standard(epochs=10)(lambda: resolve("cnn(width=8)")(10, (1, 8, 8), None), data, Job())
        parts = (data.train, digits.test)
        return [recognised([network], 255 * part.pixels(), part.labels).float().mean().item() for part in parts]

    clean, spoiled = accuracies(few), accuracies(released)
    assert clean[1] > 0.9
    assert spoiled[0] > 0.9  # on the images it was trained on
    assert spoiled[1] < 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eps=0.01", "released images are grey levels"),
        ("eps=0", "released images are grey levels"),
        ("eps=2", "released images are grey levels"),
        ("steps=0", "0 steps against 30 checkpoints"),
        ("epochs=20", "30 checkpoints of 20 epochs"),
        ("share=0", "share is 0"),
        ("network=resnet19", "did you mean"),
        ("network=robust-resnet18", "comes with its weights"),
    ],
)
def test_what_cannot_be_meant_is_an_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        defenses.create(f"sep({arguments})")


@pytest.mark.parametrize("name", ["sep", "tap"])
def test_a_class_that_is_its_own_target_is_an_error_before_anything_is_trained(name, digits):
    def trained(done: int, total: int) -> None:
        raise AssertionError("an epoch was trained")

    with pytest.raises(ConfigError, match="shift is 20 and digits has 10 classes"):
        defenses.create(f"{name}(shift=20)")(digits, Job(progress=trained))
