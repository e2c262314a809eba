"""Sub-AT: exact principal directions, weights that stay in them, and a training that needs the right ones."""

import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import scratch as scratch_module
from bench.dataset import Dataset
from bench.errors import ConfigError, StoreError
from bench.models import resolve
from bench.protocols import Job
from bench.registry import datasets
from bench.scratch import Scratch
from bench.system.interrupt import Stopped
from bench.training import fit, initialised
from defenses.sub_at import SubspaceAdversarialTraining
from defenses.subspace import SubspaceSGD, Trajectory, as_vector, principal_directions


@pytest.fixture(scope="module")
def few() -> Dataset:
    digits = datasets.create("digits")(None)
    return replace(digits, train=digits.train.subset(slice(128)), calibration=digits.calibration.subset(slice(32)))


def build() -> nn.Module:
    return resolve("cnn(width=4)")(10, (1, 8, 8), None)


def weights(model: nn.Module) -> torch.Tensor:
    return as_vector(parameter.detach() for parameter in model.parameters())


def orthonormal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64))[0].T.float()


SMALL = SubspaceAdversarialTraining(
    eps=0.03, epochs=2, batch_size=32, lr=0.1, dimensions=3, subspace_epochs=2, subspace_lr=0.1, early_stopping=False
)


class TestPrincipalDirections:
    def test_they_are_those_of_the_singular_value_decomposition(self):
        snapshots = torch.randn(9, 400, generator=torch.Generator().manual_seed(1)).cumsum(0)
        basis, shares = principal_directions(snapshots, 5)
        _, values, rows = torch.linalg.svd(snapshots.double() - snapshots.double().mean(0), full_matrices=False)
        assert torch.allclose(basis.double() @ rows[:5].T, torch.diag((basis.double() * rows[:5]).sum(1).sign()),
                              atol=1e-6)  # fmt: skip
        assert torch.allclose(shares, values[:5].square() / values.square().sum())
        assert (shares.diff() <= 0).all()

    def test_they_are_orthonormal_whatever_the_chunks(self, monkeypatch):
        snapshots = torch.randn(9, 400, generator=torch.Generator().manual_seed(2)).cumsum(0)
        whole, _ = principal_directions(snapshots, 8)
        monkeypatch.setattr("defenses.subspace.CHUNK", 37)
        basis, _ = principal_directions(snapshots, 8)
        assert torch.allclose(basis @ basis.T, torch.eye(8), atol=1e-6)
        assert torch.allclose(basis.T @ basis, whole.T @ whole, atol=1e-6)

    def test_with_all_directions_every_snapshot_is_reached_from_the_first(self):
        snapshots = torch.randn(9, 400, generator=torch.Generator().manual_seed(3)).cumsum(0)
        basis, shares = principal_directions(snapshots, 8)
        moved = snapshots - snapshots[0]
        assert torch.allclose(moved @ basis.T @ basis, moved, atol=1e-4)
        assert float(shares.sum()) == pytest.approx(1)

    def test_directions_that_are_not_there_are_refused(self):
        flat = torch.outer(torch.arange(5.0), torch.randn(40, generator=torch.Generator().manual_seed(4)))
        with pytest.raises(ConfigError, match="5 snapshots span 1 dimensions, fewer than 2"):
            principal_directions(flat, 2)


class TestSubspaceSGD:
    def test_it_is_momentum_sgd_on_projected_gradients(self):
        basis = orthonormal(3, 12).double()
        ours, theirs = (nn.Parameter(torch.arange(12.0).double()) for _ in range(2))
        inside = SubspaceSGD([ours], basis, lr=0.1)
        full = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
        for step in range(20):
            ours.grad = torch.sin(ours.detach() + step)
            theirs.grad = basis.T @ (basis @ torch.sin(theirs.detach() + step))
            inside.step()
            full.step()
        assert torch.allclose(ours, theirs, atol=1e-12)
        assert inside.coordinates.shape == inside.velocity.shape == (3,)

    def test_its_state_goes_on(self):
        basis = orthonormal(2, 6)
        whole, cut = (nn.Parameter(torch.ones(6)) for _ in range(2))
        one, other = (SubspaceSGD([parameter], basis, lr=0.1) for parameter in (whole, cut))
        for optimizer, parameter in ((one, whole), (other, cut)):
            parameter.grad = torch.arange(6.0)
            optimizer.step()
        fresh = SubspaceSGD([nn.Parameter(torch.ones(6))], basis, lr=1.0)
        fresh.load_state_dict(other.state_dict())
        (parameter,) = fresh.group["params"]
        for optimizer, moving in ((one, whole), (fresh, parameter)):
            moving.grad = torch.ones(6)
            optimizer.step()
        assert torch.equal(parameter, whole)


def test_snapshots_are_taken_when_the_variant_says(few):
    def moments(batches, **more):
        data = replace(few, train=few.train.subset(torch.arange(batches * 2) % len(few.train)))
        return replace(SMALL, batch_size=2, **more).moments(data)

    assert moments(352, snapshots="as-released") == [200, 351]
    assert moments(704, snapshots="as-released") == [200, 400, 550, 703]
    assert moments(100, snapshots="as-released") == [99]
    assert moments(352) == [175, 351]
    assert moments(1) == [0]


def test_the_weights_stay_in_the_subspace_and_batch_norm_learns_anew(few):
    basis = SMALL.explore(build, few, Job())
    assert torch.allclose(basis @ basis.T, torch.eye(3), atol=1e-6)
    network = SMALL.train_inside(basis, build, few, Job())
    first = initialised(build, Job())
    moved = weights(network) - weights(first)
    outside = moved - moved @ basis.T @ basis
    assert moved.norm() > 0.1
    assert outside.norm() < 1e-5 * moved.norm()
    assert not torch.equal(network.features[1].running_mean, first.features[1].running_mean)


def test_with_all_directions_the_coordinates_give_the_last_snapshot_back(few):
    full = replace(SMALL, dimensions=4)
    network = initialised(build, Job())
    fit(network, few, full.recipe_for(few), Job(), full.perturb("fast", 0.03))
    basis = full.explore(build, few, Job())
    moved = weights(network) - weights(initialised(build, Job()))
    assert torch.allclose(moved @ basis.T @ basis, moved, atol=1e-5)


def test_a_random_subspace_of_the_same_size_trains_clearly_worse(few):
    defense = replace(SMALL, epochs=10, dimensions=10, subspace_epochs=10)

    def loss(basis):
        model = defense.train_inside(basis, build, few, Job())
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(few.train.pixels()), few.train.labels))

    basis = defense.explore(build, few, Job())
    assert loss(basis) < 1 < 2 < loss(orthonormal(*basis.shape))  # chance is log 10, 2.3


def test_more_dimensions_than_snapshots_are_refused_before_any_training(few):
    with pytest.raises(ConfigError, match="5 snapshots span at most 4 dimensions, not 5; train for more epochs"):
        replace(SMALL, dimensions=5)(build, few, Job(progress=None))


def test_it_may_have_the_papers_numbers_or_what_there_are(few):
    assert SubspaceAdversarialTraining(batch_size=32).dimension(few) == 80
    assert SubspaceAdversarialTraining().recipe_for(few).epochs == 65
    assert SubspaceAdversarialTraining(variant="pgd", batch_size=32).dimension(few) == 100
    assert SubspaceAdversarialTraining(variant="pgd").recipe_for(few).epochs == 100
    assert SubspaceAdversarialTraining(batch_size=32, epochs=3).dimension(few) == 6


def test_progress_runs_over_both_trainings(few):
    seen = []
    SMALL(build, few, Job(progress=lambda done, total: seen.append((done, total))))
    assert seen == [(epoch, 4) for epoch in range(1, 5)]


@pytest.mark.parametrize(("variant", "limit"), [("fast", 2), ("pgd", 4)])  # in the first training, in the subspace
def test_a_killed_training_goes_on_to_the_same_weights(few, tmp_path, monkeypatch, variant, limit):
    monkeypatch.setattr(scratch_module, "PAUSE", 0.0)
    defense = replace(SMALL, variant=variant, early_stopping=True)
    whole = defense(build, few, Job(seed=1)).state_dict()

    def progress(done, total):
        if done == limit:
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        defense(build, few, Job(seed=1, scratch=Scratch(tmp_path), progress=progress))
    seen = []
    job = Job(seed=1, scratch=Scratch(tmp_path), progress=lambda done, total: seen.append(done))
    gone_on = defense(build, few, job).state_dict()
    assert seen == ([1, 2, 3, 4] if limit == 2 else [2, 3, 4])
    assert all(torch.equal(value, gone_on[name]) for name, value in whole.items())


def test_a_lost_snapshot_is_named(few, tmp_path):
    Trajectory(build(), Job(scratch=Scratch(tmp_path))).take(1)
    later = Trajectory(build(), Job(scratch=Scratch(tmp_path)))
    assert later.matrix(2).shape[0] == 2
    (tmp_path / "snapshot-1").write_bytes(b"cut")
    with pytest.raises(StoreError, match=r"snapshot 1 in .* is damaged"):
        Trajectory(build(), Job(scratch=Scratch(tmp_path))).matrix(2)
