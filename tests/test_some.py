"""Heads and how they teach each other: limits that must coincide, and weights by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.certifiers.smooth import Smooth
from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.models import resolve
from bench.models.heads import Heads, heads_of, logits_of_heads
from bench.protocols import Job
from bench.registry import defenses
from bench.rng import SampleRng
from bench.training import initialised
from defenses.gaussian_training import GaussianTraining
from defenses.some import SmoothedMultiHeadEnsemble, Teaching, easy, overlap, weigh


def network(heads: int = 1, model: str = "cnn") -> nn.Module:
    width = ", width=2" if model == "cnn" else ""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return resolve(f"{model}(heads={heads}{width})")(4, (1, 8, 8), None)


@pytest.fixture
def data() -> Dataset:
    images = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(24) % 4)
    return Dataset("random", tuple("abcd"), train=split, calibration=split, test=split)


def weights(defense, data: Dataset, heads: int = 1) -> dict[str, torch.Tensor]:
    return defense(lambda: network(heads), data, Job()).state_dict()


class TestNetworks:
    @pytest.mark.parametrize("model", ["cnn", "resnet20"])
    def test_it_answers_with_the_sum_of_its_heads(self, model):
        x, whole = torch.rand(3, 1, 8, 8), network(3, model)
        each = logits_of_heads(whole, x)
        assert isinstance(whole, Heads)
        assert each.shape == (3, 3, 4)
        assert torch.equal(whole(x), each.sum(dim=0))
        assert not torch.allclose(each[0], each[1])

    @pytest.mark.parametrize("model", ["cnn", "resnet20"])
    def test_a_head_on_the_beginning_is_the_network_that_it_was_cut_from(self, model):
        x, one, several = torch.rand(3, 1, 8, 8), network(1, model), network(3, model)
        assert torch.allclose(logits_of_heads(several, x)[0], one(x), atol=1e-6)  # the first is drawn first
        size = {count: sum(p.numel() for p in network(count, model).parameters()) for count in (1, 2, 3)}
        assert size[3] - size[2] == size[2] - size[1] == sum(p.numel() for p in heads_of(several)[0].parameters())

    def test_numbers_that_are_no_number_of_heads_are_refused(self):
        with pytest.raises(ConfigError, match="heads is 0"):
            resolve("cnn(heads=0)")


class TestWeights:
    def test_easy_falls_from_chance_to_the_last_value(self):
        assert easy(0, 150, 10, 0.8) == pytest.approx(math.log(10))
        assert easy(149, 150, 10, 0.8) == pytest.approx(0.8)
        middle = easy(50, 101, 10, 0.8)
        assert 10**-middle == pytest.approx((10 ** -math.log(10) + 10**-0.8) / 2)
        assert easy(0, 1, 10, 0.8) == pytest.approx(math.log(10))

    def test_the_head_before_says_what_is_easy_and_the_head_itself_how_hard_it_is(self):
        losses = torch.tensor([[0.2, 3.0], [2.0, 0.1], [0.3, 0.4]])  # (heads, samples)
        found = weigh(losses, 1.0)
        hard = [(1 + math.exp(-1)) / (1 + math.exp(loss - 1)) for loss in (0.1, 0.3)]
        assert torch.allclose(found, torch.tensor([[1, 1], [1, hard[0]], [hard[1], 1]]))
        assert (weigh(torch.tensor([[5.0], [4.0]]), 1.0) < 0.2).all()

    def test_overlap_is_nothing_of_heads_at_right_angles_and_one_for_each_pair_alike(self):
        across = [nn.Linear(2, 1, bias=False) for _ in range(2)]
        with torch.no_grad():
            across[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
            across[1].weight.copy_(torch.tensor([[-2.0, 1.0]]))
        assert overlap(across).item() == pytest.approx(0, abs=1e-6)
        assert overlap([across[0]] * 3).item() == pytest.approx(3, abs=1e-5)


class TestTraining:
    def test_with_one_head_one_copy_and_equal_weights_it_is_gaussian_training_bit_for_bit(self, data):
        given = {"sigma": 0.5, "epochs": 2, "batch_size": 8}
        some = weights(SmoothedMultiHeadEnsemble(**given, copies=1, weighting="none"), data)
        plain = weights(GaussianTraining(**given), data)
        assert all(torch.equal(some[name], value) for name, value in plain.items())

    def test_its_loss_is_that_of_a_plain_loop(self, data):
        some, model, count = SmoothedMultiHeadEnsemble(sigma=0.5, copies=2, last=0.5), network(3).train(), 6
        x, y = data.train.pixels(slice(count)), data.train.labels[:count]
        rng = SampleRng.create(0, torch.arange(count), "test")
        teaching = Teaching(some, 4, 10)
        teaching.begin(9)
        (found,) = teaching.losses(model, x, y, rng)

        both = torch.cat([x + 0.5 * rng.fork(copy).normal(1, 8, 8) for copy in range(2)])
        logits = model.each(both).detach().double()
        expected = 0.0
        smoothed = [[sum(-logits[h, c * count + n].log_softmax(0)[y[n]].item() for c in range(2)) / 2
                     for n in range(count)] for h in range(3)]  # fmt: skip
        for h in range(3):
            for n in range(count):
                loss = smoothed[h][n]
                hard = (1 + math.exp(-0.5)) / (1 + math.exp(loss - 0.5))
                expected += (1.0 if smoothed[h - 1][n] <= 0.5 else hard) * loss / (3 * count)
        flat = [torch.cat([p.detach().double().flatten() for p in head.parameters()]) for head in model.heads]
        unit = [each / each.norm() for each in flat]
        expected += sum(float(unit[i] @ unit[j]) ** 2 for i in range(3) for j in range(i))
        assert found.item() == pytest.approx(expected, rel=1e-5)

    def test_heads_are_pressed_apart_where_they_are_told_to(self, data):
        few = SmoothedMultiHeadEnsemble(sigma=0.25, epochs=6, batch_size=8, lr=0.02)

        def met(apart: float) -> float:
            model = initialised(lambda: network(2), Job())
            model.heads[1].load_state_dict(model.heads[0].state_dict())  # which overlap wholly, to begin with
            with torch.no_grad():
                for value in model.heads[1].parameters():
                    value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
            trained = replace(few, apart=apart)(lambda: model, data, Job())
            return overlap(heads_of(trained)).item()

        assert met(1.0) < 0.8 * met(0.0)

    def test_what_is_certified_is_the_sum_of_its_heads(self, data):
        model, x = network(3), data.test.pixels(slice(2))
        rng = SampleRng.create(0, torch.arange(2), "test")
        summed = Smooth(sigma=0.25, n=100)(lambda images: logits_of_heads(model, images).sum(dim=0), x, rng, 64)
        assert torch.equal(Smooth(sigma=0.25, n=100)(model, x, rng, 64).votes, summed.votes)

    def test_it_is_in_the_registry_with_what_the_paper_says(self):
        assert defenses.create("some(sigma=0.5)").last == 0.8
        assert defenses.create("some(sigma=0.25, last=1.2)").recipe is None
