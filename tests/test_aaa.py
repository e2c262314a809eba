"""AAA: decisions stay, the closed form is optimal, and rows know nothing of each other."""

import math

import pytest
import torch
from torch import Tensor, nn

from bench.dataset import Split
from bench.errors import ConfigError
from bench.metrics import calibration_error
from bench.registry import defenses
from defenses.aaa import (
    RELEASED_BATCH,
    TIE_BREAK,
    AAALinear,
    AAASine,
    adam_logits,
    attractor,
    exact_logits,
    exact_optimum,
    linear_target,
    secret_offset,
    sine_target,
    top_confidence,
    top_margin,
    tuned_temperature,
)

BETA = 5.0
NOTHING = Split(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64))


class Scores(nn.Module):
    """A classifier whose images are its logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def random_logits(rows: int, classes: int, seed: int = 0) -> Tensor:
    """Rows of every kind of margin: noise of deviation 2, and one class ahead by up to 14."""
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=rng)
    ahead = torch.randint(classes, (rows, 1), generator=rng)
    return logits.scatter_add_(1, ahead, 14 * torch.rand(rows, 1, generator=rng))


def targets(logits: Tensor, interval: float = 6.0, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    return linear_target(top_margin(logits), interval, 1.0), top_confidence(logits, temperature)


def solve(logits: Tensor, **settings: float) -> Tensor:
    return exact_logits(logits, *targets(logits, **settings), BETA)


def loss(out: Tensor, best: Tensor, margin: Tensor, confidence: Tensor) -> Tensor:
    reached = out.double().softmax(1).gather(1, best[:, None]).squeeze(1)
    return (top_margin(out) - margin).abs() + BETA * (reached - confidence).abs()


# --- targets


def test_the_attractor_is_the_centre_of_its_interval_left_border_included():
    margins = torch.tensor([0.0, 2.0, 5.99, 6.0, 11.99, 12.0], dtype=torch.float64)
    assert attractor(margins, 6.0).tolist() == [3, 3, 3, 9, 9, 15]


def test_the_linear_target_mirrors_inside_an_interval():
    margins = torch.linspace(0.01, 5.99, 100, dtype=torch.float64)
    mirrored = linear_target(margins, 6.0, 1.0)
    assert ((mirrored > 0) & (mirrored < 6)).all()
    torch.testing.assert_close(linear_target(mirrored, 6.0, 1.0), margins)


@pytest.mark.parametrize("step", [0.5, 1.0, 2.0])
def test_the_linear_target_falls_with_slope_minus_alpha(step):
    margins = torch.linspace(6.0, 11.9, 60, dtype=torch.float64)
    slope = linear_target(margins, 6.0, step).diff() / margins.diff()
    torch.testing.assert_close(slope, torch.full_like(slope, -step))


# Where the slope 1 - 1.4 pi cos(2 pi u) of the target changes its sign.
TURN = math.acos(1 / (1.4 * math.pi)) / (2 * math.pi)
INSIDE = torch.linspace(-0.5, 0.5, 100_001, dtype=torch.float64)[1:-1]  # distances to an attractor, in intervals


def test_the_sine_target_stays_in_its_interval_and_turns_just_inside_its_ends():
    first = sine_target(6 * (INSIDE + 0.5), 6.0, 0.7) / 6
    assert ((first > 0) & (first < 1)).all()
    turns = sine_target(6 * torch.tensor([0.5 - TURN, 0.5 + TURN], dtype=torch.float64), 6.0, 0.7) / 6
    assert turns.tolist() == pytest.approx([0.968, 0.032], abs=5e-4)
    bent = first[INSIDE.abs() <= TURN]
    assert bent.max().item() == pytest.approx(turns[0].item(), abs=1e-6)
    assert bent.min().item() == pytest.approx(turns[1].item(), abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1.0, 4.7])
def test_the_sine_target_bends_and_never_jumps(shift):
    margins = torch.linspace(0, 20, 200_001, dtype=torch.float64)
    target = sine_target(margins, 6.0, 0.7, shift)
    slope = target.diff() / margins.diff()
    assert slope.min().item() == pytest.approx(1 - 1.4 * math.pi, abs=1e-3)  # at the attractors
    assert slope.max().item() == pytest.approx(1 + 1.4 * math.pi, abs=1e-3)  # at the borders, where others jump
    assert (target[1:] > 0).all()
    borders = shift + 6.0 * torch.arange(3, dtype=torch.float64)
    torch.testing.assert_close(sine_target(borders, 6.0, 0.7, shift), borders, rtol=1e-12, atol=1e-12)


def test_the_sine_target_turns_the_trend_of_less_than_half_and_the_side_of_four_fifths():
    target = sine_target(6 + 6 * (INSIDE + 0.5), 6.0, 0.7)
    falls = (target.diff() < 0).double().mean().item()
    assert falls == pytest.approx(2 * TURN, abs=1e-4)
    assert falls == pytest.approx(0.427, abs=1e-3)
    flipped = ((target - 9) * INSIDE < 0).double().mean().item()
    assert flipped == pytest.approx(0.805, abs=1e-3)


def test_a_sine_of_no_amplitude_is_the_identity():
    margins = torch.linspace(0, 20, 100, dtype=torch.float64)
    assert torch.equal(sine_target(margins, 6.0, 0.0, 2.5), margins)


@pytest.mark.parametrize("interval", [0.1, 4.0, 6.0])
def test_no_offset_is_the_plain_grid_bit_for_bit(interval):
    margins = top_margin(random_logits(100_000, 10))
    plain = (torch.floor(margins / interval) + 0.5) * interval
    assert torch.equal(attractor(margins, interval, 0.0), plain)
    assert torch.equal(linear_target(margins, interval, 1.3, 0.0), plain - 1.3 * (margins - plain))


def test_an_offset_moves_every_border_and_leaves_one_short_interval():
    margins = torch.tensor([0.0, 1.99, 2.0, 7.99, 8.0, 13.99], dtype=torch.float64)
    assert attractor(margins, 6.0, 2.0).tolist() == [1, 1, 5, 5, 11, 11]
    inside = torch.linspace(0.01, 1.99, 100, dtype=torch.float64)
    mirrored = linear_target(inside, 6.0, 1.0, 2.0)
    assert ((mirrored > 0) & (mirrored < 2)).all()
    torch.testing.assert_close(linear_target(mirrored, 6.0, 1.0, 2.0), inside)


def test_secret_offsets_follow_the_seed_and_fill_the_interval():
    offsets = torch.tensor([secret_offset(seed, 6.0) for seed in range(400)], dtype=torch.float64)
    assert secret_offset(7, 6.0) == offsets[7].item()
    assert ((offsets >= 0) & (offsets < 6)).all()
    assert offsets.mean().item() == pytest.approx(3, abs=4 * 6 / 12**0.5 / 400**0.5)
    assert len(offsets.unique()) == 400


# --- the exact solver


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000])
def test_no_decision_changes(classes, dtype):
    rows = 1_000_000 // max(classes, 10) if dtype == torch.float32 else 1_000
    logits = random_logits(rows, classes).to(dtype)
    out = solve(logits)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert torch.equal(out.argmax(1), logits.argmax(1))  # the first of several best, where there are
    best, second = out.topk(2, dim=1).values.unbind(1)
    assert (best > second).all()


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0, 5.0, 50.0])
def test_no_point_of_a_fine_grid_is_better_than_the_optimum(classes, beta):
    rng = torch.Generator().manual_seed(0)
    margin = 16 * torch.rand(100, generator=rng, dtype=torch.float64) - 4
    confidence = (10 * torch.randn(100, generator=rng, dtype=torch.float64)).sigmoid()
    found, reached = exact_optimum(margin, confidence, beta, classes)

    grid = torch.linspace(0, 20, 20_001, dtype=torch.float64)[:, None]
    low, high = (grid - math.log(classes - 1)).sigmoid(), grid.sigmoid()
    violation = torch.maximum((low - confidence).clamp(min=0), (confidence - high).clamp(min=0))
    on_grid = ((grid - margin).abs() + beta * violation).amin(dim=0)
    value = (found - margin).abs() + beta * (reached - confidence).abs()

    assert (found >= 0).all()
    assert (value <= on_grid + 1e-9).all()
    assert (value >= on_grid - 1e-3 * (1 + beta / 4)).all()  # of a grid step: the objective's slope
    assert ((reached >= (found - math.log(classes - 1)).sigmoid()) & (reached <= found.sigmoid())).all()


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_the_logits_attain_the_optimal_margin_and_confidence(classes):
    logits = random_logits(2_000, classes).double()
    margin, confidence = targets(logits)
    out = exact_logits(logits, margin, confidence, BETA)
    best = logits.argmax(1)
    wanted_margin, wanted_confidence = exact_optimum(margin, confidence, BETA, classes)
    torch.testing.assert_close(top_margin(out), wanted_margin, rtol=0, atol=1e-5)
    reached = out.softmax(1).gather(1, best[:, None]).squeeze(1)
    # At the end of the range all classes would be level; keeping them apart costs what their tie break adds up to.
    ends = wanted_confidence <= (wanted_margin - math.log(classes - 1)).sigmoid() + 1e-4
    torch.testing.assert_close(reached[~ends], wanted_confidence[~ends], rtol=0, atol=1e-6)
    torch.testing.assert_close(reached[ends], wanted_confidence[ends], rtol=0, atol=50 * TIE_BREAK / 4)
    torch.testing.assert_close(out.logsumexp(1), torch.zeros(2_000, dtype=torch.float64))


def test_no_two_classes_tie_so_that_a_gradient_has_one_runner_up():
    for classes in (10, 100):
        logits = random_logits(1_000, classes)
        out = exact_logits(logits, *targets(logits), BETA)
        runners_up = out.topk(3, dim=1).values
        assert (runners_up[:, 1] > runners_up[:, 2]).all()


def test_the_order_of_all_classes_stays():
    logits = random_logits(1_000, 10).double()
    ranked = solve(logits).gather(1, logits.argsort(dim=1, descending=True))
    assert (ranked.diff(dim=1) <= 0).all()


def test_rows_are_bit_equal_in_any_batch():
    logits = random_logits(333, 10)
    together = solve(logits)
    assert torch.equal(torch.cat([solve(part) for part in logits.split(7)]), together)
    assert torch.equal(solve(logits.flip(0)).flip(0), together)


def test_permuted_classes_give_the_permuted_answer():
    logits = random_logits(500, 10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(solve(logits[:, order]), solve(logits)[:, order])


def test_a_constant_added_to_all_logits_changes_nothing():
    logits = random_logits(500, 10).double()
    torch.testing.assert_close(solve(logits + 100), solve(logits))


def test_the_identity_target_returns_the_margin_and_confidence():
    logits = random_logits(500, 10).double()
    margin = linear_target(top_margin(logits), 6.0, -1.0)
    out = exact_logits(logits, margin, top_confidence(logits, 1.0), BETA)
    torch.testing.assert_close(top_margin(out), top_margin(logits))
    torch.testing.assert_close(top_confidence(out, 1.0), top_confidence(logits, 1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("lead", [0.0, 1e-7, 6.0, 12.0, 40.0, 1e4, 1e30])
@pytest.mark.parametrize("others", ["level", "far"])
def test_border_cases_keep_the_decision_and_stay_finite(classes, lead, others):
    logits = torch.zeros(1, classes)
    logits[0, 1] = lead
    logits[0, 2:] = 0.0 if others == "level" else -1e5
    out = solve(logits)
    assert out.isfinite().all()
    assert out.argmax(1) == logits.argmax(1)
    assert (out[0] == out[0].max()).sum() == 1


def test_a_confidence_of_one_is_no_trouble():
    logits = random_logits(100, 10)
    out = exact_logits(logits, targets(logits)[0], torch.ones(100, dtype=torch.float64), BETA)
    assert out.isfinite().all()
    assert torch.equal(out.argmax(1), logits.argmax(1))


@pytest.mark.parametrize("wanted", [-1e30, -12.0, -1e-9, 0.0, 50.0, 1e30])
def test_a_target_that_no_margin_attains_costs_no_decision(wanted):
    logits = random_logits(1_000, 10)
    confidence = top_confidence(logits, 1.0)
    out = exact_logits(logits, torch.full((1_000,), wanted, dtype=torch.float64), confidence, BETA)
    assert out.isfinite().all()
    assert torch.equal(out.argmax(1), logits.argmax(1))
    level = exact_logits(logits, torch.zeros(1_000, dtype=torch.float64), confidence, BETA)
    if wanted <= 0:  # below zero all targets are alike
        torch.testing.assert_close(out, level)


@pytest.mark.parametrize("form", ["aaa-linear(step=2)", "aaa-sine", "aaa-sine(amplitude=3)"])
@pytest.mark.parametrize("offset", ["0", "1.5", "secret"])
def test_no_form_and_no_offset_changes_a_decision(form, offset):
    logits = random_logits(20_000, 10)
    form = f"{form.removesuffix(')')}{', ' if '(' in form else '('}offset={offset})"
    out = defenses.create(form)(Scores(), NOTHING, 3)(logits[:, None, None])
    assert out.isfinite().all()
    assert torch.equal(out.argmax(1), logits.argmax(1))


# --- against the released solver


def autograd_adam(logits: Tensor, margin: Tensor, confidence: Tensor) -> Tensor:
    """The released loop in its own words: torch's Adam on the mean loss of one batch."""
    best = logits.argmax(1, keepdim=True)
    z = logits.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(100):
        top = z.topk(2, dim=1).values
        gap = (top[:, 0] - top[:, 1] - margin).abs().mean()
        calibration = (z.softmax(1).gather(1, best).squeeze(1) - confidence).abs().mean()
        optimizer.zero_grad()
        (gap + BETA * calibration).backward()
        optimizer.step()
    return z.detach()


def test_adam_follows_torch_and_autograd():
    logits = random_logits(RELEASED_BATCH, 10)
    margin, confidence = (target.float() for target in targets(logits))
    gap = (adam_logits(logits, margin, confidence, BETA) - autograd_adam(logits, margin, confidence)).abs().amax(1)
    # Near its goal the loss has kinks, where rounding decides a sign: such a row may end a step or two elsewhere.
    assert (gap < 1e-4).float().mean() > 0.9
    assert gap.max() < 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.87, 2.08])
def test_the_released_solver_takes_its_targets_from_its_own_numbers(temperature):
    """At temperature 1 the target confidence is where Adam starts: a difference in rounding is a step of 0.1."""
    logits = random_logits(RELEASED_BATCH, 10)
    best, second = logits.topk(2, dim=1).values.unbind(1)
    margin = linear_target(best - second, 6.0, 1.0)
    confidence = (logits / temperature).softmax(1).amax(1)
    defense = defenses.create(f"aaa-linear(solver=as-released, temperature={temperature})")
    gap = (defense(Scores(), NOTHING, 0)(logits) - autograd_adam(logits, margin, confidence)).abs().amax(1)
    assert (gap < 1e-3).float().mean() > 0.95
    assert gap.max() < 0.5
    assert defense.version == 2
    assert defenses.create("aaa-linear").version == 1  # the exact solver answers as it did


def test_adam_rows_do_not_depend_on_their_batch():
    logits = random_logits(60, 10)
    margin, confidence = targets(logits)
    together = adam_logits(logits, margin, confidence, BETA)
    alone = torch.cat([adam_logits(logits[i : i + 1], margin[i : i + 1], confidence[i : i + 1], BETA)
                       for i in range(60)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("classes", "interval", "temperature"), [(10, 4, 1), (10, 6, 1), (10, 6, 2.08), (1000, 6, 1.2)]
)
def test_the_exact_solution_beats_adam_wherever_adam_kept_the_decision(classes, interval, temperature):
    logits = random_logits(200, classes)
    margin, confidence = targets(logits, interval, temperature)
    best = logits.argmax(1)
    adam = adam_logits(logits, margin, confidence, BETA)
    kept = adam.argmax(1) == best
    assert kept.float().mean() > 0.9
    exact_loss = loss(exact_logits(logits, margin, confidence, BETA), best, margin, confidence)
    assert (exact_loss <= loss(adam, best, margin, confidence) + 1e-5)[kept].all()


# --- the defense


def test_the_served_model_lets_the_gradient_of_the_network_through():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    served = AAALinear()(network, NOTHING, 0)
    x = torch.rand(5, 3, 2, 2, requires_grad=True)
    weights = torch.randn(5, 10)
    (through,) = torch.autograd.grad((served(x) * weights).sum(), x)
    (plain,) = torch.autograd.grad((network(x) * weights).sum(), x)
    assert torch.equal(through, plain)
    assert not torch.equal(served(x), network(x))


@pytest.mark.parametrize("solver", ["exact", "as-released"])
def test_a_step_towards_the_border_is_reported_as_a_step_away(solver):
    # Many classes below leave room for every confidence, so the margin goes where it should.
    images = torch.zeros(20, 1, 1, 1000)
    images[:, 0, 0, 0] = torch.linspace(8, 11, 20)
    images[:, 0, 0, 1] = 1.0
    reported = top_margin(defenses.create(f"aaa-linear(interval=12,solver={solver})")(Scores(), NOTHING, 0)(images))
    assert reported[0] > reported[-1] + 2.8  # the last steps of Adam, of 0.1, go to and fro


def test_knowing_the_interval_undoes_the_mirror_unless_the_offset_is_secret():
    # Of 1,000 classes, at intervals of 4, nearly every margin and confidence go together.
    logits = random_logits(2_000, 1_000)
    true = top_margin(logits)

    def recovered(offset: float | str) -> Tensor:
        served = AAALinear(interval=4.0, offset=offset)(Scores(), NOTHING, 1)
        return linear_target(top_margin(served(logits[:, None, None])), 4.0, 1.0)

    assert ((recovered(0.0) - true).abs() < 1e-3).double().mean() > 0.9
    assert ((recovered("secret") - true).abs() < 1e-3).double().mean() < 0.05


@pytest.mark.parametrize("form", [AAALinear, AAASine])
def test_a_secret_offset_is_one_for_each_deployment(form):
    logits = random_logits(100, 10)[:, None, None]

    def answers(seed: int) -> Tensor:
        return form(offset="secret")(Scores(), NOTHING, seed)(logits)

    assert torch.equal(answers(1), answers(1))
    assert not torch.equal(answers(1), answers(2))
    assert torch.equal(form(offset=secret_offset(1, 6.0))(Scores(), NOTHING, 0)(logits), answers(1))


def calibration_split(count: int) -> Split:
    """Overconfident logits, scaled to fit in [0, 1]: labels follow a softmax at twice the temperature of ``Sharp``."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 10, generator=rng)
    labels = (1.5 * logits).softmax(1).multinomial(1, generator=rng).squeeze(1)
    return Split(((logits + 6) / 12).clamp(0, 1)[:, None, None], labels)


class Sharp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * (12 * x.flatten(1) - 6)


def test_a_tuned_temperature_lowers_the_calibration_error_of_what_is_served():
    split = calibration_split(2_000)
    correct = Sharp()(split.pixels()).argmax(1) == split.labels

    def error(model: nn.Module) -> float:
        return calibration_error(top_confidence(model(split.pixels()), 1.0).numpy(), correct.numpy())

    # Wide intervals force large margins, and those a high confidence, on classes as close as these.
    for interval in (6.0, 1.0):
        tuned = AAALinear(temperature="tuned", interval=interval)(Sharp(), split, 0)
        assert error(tuned) <= error(AAALinear(interval=interval)(Sharp(), split, 0)) + 1e-6
    assert error(tuned) < error(Sharp()) / 2


def test_tuning_uses_the_confidence_that_is_served():
    split = calibration_split(500)
    logits = Sharp()(split.pixels())
    margin = linear_target(top_margin(logits), 6.0, 1.0)
    temperature = tuned_temperature(logits, split.labels, lambda given: linear_target(given, 6.0, 1.0), BETA)
    wanted = top_confidence(logits, temperature)
    _, predicted = exact_optimum(margin, wanted, BETA, 10)
    served = top_confidence(exact_logits(logits, margin, wanted, BETA), 1.0)
    torch.testing.assert_close(served, predicted, rtol=0, atol=1e-5)


def test_settings_that_cannot_be_meant_are_refused():
    shared = ("interval=0", "temperature=0", "temperature=warm", "calibration_weight=-1", "solver=newton")
    for text in (*shared, "offset=6", "offset=-1", "offset=hidden"):
        for form in ("aaa-linear", "aaa-sine"):
            with pytest.raises(ConfigError):
                defenses.create(f"{form}({text})")
    with pytest.raises(ConfigError, match="amplitude is -1"):
        defenses.create("aaa-sine(amplitude=-1)")
    with pytest.raises(ConfigError, match="no calibration images"):
        AAALinear(temperature="tuned")(Scores(), NOTHING, 0)
