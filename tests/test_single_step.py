"""Single-step adversarial training: where its step leads, and when it stops."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bench.dataset import Dataset
from bench.errors import ConfigError
from bench.norms import lp_norm
from bench.protocols import Job
from bench.registry import datasets
from bench.rng import SampleRng
from defenses import early_stopping
from defenses.early_stopping import EarlyStopping
from defenses.fast_at import FastAdversarialTraining
from defenses.n_fgsm import NoiseFGSM


@pytest.fixture(scope="module")
def few() -> Dataset:
    digits = datasets.create("digits")(None)
    return replace(digits, train=digits.train.subset(slice(64)), calibration=digits.calibration.subset(slice(32)))


def linear(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


def uphill(x: torch.Tensor) -> torch.Tensor:
    """The sign of every gradient of class 0 in ``linear(2)``, wherever it is taken."""
    weight = linear(2)[1].weight
    return (weight[1] - weight[0]).sign().view(1, 1, 8, 8).expand_as(x)


def moved(defense, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return defense.perturb(model, x, y, SampleRng.create(0, torch.arange(len(x)), "test")) - x


def test_fast_at_steps_from_noise_and_back_into_the_ball():
    x, y = torch.full((200, 1, 8, 8), 0.5), torch.zeros(200, dtype=torch.int64)
    delta = moved(FastAdversarialTraining(eps=0.1), linear(2), x, y) * uphill(x)
    assert (lp_norm(delta, "linf") <= 0.1 + 1e-6).all()
    # A step of 1.25 from noise uniform in [-1, 1] ends at the ball's edge but for noise below -0.25, in 3/8 of cases.
    assert float((delta < 0.1 - 1e-6).float().mean()) == pytest.approx(3 / 8, abs=0.02)
    assert delta.min() >= 0.025 - 1e-6


def test_n_fgsm_steps_from_wider_noise_and_is_not_projected():
    x, y = torch.full((200, 1, 8, 8), 0.5), torch.zeros(200, dtype=torch.int64)
    delta = moved(NoiseFGSM(eps=0.1), linear(2), x, y) * uphill(x)
    assert delta.mean().item() == pytest.approx(0.1, abs=0.005)
    assert delta.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.05)
    assert 0.29 < delta.max() <= 0.3 + 1e-6
    bright = x + 0.5
    assert (bright + moved(NoiseFGSM(eps=0.1), linear(), bright, y) <= 1).all()


@pytest.mark.parametrize("defense", [FastAdversarialTraining(), NoiseFGSM()])
def test_the_step_goes_by_the_statistics_of_the_batch_and_moves_the_running_ones(defense):
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)).train()
    moved(defense, model, torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64))
    assert int(model[0].num_batches_tracked) == 1
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class TestEarlyStopping:
    def stopping(self, few, accuracies, monkeypatch) -> tuple[EarlyStopping, list[bool], nn.Module]:
        """Early stopping that sees ``accuracies``, what it says of each, and the network, whose bias counts epochs."""
        selection, model, said = EarlyStopping(few, 0.0, Job()), linear().eval(), []
        for epoch, accuracy in enumerate(accuracies):
            right = torch.arange(32) < accuracy * 32
            answers = torch.where(right, selection.y, (selection.y + 1) % 10)
            with torch.no_grad():
                model[1].bias.fill_(epoch)
            monkeypatch.setattr(early_stopping, "pgd", lambda *args: selection.x)
            model.forward = lambda x, answers=answers: nn.functional.one_hot(answers, 10).float()
            said.append(selection(model, epoch))
        return selection, said, model

    def test_it_keeps_the_best_epoch_and_ends_after_a_collapse(self, few, monkeypatch):
        selection, said, model = self.stopping(few, [0.25, 0.5, 0.375, 0.5, 0.25], monkeypatch)
        assert said == [True, True, True, True, False]
        selection.put_back(model)
        assert (model[1].bias == 1).all()

    def test_it_goes_on_from_its_state(self, few, monkeypatch):
        selection, _, model = self.stopping(few, [0.5, 0.375], monkeypatch)
        later = EarlyStopping(few, 0.0, Job())
        later.load_state_dict(selection.state_dict())
        later.put_back(model)
        assert (model[1].bias == 0).all()
        assert later.accuracy == 0.5

    def test_a_data_set_that_holds_no_images_back_is_refused(self, few):
        bare = replace(few, name="mine", calibration=few.calibration.subset(slice(0)))
        with pytest.raises(ConfigError, match="'mine' has no calibration images"):
            FastAdversarialTraining(early_stopping=True)(linear, bare, Job())

    def test_a_training_that_stops_early_says_that_it_is_done(self, few, monkeypatch):
        monkeypatch.setattr(early_stopping, "COLLAPSE", -1.0)
        seen = []
        job = Job(progress=lambda done, total: seen.append((done, total)))
        FastAdversarialTraining(early_stopping=True, epochs=5)(linear, few, job)
        assert seen == [(5, 5)]
