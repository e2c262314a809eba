"""The share of the training images that a data defense protects."""

import pytest
import torch

from bench.dataset import Split
from bench.errors import ConfigError, ThreatViolation
from bench.protection import check_release, merge, protected_rows
from bench.protocols import Job
from bench.threat import Threat


def split(count: int = 1000) -> Split:
    images = torch.randint(0, 256, (count, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Split(images, torch.arange(count) % 10)


def test_a_share_is_drawn_by_the_seed_and_nested_in_a_larger_one():
    small, large = (protected_rows(split(), share, Job(seed=3)) for share in (0.2, 0.7))
    assert len(small) == 200
    assert len(large) == 700
    assert set(small.tolist()) <= set(large.tolist())
    assert (small.diff() > 0).all()
    assert torch.equal(protected_rows(split(), 0.2, Job(seed=3)), small)
    assert not torch.equal(protected_rows(split(), 0.2, Job(seed=4)), small)
    overlap = len(set(small.tolist()) & set(protected_rows(split(), 0.2, Job(seed=4)).tolist()))
    assert abs(overlap - 40) < 4 * (200 * 0.2 * 0.8) ** 0.5  # two independent draws of a fifth


def test_the_whole_share_is_every_row_and_the_least_is_one():
    assert torch.equal(protected_rows(split(), 1.0, Job()), torch.arange(1000))
    assert len(protected_rows(split(), 1e-6, Job())) == 1


def test_protected_images_go_back_to_their_rows_and_nothing_else_moves():
    before, rows = split(), protected_rows(split(), 0.3, Job())
    images = before.images.clone()
    released = merge(before, rows, 255 - before.images[rows])
    moved = torch.zeros(1000, dtype=torch.bool)
    moved[rows] = True
    assert torch.equal(released.images[moved], 255 - images[moved])
    assert torch.equal(released.images[~moved], images[~moved])
    assert torch.equal(released.labels, before.labels)
    assert torch.equal(before.images, images)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_an_impossible_share_is_an_error(share):
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        protected_rows(split(), share, Job())


def images_of(count=4):
    return Split(torch.full((count, 1, 2, 2), 100, dtype=torch.uint8), torch.arange(count))


@pytest.mark.parametrize(
    ("norm", "eps", "change", "fits"),
    [
        ("linf", 8 / 255, 8, True),
        ("linf", 8 / 255, 9, False),
        ("l2", 2 * 8 / 255, 8, True),  # four pixels by 8 levels
        ("l2", 2 * 8 / 255, 9, False),
        ("l0", 4.0, 8, True),
        ("l0", 3.0, 8, False),
    ],
)
def test_a_release_is_held_to_the_ball_that_is_declared(norm, eps, change, fits):
    original = images_of()
    released = Split(original.images.clone(), original.labels)
    released.images[1] += change
    threat = Threat(norm, eps, "training-data")
    if fits:
        assert check_release(released, original, threat).fingerprint() == released.fingerprint()
    else:
        with pytest.raises(ThreatViolation, match=rf"released 1 of 4 images outside its {norm} ball"):
            check_release(released, original, threat)


@pytest.mark.parametrize(
    ("release", "complaint"),
    [
        (lambda split: None, "released a NoneType"),
        (lambda split: Split(split.pixels(), split.labels), r"released torch.float32 images .* returns uint8"),
        (lambda split: split.subset(slice(3)), r"released torch.uint8 images \(3, 1, 2, 2\)"),
        (lambda split: Split(split.images, split.labels.flip(0)), "changed labels or their order"),
        (lambda split: Split(split.images, split.labels.int()), "changed labels or their order"),
    ],
)
def test_a_release_keeps_the_form_and_the_labels_it_was_given(release, complaint):
    with pytest.raises(ThreatViolation, match=complaint):
        check_release(release(images_of()), images_of(), Threat("linf", 1.0, "training-data"))
