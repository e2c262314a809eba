"""The trainings that have losses of their own: closed forms, limits, and what their steps leave behind."""

import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench import scratch as scratch_module
from bench.ascent import alignment, input_gradients
from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.models import resolve
from bench.norms import lp_norm
from bench.protocols import Job
from bench.registry import attacks, datasets, defenses
from bench.rng import SampleRng
from bench.scratch import Scratch
from bench.system.interrupt import Stopped
from bench.training import cross_entropy
from defenses.afa import AdaptiveFeatureAlignment, Branch
from defenses.awp import AdversarialWeightPerturbation
from defenses.comp_sum import CompSum, comp_sum, margins
from defenses.free_at import Replay
from defenses.gat import Guide, GuidedAdversarialTraining, squared
from defenses.grad_align import GradAlign
from defenses.ltd import divided
from defenses.trades import Mart, Trades, boosted, divergence


@pytest.fixture(scope="module")
def few() -> Dataset:
    digits = datasets.create("digits")(None)
    return replace(digits, train=digits.train.subset(slice(64)), calibration=digits.calibration.subset(slice(32)))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(12) % 10


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(144, 10)).train()


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


def streams(x: torch.Tensor) -> SampleRng:
    return SampleRng.create(0, torch.arange(len(x)), "test")


def one(losses: Iterator[torch.Tensor]) -> torch.Tensor:
    (loss,) = losses
    return loss


class TestGradAlign:
    def test_a_linear_model_is_aligned_everywhere(self, batch):
        x, y = batch
        here, there = (input_gradients(linear(), z, y % 2) for z in (x, x.flip(0)))
        cosine = alignment(here, there)
        assert torch.allclose(cosine.abs(), torch.ones(12), atol=1e-6)

    def test_its_penalty_is_what_a_larger_weight_adds(self, batch):
        x, y = batch
        without, single, double = (
            one(GradAlign(penalty=penalty).losses(network(), x, y, streams(x))).item() for penalty in (0.0, 0.5, 1.0)
        )
        assert double - without == pytest.approx(2 * (single - without), rel=1e-3)
        assert 0 < double - without <= 2

    def test_its_gradient_makes_the_gradients_agree(self, batch):
        x, y = batch
        model = network()
        x = x.double()
        model.double()
        rng = streams(x)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        seen = []
        for _ in range(20):
            plain = one(GradAlign(eps=0.3, penalty=0.0).losses(model, x, y, rng))
            penalty = one(GradAlign(eps=0.3, penalty=1.0).losses(model, x, y, rng)) - plain
            seen.append(penalty.item())
            optimizer.zero_grad()
            penalty.backward()
            optimizer.step()
        assert seen[-1] < 0.8 * seen[0]


class TestGuided:
    @pytest.mark.parametrize(("batch_number", "epoch", "weight"), [(0, 0, 10.0), (1, 0, 10.0), (1, 9, 40.0)])
    def test_its_loss_is_that_of_a_plain_loop(self, batch, batch_number, epoch, weight):
        x, y = batch
        model, rng = network().double(), streams(x)
        x = 0.25 + x.double() / 2
        guide = Guide(GuidedAdversarialTraining(eps=0.05), epochs=10)
        assert guide.begin(epoch)(model, x, y, rng) is x
        guide.batch = batch_number
        loss = one(guide.losses(model, x, y, rng))

        model = network().double()
        clean = model(x).softmax(1).detach()
        z = (x + 0.025 * (2.0 * rng.coins(1, 8, 8) - 1)).requires_grad_(True)
        model.eval()
        moved = (clean - model(z).softmax(1)).square().sum()
        climbed = F.cross_entropy(model(z), y, reduction="sum") + (weight * moved if batch_number else 0)
        (gradient,) = torch.autograd.grad(climbed, z)
        x_adv = x + (z.detach() + 0.05 * gradient.sign() - x).clamp(-0.05, 0.05)
        model.train()
        far, near = model(x_adv), model(x)
        gap = (near.softmax(1) - far.softmax(1)).square().sum(1).mean()
        assert loss.item() == pytest.approx((F.cross_entropy(near, y) + weight * gap).item(), rel=1e-9)
        assert guide.batch == batch_number + 1

    def test_the_distance_leads_where_the_cross_entropy_alone_does_not(self, batch):
        x, y = batch
        model = network()
        guide = Guide(GuidedAdversarialTraining(eps=0.3), epochs=1)
        guide.begin(0)
        clean = model(x).softmax(1).detach()
        plain, led = (guide._attack(model, x, y, clean, weight, streams(x)) for weight in (0.0, 1e6))
        with torch.no_grad():
            gap = [float(squared(clean, model(z).softmax(1)).mean()) for z in (plain, led)]
        assert gap[1] > gap[0]


class TestFree:
    def test_the_perturbation_moves_up_the_gradient_of_each_replay_and_goes_on_to_the_next_batch(self, batch):
        x, y = batch
        x, y, model = 0.25 + x / 2, y % 2, linear()
        replay = Replay(0.03, 3, torch.zeros(16, 1, 8, 8))
        for loss in replay(model, x, y, streams(x)):
            loss.backward()
        uphill = (model[1].weight[1 - y] - model[1].weight[y]).sign().view_as(x)
        assert torch.allclose(replay.delta[:12], 0.03 * uphill)
        assert (replay.delta[12:] == 0).all()
        for number, loss in enumerate(replay(model, x, y, streams(x))):
            if number == 0:  # it starts from the worst images
                assert torch.allclose(loss, F.cross_entropy(model(x + 0.03 * uphill), y))
            loss.backward()

    def test_there_is_a_step_for_each_replay(self, few):
        seen = []
        trained = defenses.create("free-at(replays=3, epochs=1, batch_size=32)")

        class Counted(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(64, 10)

            def forward(self, x):
                seen.append(len(x))
                return self.linear(x.flatten(1))

        trained(Counted, few, Job())
        assert seen == [32] * 6


class TestTradesAndMart:
    def test_the_divergence_is_kullback_and_leiblers(self):
        p, q = (torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
        expected = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
        )
        assert torch.allclose(divergence(p, q), expected, atol=1e-6)
        assert torch.allclose(divergence(p, p), torch.zeros(5), atol=1e-6)

    def test_the_boosted_loss_is_that_of_the_paper(self):
        logits, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2, 3, 0, 1])
        probabilities = logits.softmax(1)
        slow = [
            -probabilities[n, y[n]].log() - (1 - max(probabilities[n, k] for k in range(4) if k != y[n])).log()
            for n in range(6)
        ]
        assert torch.allclose(boosted(logits, y), torch.stack(slow).mean())

    def test_without_a_weight_trades_is_standard_training(self, batch):
        x, y = batch
        assert torch.allclose(
            one(Trades(beta=0.0).losses(network(), x, y, streams(x))), one(cross_entropy(network(), x, y, streams(x)))
        )

    def test_mart_weighs_by_how_unsure_the_clean_answer_is(self, batch):
        x, y = batch
        model = network().eval()
        with torch.no_grad():
            clean = model(x)
        unsure = 1 - clean.softmax(1)[torch.arange(12), y]
        defense = Mart(eps=0.1, beta=2.0)
        seen = []
        model.register_forward_hook(lambda module, given, logits: seen.append((given[0].detach(), logits.detach())))
        loss = one(defense.losses(model, x, y, streams(x)))
        (_, last_clean), (x_adv, adversarial) = seen[-2:]
        assert torch.allclose(loss, boosted(adversarial, y) + 2 * (unsure * divergence(last_clean, adversarial)).mean())
        assert lp_norm(x_adv - x, "linf").max() <= 0.1 + 1e-6

    @pytest.mark.parametrize("defense", [Trades(eps=0.1), Mart(eps=0.1)])
    def test_the_attack_leaves_batch_norm_alone_and_the_step_sees_both_batches(self, defense, batch):
        x, y = batch
        model = network()
        one(defense.losses(model, x, y, streams(x))).backward()
        assert int(model[1].num_batches_tracked) == 2
        assert model.training

    def test_the_attack_of_trades_raises_the_divergence_above_that_of_noise(self, batch):
        x, _ = batch
        model = network().eval()
        with torch.no_grad():
            clean = model(x)
        defense = Trades(eps=0.1)
        x_adv = defense.attack(lambda z: divergence(clean, model(z)).sum(), x, streams(x))
        noisy = (x + 0.1 * streams(x).coins(1, 8, 8).float().mul(2).sub(1)).clamp(0, 1)
        with torch.no_grad():
            assert (divergence(clean, model(x_adv)) > 2 * divergence(clean, model(noisy))).all()


class TestAwp:
    def test_it_moves_each_layer_by_its_share_up_the_loss_and_back(self, batch):
        x, y = batch
        model = network()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        losses = AdversarialWeightPerturbation(eps=0.05, steps=1, gamma=0.01).losses(model, x, y, streams(x))
        raised = next(losses)
        for parameter, old in zip(model.parameters(), before, strict=True):
            moved = (parameter.detach() - old).norm() / old.norm().clamp(min=1)
            assert float(moved) == pytest.approx(0.01 if parameter.ndim > 1 else 0, rel=1e-3)
        plain = one(AdversarialWeightPerturbation(eps=0.05, steps=1, gamma=1e-9).losses(network(), x, y, streams(x)))
        assert raised > plain + 1e-3
        with pytest.raises(StopIteration):
            next(losses)
        for parameter, old in zip(model.parameters(), before, strict=True):
            assert torch.allclose(parameter, old, atol=1e-7)

    def test_finding_the_direction_leaves_batch_norm_as_it_was(self, batch):
        x, y = batch
        model = network()
        AdversarialWeightPerturbation().moves(model, x, y)
        assert int(model[1].num_batches_tracked) == 0
        assert (model[1].running_mean == 0).all()


@pytest.mark.parametrize(
    "name", ["free-at(replays=2, epochs=3, batch_size=24)", "awp(steps=1, epochs=3)", "afa(steps=1, epochs=3)"]
)
def test_a_killed_training_goes_on_to_the_same_weights(name, few, tmp_path, monkeypatch):
    monkeypatch.setattr(scratch_module, "PAUSE", 0.0)

    def build() -> nn.Module:
        return resolve("cnn(width=4)")(10, (1, 8, 8), None)

    def progress(done, total):
        if done == 2:
            raise Stopped(signal.SIGTERM)

    whole = defenses.create(name)(build, few, Job(seed=1)).state_dict()
    with pytest.raises(Stopped):
        defenses.create(name)(build, few, Job(seed=1, scratch=Scratch(tmp_path), progress=progress))
    gone_on = defenses.create(name)(build, few, Job(seed=1, scratch=Scratch(tmp_path))).state_dict()
    assert all(torch.equal(value, gone_on[key]) for key, value in whole.items())


class TestCompSum:
    def test_its_loss_is_the_papers_family(self):
        logits, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2, 3, 0, 1])
        u = margins(logits, y)
        s = torch.stack([sum((-u[n, k]).exp() for k in range(4) if k != y[n]) for n in range(6)])
        p = logits.softmax(1)[torch.arange(6), y]
        for tau, expected in ((0.0, s), (1.0, -p.log()), (2.0, 1 - p), (1.5, ((1 + s) ** -0.5 - 1) / -0.5)):
            assert torch.allclose(comp_sum(u, tau), expected, atol=1e-6)

    def test_without_a_weight_it_is_standard_training(self, batch):
        x, y = batch
        loss = one(CompSum(beta=0.0).losses(network(), x, y, streams(x)))
        assert torch.allclose(loss, one(cross_entropy(network(), x, y, streams(x))))

    def test_its_attack_moves_the_margins_as_far_as_the_ball_lets_a_linear_model(self, batch):
        x, y = batch
        x, y, model = 0.25 + x / 2, y % 2, linear()
        logits = model(x).detach()
        loss = one(CompSum(eps=0.05, beta=1.0).losses(model, x, y, streams(x)))
        furthest = 0.05 * (model[1].weight[0] - model[1].weight[1]).abs().sum()
        assert torch.allclose(loss, F.cross_entropy(logits, y) + furthest, rtol=1e-4)


class TestLtd:
    def test_with_a_sharp_teacher_that_is_right_it_trains_on_hard_labels(self, batch):
        x, y = batch
        soft = F.one_hot(y, 10).float()
        defense = defenses.create("ltd(steps=3, eps=0.1)")
        ours = defense.attack(network(), x, soft, streams(x))
        theirs = defenses.create("pgd-at(steps=3, eps=0.1)").perturb(network(), x, y, streams(x))
        assert torch.equal(ours, theirs)

    def test_the_students_temperature_is_in_its_weights(self, batch):
        x, _ = batch
        model = network().eval()
        with torch.no_grad():
            before = model(x)
            assert torch.allclose(divided(model, 0.5)(x), before / 0.5, atol=1e-5)
        with pytest.raises(ConfigError, match="Flatten ends in no linear layer; use 1"):
            divided(nn.Flatten(), 2.0)

    def test_both_trainings_are_counted(self, few):
        seen = []
        job = Job(progress=lambda done, total: seen.append((done, total)))
        defenses.create("ltd(steps=1, epochs=2, temperature=0.5)")(network, few, job)
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


class TestAfa:
    def test_without_attacked_images_it_is_ordinary_training(self, few):
        def build():
            return resolve("cnn(width=4)")(10, (1, 8, 8), None)

        plain = attacks.create("standard(epochs=2)")(build, few, Job(seed=1)).state_dict()
        ours = defenses.create("afa(epochs=2, weight=0, clean_share=1)")(build, few, Job(seed=1)).state_dict()
        assert list(ours) == list(plain)
        assert all(torch.equal(value, ours[key]) for key, value in plain.items())

    def test_each_branch_has_the_statistics_of_its_own_images(self, batch):
        x, y = batch
        model, alone = network(), network()
        branch = Branch(model)
        AdaptiveFeatureAlignment(eps=0.2, steps=2).loss(model, branch, model[4], x, y, streams(x)).backward()
        alone(x)
        (twin,) = branch.twins
        assert model[1] is not twin
        assert torch.equal(model[1].running_mean, alone[1].running_mean)
        assert not torch.allclose(twin.running_mean, model[1].running_mean)
        assert model[1].num_batches_tracked == twin.num_batches_tracked == 1
        assert all(parameter.grad is not None for parameter in [*model.parameters(), *branch.parameters()])

    def test_attacked_images_of_no_radius_are_the_clean_ones(self, batch):
        """Both branches are then one, and their features agree."""
        x, y = batch
        model = network()
        branch = Branch(model)
        loss = AdaptiveFeatureAlignment(eps=0.0, steps=1, align=5.0).loss(model, branch, model[4], x, y, streams(x))
        assert loss.item() == pytest.approx(2 * F.cross_entropy(network()(x), y).item(), rel=1e-6)

    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_the_fused_batch_norm_is_the_mean_of_both(self, batch, share):
        x, _ = batch
        model = network().double()
        branch = Branch(model)
        (twin,) = branch.twins
        with torch.no_grad():
            twin.weight.mul_(1.7).add_(0.1)
            twin.bias.sub_(0.4)
            twin.running_mean.add_(0.2)
            twin.running_var.mul_(3)
            between = model[0](x.double())
            expected = share * model.eval()[1](between) + (1 - share) * twin.eval()(between)
            with branch.put_in():
                other = model(x.double())
            branch.fuse(share)
            assert torch.allclose(model[1](between), expected, rtol=0, atol=1e-12)
            if share == 0:
                assert torch.allclose(model(x.double()), other, rtol=0, atol=1e-12)

    def test_a_network_without_batch_norms_is_refused(self):
        with pytest.raises(ConfigError, match="afa doubles batch-norms"):
            Branch(linear())
