"""The training loop: it learns, repeats under a seed, and augments what it should."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from attacks.learners.standard import Standard
from bench.data.digits import Digits
from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.measure.learned import learn_released
from bench.norms import lp_norm
from bench.plan.suite import load_suite
from bench.plan.tasks import Loader, expand
from bench.protocols import Job, Learner
from bench.registry import describe
from bench.rng import SampleRng
from bench.training import Recipe, augment, fit, frozen, initialised
from defenses.pgd_at import PGDAdversarialTraining


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return Digits()(None)


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )


def accuracy(model: nn.Module, data: Dataset) -> float:
    with torch.no_grad():
        return (model(data.test.pixels()).argmax(1) == data.test.labels).float().mean().item()


def rng_for(count: int) -> SampleRng:
    return SampleRng.create(0, torch.arange(count), "test")


def test_the_standard_learner_masters_digits_and_reports_progress(digits):
    seen = []
    learner = Standard()
    model = learner(small_cnn, digits, Job(progress=lambda done, total: seen.append((done, total))))

    assert isinstance(learner, Learner)
    assert accuracy(model, digits) >= 0.95
    assert not model.training
    assert seen == [(epoch, 30) for epoch in range(1, 31)]


def test_a_seed_decides_the_weights_whatever_the_global_generator(digits):
    def weights(seed: int) -> torch.Tensor:
        torch.rand(3)  # moves the global generator
        model = Standard(epochs=1)(lambda: nn.Sequential(small_cnn(), nn.Dropout(0.5)), digits, Job(seed=seed))
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_training_leaves_the_global_generator_alone(digits):
    before = torch.get_rng_state()
    Standard(epochs=1)(small_cnn, digits, Job())
    assert torch.equal(torch.get_rng_state(), before)


def test_every_sample_is_seen_once_in_an_epoch(digits):
    seen = []

    def note(model, x, y, rng):
        seen.append(x)
        return x

    recipe = Recipe.for_dataset(digits, epochs=1, batch_size=333)
    fit(initialised(small_cnn, Job()), digits, recipe, Job(), perturb=note)
    sizes = [len(x) for x in seen]
    assert max(sizes) <= 333
    assert max(sizes) - min(sizes) <= 1
    rows = torch.cat(seen).flatten(1)
    assert torch.equal(rows.sort(dim=0).values, digits.train.pixels().flatten(1).sort(dim=0).values)


def test_steps_may_round_as_a_gpu_likes_and_what_watches_them_may_not(digits):
    seen = {}

    def perturb(model, x, y, rng):
        seen["step"] = torch.backends.cudnn.allow_tf32
        return x

    def watch(model, epoch):
        seen["watch"] = torch.backends.cudnn.allow_tf32

    few = replace(digits, train=digits.train.subset(slice(0, 64)))
    fit(small_cnn(), few, Recipe.for_dataset(few, epochs=1), Job(watch=watch), perturb=perturb)
    assert seen == {"step": True, "watch": False}


def test_a_data_set_without_training_images_is_named(digits):
    empty = replace(digits, name="mine", train=digits.train.subset(slice(0)))
    with pytest.raises(ConfigError, match="'mine' has no training images"):
        Standard()(small_cnn, empty, Job())


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"shift": -1}])
def test_impossible_recipes_are_refused(digits, change):
    with pytest.raises(ConfigError):
        replace(Recipe.for_dataset(digits), **change)


def test_the_default_recipe_follows_the_data_set(digits):
    assert Recipe.for_dataset(digits).optimizer == "adam"
    colour = replace(digits, train=replace(digits.train, images=torch.zeros(1000, 3, 32, 32)), flip=True, shift=4)
    recipe = Recipe.for_dataset(colour, epochs=None, lr=0.2)
    assert (recipe.optimizer, recipe.flip, recipe.shift, recipe.lr) == ("sgd", True, 4, 0.2)


@pytest.mark.parametrize(
    ("name", "epochs", "batch_size", "falls"), [("sep", 120, 128, (75, 90)), ("ops", 200, 256, (100, 150))]
)
def test_a_published_recipe_has_plain_momentum_and_a_tenth_of_the_rate_at_two_epochs(
    digits, name, epochs, batch_size, falls
):
    colour = replace(digits, train=replace(digits.train, images=torch.zeros(1000, 3, 32, 32)), flip=True, shift=4)
    recipe = Recipe.for_dataset(colour, name, epochs=None)
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.weight_decay) == (epochs, batch_size, 0.1, 5e-4)
    assert (recipe.momentum, recipe.nesterov, recipe.flip, recipe.shift) == (0.9, False, True, 4)
    rates = [recipe.rate(epoch / epochs) for epoch in range(1, epochs)]
    assert [epoch + 1 for epoch in range(1, epochs - 1) if rates[epoch] < rates[epoch - 1]] == list(falls)
    assert rates[-1] == pytest.approx(0.01)


def test_a_learner_takes_the_recipe_that_is_named_and_arguments_win(digits):
    few = replace(digits, train=digits.train.subset(slice(64)))
    named = Standard(recipe="ops", epochs=1, batch_size=32, lr=0.01)(small_cnn, few, Job())
    by_hand = fit(
        initialised(small_cnn, Job()), few, Recipe.for_dataset(few, "ops", epochs=1, batch_size=32, lr=0.01), Job()
    )
    for ours, theirs in zip(named.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "recipe" not in describe(Standard())  # keys of stored rows hold


def test_schedules_end_low_and_never_exceed_the_highest_rate(digits):
    for schedule, last in (("cosine", 0.0), ("one-cycle", 0.0), ("steps", 0.01)):
        rates = [replace(Recipe.for_dataset(digits), schedule=schedule).rate(step / 100) for step in range(101)]
        assert max(rates) == 1
        assert min(rates) >= 0
        assert rates[-1] == pytest.approx(last)


def test_augmentation_is_a_crop_of_the_padded_image_or_its_mirror():
    x = torch.rand(64, 3, 5, 6)
    moved = augment(x, flip=True, shift=2, rng=rng_for(64))
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    seen = set()
    for image, out in zip(padded, moved, strict=True):
        crops = {
            (down, right, mirror): image[:, down : down + 5, right : right + 6].flip([2] if mirror else [])
            for down in range(5) for right in range(5) for mirror in (False, True)
        }
        matches = [key for key, crop in crops.items() if torch.equal(crop, out)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 20  # of 50, each equally likely
    assert torch.equal(augment(x, flip=False, shift=0, rng=rng_for(64)), x)


def test_augmentation_of_a_sample_does_not_depend_on_its_batch():
    x, rng, rows = torch.rand(8, 1, 4, 4), rng_for(8), torch.tensor([5, 2])
    assert torch.equal(augment(x, True, 1, rng)[rows], augment(x[rows], True, 1, rng[rows]))


def test_frozen_puts_back_what_it_found():
    model = small_cnn().train()
    model[0].weight.requires_grad_(False)
    with frozen(model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert model[1].training
    assert [parameter.requires_grad for parameter in model.parameters()] == [False] + [True] * 9


def test_the_inner_attack_reaches_the_corner_of_the_ball_on_a_linear_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).train()
    x, y = torch.full((5, 3, 2, 2), 0.5), torch.tensor([0, 1, 0, 1, 1])
    x_adv = PGDAdversarialTraining(eps=0.1).perturb(model, x, y, rng_for(5))

    uphill = (model[1].weight[1 - y] - model[1].weight[y]).sign().view_as(x)  # exact: the loss is monotone in it
    assert torch.allclose(x_adv, x + 0.1 * uphill)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def started(x: torch.Tensor, **settings) -> torch.Tensor:
    """Where the inner attack starts from ``x``: there is no gradient, so that is what comes back."""
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
    nn.init.zeros_(flat[1].weight)
    adversary = PGDAdversarialTraining(eps=0.1, **settings)
    return adversary.perturb(flat, x, torch.zeros(len(x), dtype=torch.int64), rng_for(len(x))) - x


def test_the_inner_attack_starts_uniformly_in_the_ball_and_box():
    x = torch.full((4, 3, 16, 16), 0.5)
    x[0] = 0
    delta = started(x)
    assert (lp_norm(delta, "linf") <= 0.1 + 1e-7).all()
    assert delta[0].min() >= 0
    n = delta[1:].numel()
    assert delta[1:].mean().abs() < 4 * 0.1 / (3 * n) ** 0.5  # deviation of a uniform value: eps / sqrt(3)
    assert delta[1:].std().item() == pytest.approx(0.1 / 3**0.5, rel=4 / n**0.5)


def test_the_inner_attack_may_start_from_normal_noise():
    delta = started(torch.full((4, 3, 16, 16), 0.5), start="gaussian", rel_step=0.2)
    n = delta.numel()  # the ball cuts at five deviations of 0.02
    assert delta.mean().abs() < 4 * 0.02 / n**0.5
    assert delta.std().item() == pytest.approx(0.02, rel=4 / (2 * n) ** 0.5)
    assert (lp_norm(delta, "linf") <= 0.1 + 1e-7).all()


def test_adversarial_training_holds_where_standard_training_falls(digits):
    eps = 0.15
    adversary = PGDAdversarialTraining(eps=eps, epochs=10)
    accuracies = {}
    for name, learner in (("standard", Standard(epochs=10)), ("pgd-at", adversary)):
        model = learner(small_cnn, digits, Job())
        attacked = adversary.perturb(model, digits.test.pixels(), digits.test.labels, rng_for(500))
        with torch.no_grad():
            robust = (model(attacked).argmax(1) == digits.test.labels).float().mean().item()
        accuracies[name] = accuracy(model, digits), robust

    assert accuracies["pgd-at"][0] > 0.9
    assert accuracies["pgd-at"][1] > accuracies["standard"][1] + 0.1


class TestWatch:
    def test_it_sees_every_epoch_in_eval_mode_and_leaves_training_as_it_was(self, digits):
        def build() -> nn.Module:
            return nn.Sequential(small_cnn(), nn.Dropout(0.5))

        seen = []

        def watch(model: nn.Module, epoch: int) -> None:
            torch.rand(7)
            seen.append((epoch, any(module.training for module in model.modules()), accuracy(model, digits)))

        plain = Standard(epochs=3)(build, digits, Job())
        observed = Standard(epochs=3)(build, digits, Job(watch=watch))
        assert [(epoch, training) for epoch, training, _ in seen] == [(0, False), (1, False), (2, False)]
        assert seen[-1][2] == accuracy(plain, digits)
        for one, other in zip(plain.state_dict().values(), observed.state_dict().values(), strict=True):
            assert torch.equal(one, other)

    def test_the_result_of_a_learner_holds_its_last_and_its_peak_test_accuracy(self):
        class Fading:
            """Shows networks that are right on 1, 3, 3 and 2 of 4 images, and returns the last."""

            def __call__(self, build, data, job):
                for epoch, right in enumerate((1, 3, 3, 2)):
                    job.watch(Answers(right), epoch)
                return Answers(right)

        class Answers(nn.Module):
            def __init__(self, right: int) -> None:
                super().__init__()
                self.right = right

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                wrong = torch.arange(len(x)) >= self.right
                return torch.eye(2)[wrong.long()]

        split = Split(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
        data = Dataset("four", ("a", "b"), split, split, split)
        asked = {"dataset": "digits", "model": "cnn", "attack": "standard", "n": 4}
        (task,) = expand(load_suite(None, asked), Loader(None, None))
        measured = learn_released(replace(task, data=data, attack=Fading()), data, [0, 1, 2, 3], Job(), small_cnn)
        figures = {name: measured.figures[name] for name in measured.figures if "test" in name or "epoch" in name}
        assert figures == {"last_test_accuracy": 0.5, "peak_test_accuracy": 0.75, "peak_epoch": 2.0}


class TestMixedLabels:
    def test_whole_shares_train_as_labels_do(self, digits):
        recipe = Recipe.for_dataset(digits, epochs=1)
        plain = fit(initialised(small_cnn, Job()), digits, recipe, Job())
        mixed = fit(initialised(small_cnn, Job()), digits, recipe, Job(), mix=lambda x, shares, rng: (x, shares))
        for one, other in zip(plain.parameters(), mixed.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-3)

    def test_every_hook_acts_on_what_the_one_before_left(self, digits):
        def add(model, x, y, rng):
            assert (x <= 0.5).all()
            return x + 1

        def mix(x, shares, rng):
            assert (x >= 1).all()
            assert torch.equal(shares.sum(1), torch.ones(len(x)))
            return x, shares

        recipe = Recipe.for_dataset(digits, epochs=1, batch_size=500)
        fit(initialised(small_cnn, Job()), digits, recipe, Job(), perturb=add, prepare=lambda x: x / 2, mix=mix)

    def test_a_hook_may_change_over_the_epochs(self, digits):
        seen = []

        def at(epoch):
            def perturb(model, x, y, rng):
                seen.append(epoch)
                return x

            return perturb

        fit(initialised(small_cnn, Job()), digits, Recipe.for_dataset(digits, epochs=3, batch_size=2000), Job(),
            perturb_at=at)  # fmt: skip
        assert seen == [0, 1, 2]
