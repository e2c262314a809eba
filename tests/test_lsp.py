"""LSP: patches of points from separable clusters, as a plain loop makes them, in the l2 ball."""

import math
from dataclasses import replace

import pytest
import torch

from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.protection import protected_rows
from bench.protocols import Job
from bench.rng import SampleRng
from defenses.lsp import PUBLISHED_EPS, SEPARATION, Clusters, LinearlySeparable


def grey(count: int, shape: tuple[int, int, int], classes: int = 10) -> Dataset:
    """Mid-grey images, so that nothing is cut off."""
    train = Split(torch.full((count, *shape), 128, dtype=torch.uint8), torch.arange(count) % classes)
    empty = train.subset(slice(0))
    return Dataset("grey", tuple(map(str, range(classes))), train, empty, empty)


def change(defense: LinearlySeparable, data: Dataset, seed: int = 0) -> torch.Tensor:
    return defense(data, Job(seed=seed)).images.double() - data.train.images.double()


def reference(data: Dataset, patch: int, eps: float, seed: int) -> torch.Tensor:
    """One sample and one pixel at a time, before rounding."""
    channels, height, width = data.train.shape
    across, down = math.ceil(width / patch), math.ceil(height / patch)
    clusters = Clusters(len(data.classes), channels * across * down, seed)
    delta = torch.zeros(data.train.images.shape, dtype=torch.float64)
    for row, label in enumerate(data.train.labels.tolist()):
        point = clusters.points(label, SampleRng.create(seed, torch.tensor([row]), "lsp point"))[0].tolist()
        for channel in range(channels):
            for y in range(height):
                for x in range(width):
                    delta[row, channel, y, x] = point[(channel * down + y // patch) * across + x // patch]
        delta[row] *= 255 * eps / math.sqrt(float((delta[row] ** 2).sum()))
    return delta


@pytest.mark.parametrize(("shape", "patch"), [((3, 8, 8), 2), ((1, 7, 5), 3)])
def test_the_release_is_that_of_a_plain_loop(shape, patch):
    data = grey(12, shape, classes=4)
    expected, found = reference(data, patch, 1.0, seed=5), change(LinearlySeparable(eps=1.0, patch=patch), data, seed=5)
    off = (found - expected).abs().amax()
    assert off < 0.5 + 0.02 * expected.abs().amax()  # rounding, and the scale that keeps its result in the ball
    size = found.flatten(1).norm(dim=1) / 255
    assert (size <= 1.0).all()
    assert (size > 0.97).all()


def test_cifar_gets_the_published_patches_and_norm():
    data = grey(40, (3, 32, 32))
    found = change(LinearlySeparable(), data)
    assert torch.equal(found, change(LinearlySeparable(patch=8, eps=6 / 255 * 3072**0.5), data))
    squares = found.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4)
    assert torch.equal(squares.amin(dim=4), squares.amax(dim=4))
    assert (found.flatten(1).norm(dim=1) / 255 > 0.98 * PUBLISHED_EPS).all()
    assert (found.abs().amax() / 255) <= PUBLISHED_EPS / 8


def test_a_linear_probe_reads_the_class_from_the_perturbation():
    data = grey(1200, (3, 32, 32))
    delta, labels = change(LinearlySeparable(), data).flatten(1), data.train.labels
    inputs = torch.cat((delta, torch.ones(len(delta), 1)), dim=1)
    half = slice(0, 600)
    weights = torch.linalg.lstsq(inputs[half], torch.eye(10).double()[labels[half]], driver="gelsd").solution
    right = ((inputs @ weights).argmax(1) == labels)[600:].double().mean()  # of points that the fit has not seen
    assert right > 0.99


def test_corners_differ_even_where_they_are_few():
    for classes, size in ((16, 4), (10, 48), (1000, 12)):
        corners = Clusters(classes, size, seed=0).corners
        assert len(corners.unique(dim=0)) == classes
        assert (corners.abs() == SEPARATION).all()


def test_clusters_are_gaussians_about_their_corners():
    clusters, n = Clusters(3, 6, seed=2), 4000
    streams = SampleRng.create(0, torch.arange(n), "test")
    points = clusters.points(1, streams)
    mean, deviation = points.mean(dim=0), points.std(dim=0)
    assert ((mean - clusters.corners[1]).abs() < 4 * deviation / n**0.5).all()
    assert (deviation < 6**0.5).all()  # mixtures of six unit normals by factors below 1


def test_a_sample_does_not_see_the_others():
    data = grey(60, (3, 8, 8))
    rows = protected_rows(data.train, 0.4, Job(seed=4))
    part, whole = (change(LinearlySeparable(share=share), data, seed=4) for share in (0.4, 1.0))
    assert torch.equal(part[rows], whole[rows])
    assert part.flatten(1).any(dim=1).sum() == len(rows)
    assert not torch.equal(change(LinearlySeparable(), data, seed=5), whole)


def test_dark_images_lose_what_is_below_black():
    data = grey(20, (3, 8, 8))
    dark = replace(data, train=Split(torch.zeros_like(data.train.images), data.train.labels))
    assert torch.equal(change(LinearlySeparable(), dark), change(LinearlySeparable(), data).clamp(min=0))


def test_impossible_parameters_are_refused():
    with pytest.raises(ConfigError, match="1 patch make 2 corners for 10 classes"):
        LinearlySeparable(patch=8)(grey(10, (1, 8, 8)), Job())
    with pytest.raises(ConfigError, match="patch is 0"):
        LinearlySeparable(patch=0)
    with pytest.raises(ConfigError, match="eps is -1"):
        LinearlySeparable(eps=-1)
