"""The audit: a defense broken in one way fires the flags of that way and no other; a plain network fires none."""

import json
import random
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from statistics import median

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from bench.losses import margin
from bench.measure.audit import audit, confirm
from bench.measure.beside_twin import sawtooth
from bench.measure.finding import Finding
from bench.measure.probe import Probe
from bench.oracle.served import ServedModel
from bench.rng import SampleRng
from bench.threat import Threat
from tests.problems import Noisy

N, SHAPE, CLASSES = 80, (3, 10, 10), 6
LINF = Threat("linf", 8 / 255, "scores", 100)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(512, CLASSES)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


class Scaled(nn.Module):
    """Margins of a few units, as trained networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()
        self.register_buffer("centre", self.layers(torch.full((1, *SHAPE), 0.5)))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * (self.layers(x) - self.centre)


NETWORK = Scaled().eval()


def sure_images() -> tuple[Tensor, Tensor]:
    """The surest N of many images, in grey levels, so that small changes leave their classes."""
    x = torch.randint(256, (8 * N, *SHAPE), generator=torch.Generator().manual_seed(1)) / 255
    y = NETWORK(x).argmax(dim=1)
    surest = margin(NETWORK(x), y).argsort(descending=True)[:N]
    return x[surest], y[surest]


X, Y = sure_images()


class Wrapped(nn.Module):
    """Break ``edit`` in front of, or behind, the network."""

    def __init__(self, model: nn.Module = NETWORK) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(self.before(x)))

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, z: Tensor) -> Tensor:
        return z


class HiddenNoise(Wrapped):
    def after(self, z):
        return z + 0.01 * torch.randn_like(z)


class LoudNoise(Wrapped):
    def after(self, z):
        return z + margin(z, z.argmax(dim=1))[:, None] * torch.randn_like(z) / 3


class OwnGenerator(Wrapped):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def after(self, z):
        return z + 0.01 * torch.randn(z.shape, generator=self.generator)


class NumpyNoise(Wrapped):
    def after(self, z):
        return z + 0.01 * torch.from_numpy(np.random.standard_normal(z.shape)).to(z)  # noqa: NPY002


class SystemNoise(Wrapped):
    def after(self, z):
        seed = random.SystemRandom().randrange(2**31)
        return z + 0.01 * torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))


class MixedRows(Wrapped):
    def after(self, z):
        return z + 0.1 * z.roll(1, dims=0)


class BatchMean(Wrapped):
    def after(self, z):
        return z - 0.5 * z.mean(dim=0)


class Counting(Wrapped):
    queries = 0

    def forward(self, x):
        self.queries += 1
        z = super().forward(x)
        return z + 1e-3 * self.queries * torch.arange(CLASSES)


class Cached(Wrapped):
    """Remembers one image: whoever asks for something near it again is refused an honest answer."""

    seen: Tensor | None = None

    def forward(self, x):
        z = super().forward(x)
        if self.seen is not None:
            near = (x - self.seen).flatten(1).norm(dim=1) < 0.1
            z = torch.where(near[:, None], z.roll(1, dims=1), z)
        self.seen = x[:1]
        return z


class Softmax(Wrapped):
    def after(self, z):
        return z.softmax(dim=1)


class OneDecimal(Wrapped):
    def after(self, z):
        return (z * 10).round() / 10


class Tied(Wrapped):
    def after(self, z):
        return z.minimum(z.topk(2, dim=1).values[:, 1:])


class EightLevels(Wrapped):
    def before(self, x):
        return (x * 15).round() / 15


class EightBit(Wrapped):
    def before(self, x):
        return (x * 255).round() / 255


class AdamInForward(Wrapped):
    def after(self, z):
        shift = nn.Parameter(torch.zeros_like(z))
        optimiser = torch.optim.Adam([shift], lr=1e-3)
        with torch.enable_grad():
            (z.detach() + shift).square().sum().backward()
        optimiser.step()
        return z + shift.detach()


class GradInForward(Wrapped):
    def before(self, x):
        with torch.enable_grad():
            copy = x.detach().requires_grad_()
            (slope,) = grad(self.model(copy).amax(dim=1).sum(), copy)
        return x + 1e-3 * slope.sign()


class WatchesGradients(Wrapped):
    def after(self, z):
        return z + torch.arange(CLASSES) * 0.1 * torch.is_grad_enabled()


class WatchesImage(Wrapped):
    def forward(self, x):
        return super().forward(x) + torch.arange(CLASSES) * 0.1 * x.requires_grad


class Mirrored(Wrapped):
    """The margin of the best two mirrored inside intervals of 1, like AAA."""

    def after(self, z):
        best, second = z.topk(2, dim=1).values.split(1, dim=1)
        lead = best - second
        target = 2 * lead.floor() + 1 - lead
        return z + (z == best) * (target - lead)


class TrainMode(Wrapped):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(CLASSES, affine=False)
        self.train()

    def after(self, z):
        return z + 0.1 * self.norm(z) if len(z) > 1 else z


class HarmlessTrainMode(Wrapped):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.0)
        self.train()


class CountingBuffer(Wrapped):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def after(self, z):
        self.calls += 1
        return z


class Invalid(Wrapped):
    def after(self, z):
        return torch.where(z[:, :1] > z[:, 1:2], torch.nan, z)


class Huge(Wrapped):
    def after(self, z):
        return z * 1e4


class OtherClasses(Wrapped):
    def after(self, z):
        return z.roll(1, dims=1)


class MovesImages(Wrapped):
    def before(self, x):
        shown = x.clone()
        x.zero_()
        return shown


class RefusesGradients(Wrapped):
    def before(self, x):
        if torch.is_grad_enabled():
            raise RuntimeError("no gradients here")
        return x


BROKEN = {
    Wrapped: set(),
    HiddenNoise: {"random-outputs", "unkeyed-randomness"},
    LoudNoise: {"random-outputs", "first-hit-inflation", "unkeyed-randomness"},
    OwnGenerator: {"random-outputs", "unkeyed-randomness"},
    NumpyNoise: {"random-outputs", "unkeyed-randomness"},
    SystemNoise: {"random-outputs", "unkeyed-randomness"},
    MixedRows: {"batch-coupling"},
    BatchMean: {"batch-coupling"},
    Counting: {"state"},
    Cached: {"state"},
    Softmax: {"softmax-outputs"},
    OneDecimal: {"repeated-margins"},
    Tied: {"tied-scores", "repeated-margins", "changes-predictions"},  # a tie goes to the first class
    EightLevels: {"coarse-inputs", "rounded-inputs"},
    EightBit: {"rounded-inputs"},
    AdamInForward: {"inference-optimisation"},
    GradInForward: {"inference-optimisation"},
    WatchesGradients: {"introspection"},
    WatchesImage: {"introspection"},
    Mirrored: {"trend-reversal"},
    TrainMode: {"training-mode", "changed-weights", "batch-coupling"},
    HarmlessTrainMode: {"training-mode"},
    CountingBuffer: {"changed-weights"},
    Invalid: {"invalid-outputs"},
    Huge: {"saturated-scores"},
    OtherClasses: {"changes-predictions"},
    MovesImages: {"written-inputs"},
    RefusesGradients: {"failed-probes"},
}


def findings(module: nn.Module, *, random: bool = False, threat: Threat = LINF, declared=()) -> list[Finding]:
    module = module if module.training else module.eval()
    return audit(ServedModel(module, random), ServedModel(NETWORK), X, Y, threat, 0, declared)


def fired(found: list[Finding]) -> set[str]:
    return {finding.flag for finding in found if finding.fired}


def build(broken: type[nn.Module]) -> nn.Module:
    module = broken()
    return module if "TrainMode" in broken.__name__ else module.eval()


@cache
def found_in(broken: type[nn.Module]) -> list[Finding]:
    return findings(build(broken))


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_defense_fires_its_flags_and_no_other(broken):
    found = found_in(broken)
    assert fired(found) == BROKEN[broken], "\n".join(finding.evidence for finding in found if finding.fired)


def test_a_probe_that_fails_is_a_finding_and_the_others_are_there():
    found = {finding.flag: finding for finding in found_in(RefusesGradients)}
    assert found["failed-probes"].statistic == 1
    assert found["failed-probes"].evidence == "probes that failed: introspection (RuntimeError: no gradients here)"
    assert {finding.flag for finding in found_in(Wrapped)} - set(found) == {"introspection"}


def test_a_model_that_answers_once_is_a_finding():
    class Once(Wrapped):
        asked = 0

        def before(self, x):
            Once.asked += 1
            if Once.asked > 1:
                raise SystemExit("closed")
            return x

    (finding,) = findings(Once())
    assert (finding.flag, finding.fired) == ("failed-probes", True)
    assert "SystemExit: closed" in finding.evidence


@pytest.mark.parametrize("answer", [
    lambda z: torch.nn.functional.one_hot(z.argmax(1), CLASSES).float(), lambda z: z + 1e9, lambda z: z[:, :1],
], ids=["one-hot", "far from zero", "one class"])  # fmt: skip
def test_extreme_scores_are_probed_to_the_end(answer):
    class Extreme(nn.Module):
        def forward(self, x):
            return answer(NETWORK(x))

    served, y = ServedModel(Extreme().eval()), answer(NETWORK(X)).argmax(1)
    found = {finding.flag: finding for finding in audit(served, served, X, y, LINF, 0, ())}
    assert not found["failed-probes"].fired, found["failed-probes"].evidence
    json.dumps([asdict(finding) for finding in found.values()], allow_nan=False)


class TestRandomness:
    def test_noise_that_no_stream_controls_is_seen_where_randomness_is_declared(self):
        class Global(nn.Module):
            def forward(self, x, rng):
                return NETWORK(x) + 0.01 * torch.randn(len(x), CLASSES)

        kept = fired(findings(Noisy(NETWORK, 0.01), random=True, declared={"random"}))
        loose = findings(Global().eval(), random=True, declared={"random"})
        assert "unkeyed-randomness" not in kept
        assert "unkeyed-randomness" in fired(loose)

    @pytest.mark.parametrize("sigma", [0.01, 0.3, 2.0])
    def test_declared_noise_of_any_size_is_nothing_but_random(self, sigma):
        found = findings(Noisy(NETWORK, sigma).eval(), random=True)
        assert fired(found) - {"first-hit-inflation", "changes-predictions"} == {"random-outputs"}
        assert confirm(found, {"random"}) == []

    def test_noise_that_no_stream_and_no_seed_controls_reverses_few_moves(self):
        class Loud(Wrapped):
            def after(self, z):
                seed = random.SystemRandom().randrange(2**31)
                return z + 0.3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))

        found = {finding.flag: finding for finding in findings(Loud().eval())}
        # Moves are far below the noise; a share of 7 % passes two standard errors of 4 draws on one side. There are 80
        # of them (20 images, the larger half of 8 moves): a binomial deviation of 2.9 %, and neighbours share a point.
        assert found["trend-reversal"].statistic < 0.07 + 6 * 0.029
        assert not found["trend-reversal"].fired
        assert not found["batch-coupling"].fired
        assert not found["state"].fired

    def test_first_hits_of_noise_follow_from_its_rate(self):
        class Flips(nn.Module):
            """A wrong answer with probability 1/20, for each image by itself."""

            def forward(self, x: Tensor, rng: SampleRng) -> Tensor:
                z = NETWORK(x)
                return torch.where(rng.uniform(1) < 0.05, z.roll(1, dims=1), z)

        found = {finding.flag: finding for finding in findings(Flips(), random=True)}
        expected = 1 - 0.95**16
        deviation = (expected * (1 - expected) / N) ** 0.5
        assert abs(found["first-hit-inflation"].statistic - expected) < 4 * deviation

    def test_the_global_generators_go_on_as_if_nothing_had_been_drawn(self):
        def draw():
            return torch.rand(1).item(), random.random(), float(np.random.random())  # noqa: NPY002

        def seed():
            torch.manual_seed(7), random.seed(7), np.random.seed(7)  # noqa: NPY002

        seed()
        expected = draw()
        seed()
        findings(build(NumpyNoise))
        findings(build(HiddenNoise))
        assert draw() == expected


class TestTrend:
    def test_the_share_is_what_a_loop_over_images_counts(self):
        module = build(Mirrored)
        (finding,) = [finding for finding in found_in(Mirrored) if finding.flag == "trend-reversal"]
        probe = Probe(ServedModel(module), ServedModel(NETWORK), X, Y, LINF, 0)
        points = [X, *probe.path(X, probe.rows)]
        moves = []
        for image in range(N):
            for before, after in pairwise(points):
                one, two = (
                    [float(margin(model(point[image : image + 1]), Y[image : image + 1])) for point in (before, after)]
                    for model in (NETWORK, module)
                )
                moves.append((one[1] - one[0], two[1] - two[0]))
        middle = sorted(abs(real) for real, _ in moves)[(len(moves) - 1) // 2]
        large = [real * shown < 0 for real, shown in moves if abs(real) > middle]
        assert finding.statistic == pytest.approx(sum(large) / len(large), abs=1 / len(large))  # a tie at the median
        assert f"of {len(large)} moves" in finding.evidence

    @pytest.mark.parametrize("threat", [LINF, Threat("l2", 0.5, "scores", 9), Threat("linf", 0.0, "scores", 9)])
    def test_paths_stay_in_the_ball_and_differ_by_one_window(self, threat):
        probe = Probe(ServedModel(NETWORK), ServedModel(NETWORK), X, Y, threat, 0)
        before = X
        for candidate in probe.path(X, probe.rows):
            delta = (candidate - X).flatten(1)
            size = delta.norm(dim=1) if threat.norm == "l2" else delta.abs().amax(dim=1)
            assert size.max() <= threat.eps + 1e-6
            assert candidate.min() >= 0
            assert candidate.max() <= 1
            if threat.norm == "linf":
                assert ((candidate != before).any(dim=1).flatten(1).sum(dim=1) <= 4).all()  # 2 x 2 of 10 x 10
            before = candidate

    def test_reversal_is_seen_in_l2_and_nothing_where_the_ball_is_a_point(self):
        assert fired(findings(build(Mirrored), threat=Threat("l2", 0.5, "scores", 9))) == {"trend-reversal"}
        assert fired(findings(build(Mirrored), threat=Threat("linf", 0.0, "scores", 9))) == set()

    @pytest.mark.parametrize("tau", [1.5, 4.0])
    def test_a_sawtooth_has_its_period(self, tau):
        real = torch.rand(3000, generator=torch.Generator().manual_seed(2)) * 12
        shown = 2 * (real / tau).floor() * tau + tau - real - (real / tau).floor() * tau  # mirrored in [0, tau]
        jumps = sawtooth(real, shown.abs() + 1e-3)
        period = median(after - before for before, after in pairwise(jumps))
        assert period == pytest.approx(tau, abs=12 / 96)

    def test_a_straight_line_and_noise_are_no_sawtooth(self):
        real = torch.rand(3000, generator=torch.Generator().manual_seed(2)) * 12
        assert sawtooth(real, 0.1 + real / 3) == []
        assert sawtooth(real, real + torch.randn(3000, generator=torch.Generator().manual_seed(3))) == []


class TestAudit:
    def test_it_leaves_the_model_as_it_was(self):
        module = build(Counting)
        findings(module)
        assert module.queries == 0
        buffered = build(CountingBuffer)
        findings(buffered)
        assert buffered.calls == 0

    def test_one_seed_one_audit_as_plain_values(self):
        audits = found_in(HiddenNoise), findings(build(HiddenNoise))
        first, again = ([asdict(finding) for finding in found] for found in audits)
        assert first == again
        assert json.loads(json.dumps(first, allow_nan=False)) == first
        assert len({finding["flag"] for finding in first}) == len(first)

    @pytest.mark.parametrize(("broken", "most"), [(Wrapped, 29), (HiddenNoise, 52)])
    def test_the_cost_is_what_the_docstring_says(self, broken, most):
        count = {"model": 0, "twin": 0}

        class Counted(nn.Module):
            def __init__(self, model: nn.Module, name: str) -> None:
                super().__init__()
                self.model, self.name = model, name

            def forward(self, x: Tensor) -> Tensor:
                count[self.name] += len(x)
                return self.model(x)

        x, y = X.repeat(4, 1, 1, 1)[:256], Y.repeat(4)[:256]
        model, twin = Counted(build(broken), "model").eval(), Counted(NETWORK, "twin").eval()
        audit(ServedModel(model), ServedModel(twin), x, y, LINF, 0, ())
        assert count["model"] <= most * 256
        assert count["twin"] <= (16 if broken is Wrapped else 10) * 256

    def test_a_declared_optimisation_fires_unseen(self):
        assert fired(findings(build(Wrapped), declared={"inference-optimisation"})) == {"inference-optimisation"}

    def test_backward_passes_outside_a_prediction_are_nobodys(self):
        findings(build(AdamInForward))
        leaf = torch.ones(2, requires_grad=True)
        leaf.sum().backward()  # the engine is the one of torch again
        assert torch.autograd._engine_run_backward is torch.autograd.graph._engine_run_backward
        assert leaf.grad is not None


class TestConfirm:
    @pytest.mark.parametrize(
        ("broken", "trait"),
        [(HiddenNoise, "random"), (MixedRows, "batch-dependent"), (Counting, "stateful")],
    )
    def test_an_undeclared_trait_is_a_contradiction_and_a_declared_one_is_not(self, broken, trait):
        found = found_in(broken)
        (contradiction,) = confirm(found, ())
        assert contradiction.flag == f"undeclared-{trait}"
        assert contradiction.fired
        assert confirm(found, {trait}) == []

    def test_other_flags_contradict_nothing(self):
        assert confirm(found_in(Softmax), ()) == []
