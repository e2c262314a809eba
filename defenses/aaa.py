"""AAA: edit the logits so that a score-based attacker is led the wrong way, and keep every decision.

The margin of the two best classes is mirrored inside intervals of fixed width, so a step towards the decision boundary
is reported as a step away from it; the confidence is kept at a calibrated value. Chen et al., NeurIPS 2022.

A form of AAA is a target for the margin, :func:`linear_target` or :func:`sine_target`; everything else is the same.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from bench.dataset import Split
from bench.errors import ConfigError
from bench.metrics import calibration_error
from bench.protocols import Stage
from bench.ranges import Positive
from bench.registry import added, defenses
from bench.rng import SampleRng
from defenses.logits import calibration_logits, straight_through

Target = Callable[[Tensor], Tensor]  # margins (B,) >= 0 to the margins to report
Solver = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # logits, target margin, target confidence, beta
SolverName = Literal["exact", "as-released"]

RESIDUE = 1e-7  # mass that the classes below the runner-up keep at an end of their range, which they never reach
TIE_BREAK = 4e-6  # between levelled classes: on an exact tie the gradient of the margin would be shared out among them
RELEASED_BATCH = 128  # rows in the mean of the released loss; a constant, so that a row never depends on the others
TEMPERATURES = [10 ** (step / 100) for step in range(-100, 101)]


@dataclass(frozen=True, kw_only=True)
class _AAA(ABC):
    """What all forms of AAA share; a form adds its target and the parameters of that.

    ``interval`` is the paper's tau and ``calibration_weight`` its beta. ``temperature`` divides the logits that the
    confidence is taken from; ``"tuned"`` picks the one that minimises the calibration error on the calibration split
    (:func:`tuned_temperature`).

    ``offset`` moves the borders of the intervals from multiples of ``interval`` up to ``offset`` + multiples, with one
    shorter interval from 0 to ``offset``. ``"secret"`` draws it for each deployment from the cell's seed, uniformly
    below ``interval``: an attacker who knows the method and ``interval`` can undo a mirror only where its centre is
    known. It is ours, not the paper's; queries can still find the borders out.
    """

    solver: SolverName = "exact"
    interval: float = 6.0
    calibration_weight: float = 5.0
    temperature: float | Literal["tuned"] = 1.0
    offset: float | Literal["secret"] = added(0.0)

    stage: ClassVar[Stage] = "output"
    random: ClassVar[bool] = False
    outside: ClassVar[bool] = True
    paper: ClassVar[str] = "Chen et al., NeurIPS 2022, arXiv:2205.12134"

    @property
    def version(self) -> int:
        """Of what the solver answers: the released one was 1 while its targets were worked out in float64."""
        return 2 if self.solver == "as-released" else 1

    def __post_init__(self) -> None:
        for name, value in {"interval": self.interval, "temperature": self.temperature}.items():
            if value != "tuned" and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; it is positive and finite")
        if not 0 <= self.calibration_weight < math.inf:
            raise ConfigError(f"calibration_weight is {self.calibration_weight}; it is zero or more")
        if self.offset != "secret" and not 0 <= self.offset < self.interval:
            raise ConfigError(
                f"offset is {self.offset}; intervals repeat, so give 0 or more and less than interval {self.interval}, "
                "or 'secret'"
            )

    @abstractmethod
    def target(self, offset: float) -> Target:
        """What margins are reported as, with the intervals moved by ``offset``."""

    def __call__(self, model: nn.Module, calibration: Split, seed: int) -> nn.Module:
        """The served model: deterministic, each row by itself, in the dtype and on the device of the logits.

        Raises:
            ConfigError: the temperature is to be tuned and there are no calibration images.
        """
        offset = secret_offset(seed, self.interval) if self.offset == "secret" else self.offset
        target = self.target(offset)
        temperature = self.temperature
        if temperature == "tuned":
            logits, labels = calibration_logits(model, calibration)
            temperature = tuned_temperature(logits, labels, target, self.calibration_weight)
        return PostProcessed(model, target, self.solver, self.calibration_weight, temperature).eval()


@defenses("aaa-linear")
@dataclass(frozen=True, kw_only=True)
class AAALinear(_AAA):
    """Report margins mirrored in the middle of each interval, at a calibrated confidence.

    ``interval`` is the paper's tau, ``step`` its alpha (1 mirrors exactly) and ``calibration_weight`` its beta.
    ``temperature`` divides the logits that the confidence is taken from; ``"tuned"`` picks the one that minimises the
    calibration error on the calibration split. ``offset`` moves the borders of the intervals, ``"secret"`` by a draw
    from the cell's seed, so that knowing ``interval`` is not enough to mirror the margins back.

    The ``exact`` solver minimises the loss in closed form and never changes a decision; ``as-released`` is the authors'
    100 steps of Adam, which may swap the classes of a small margin. The released class has tau 4, its command line 6.

    Gradients pass through the edit as if it were the identity (BPDA, Athalye et al., 2018), so a white-box attack meets
    the network itself and not a masked gradient.

    Source:
        Chen et al., NeurIPS 2022, arXiv:2205.12134, and the released ``victim.py``.

    Raises:
        ConfigError: an interval or a temperature that is not positive, a negative weight, or an offset beyond one
            interval.
    """

    step: Positive = 1.0

    knows: ClassVar[tuple[str, ...]] = ("decode-square",)

    def target(self, offset: float) -> Target:
        """:func:`linear_target` with the parameters of this form."""
        return partial(linear_target, interval=self.interval, step=self.step, offset=offset)


@defenses("aaa-sine")
@dataclass(frozen=True, kw_only=True)
class AAASine(_AAA):
    """Report margins bent by a sine in each interval, with none of the jumps of ``aaa-linear``.

    ``amplitude`` is the sine's, in intervals; the authors' code fixes it at 0.7. All else is as in ``aaa-linear``.

    Source:
        Chen et al., NeurIPS 2022, arXiv:2205.12134, and the released ``victim.py``.

    Raises:
        ConfigError: as ``aaa-linear``, or a negative amplitude.
    """

    amplitude: float = 0.7

    knows: ClassVar[tuple[str, ...]] = ("switch-square",)  # its margins are not to be found again

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.amplitude < math.inf:
            raise ConfigError(f"amplitude is {self.amplitude}; it is zero (margins as they are) or more, and finite")

    def target(self, offset: float) -> Target:
        """:func:`sine_target` with the parameters of this form."""
        return partial(sine_target, interval=self.interval, amplitude=self.amplitude, offset=offset)


class PostProcessed(nn.Module):
    """``model`` with its logits edited by ``solver`` towards a target margin and confidence."""

    def __init__(
        self, model: nn.Module, target: Target, solver: SolverName, calibration_weight: float, temperature: float
    ) -> None:
        super().__init__()
        self.model, self.target, self.solver = model, target, solver
        self.calibration_weight, self.temperature = calibration_weight, temperature

    def forward(self, x: Tensor) -> Tensor:
        """The edited logits (B, K) of ``x`` (B, C, H, W), with the gradient of the unedited ones."""
        logits: Tensor = self.model(x)
        plain = logits.detach()
        dtype = PRECISION[self.solver]
        margin = self.target(top_margin(plain, dtype))
        confidence = top_confidence(plain, self.temperature, dtype)
        edited = SOLVERS[self.solver](plain, margin, confidence, self.calibration_weight)
        return straight_through(logits, edited)


def attractor(margin: Tensor, interval: float, offset: float = 0.0) -> Tensor:
    """The centre of the interval [offset + k tau, offset + (k + 1) tau) or [0, offset) that holds each margin.

    The first interval ends at 0 because no margin is below: around a centre there, targets would be negative, all
    reported as the smallest margin, and the plateau would give the offset away. The released code, without an offset,
    rounds half to even, which gives the same except exactly at a border.
    """
    centre = offset + (torch.floor((margin - offset) / interval) + 0.5) * interval
    return centre.where(margin >= offset, offset / 2)


def linear_target(margin: Tensor, interval: float, step: float, offset: float = 0.0) -> Tensor:
    """Each margin on the other side of its attractor, ``step`` times as far from it."""
    centre = attractor(margin, interval, offset)
    return centre - step * (margin - centre)


def sine_target(margin: Tensor, interval: float, amplitude: float, offset: float = 0.0) -> Tensor:
    """Each margin less ``amplitude`` intervals times the sine of its phase around its attractor.

    It is continuous: at a border the sine is 0. With the released amplitude 0.7 the target falls, with slopes down to
    1 - 1.4 pi, for the 42.7 % of an interval around the attractor, rises elsewhere, with slopes up to 1 + 1.4 pi, and
    is positive for every positive margin.
    """
    width = torch.full_like(margin, interval).where(margin >= offset, offset)  # of the interval that holds the margin
    phase = 2 * math.pi * (margin - attractor(margin, interval, offset)) / width
    return margin - amplitude * width * torch.sin(phase)


def secret_offset(seed: int, interval: float) -> float:
    """An offset for the deployment of ``seed``, uniform on [0, interval)."""
    return interval * SampleRng.create(seed, torch.zeros(1, dtype=torch.int64), "aaa offset").uniform().item()


def top_margin(logits: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The lead (B,), worked out in ``dtype``, of the largest logit over the second, whatever the classes."""
    best, second = logits.to(dtype).topk(2, dim=1).values.unbind(1)
    return best - second


def top_confidence(logits: Tensor, temperature: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """The probability (B,), worked out in ``dtype``, of the best class under softmax of ``logits / temperature``."""
    return (logits.to(dtype) / temperature).softmax(dim=1).amax(dim=1)


def exact_optimum(
    target_margin: Tensor, target_confidence: Tensor, beta: float, classes: int
) -> tuple[Tensor, Tensor]:
    """The margin M >= 0 and top confidence p, of those that logits can have, which minimise the loss of AAA.

    The loss is ``|M - m*| + beta |p - p*|``. With K classes a margin M goes with the confidences from
    ``sigmoid(M - ln(K - 1))``, all others level, to ``sigmoid(M)``, all but the runner-up gone. If p* is not between
    the two, M may move to meet it. The violation falls with slope ``beta sigmoid'``, and sigmoid' is unimodal, so
    moving pays off only where ``beta sigmoid' > 1``, which is within Mc of the centre of its sigmoid. The minimum is at
    the start, at the end of that zone, or where the violation ends: three candidates.

    Args:
        target_margin, target_confidence: m* and p*, (B,) float64; m* may be negative, then no M attains it.

    Returns:
        M and p, (B,) float64.
    """
    level = math.log(classes - 1)
    zone = 2 * math.atanh(math.sqrt(1 - 4 / beta)) if beta > 4 else 0.0
    odds = target_confidence.logit()  # infinite where p* rounds to 1
    start = target_margin.clamp(min=0)
    up = torch.maximum(start, odds.clamp(max=zone))
    down = torch.minimum(start, (odds + level).clamp(min=max(level - zone, 0)))
    candidates = torch.stack((start, up, down), dim=1)  # (B, 3)
    low, high = (candidates - level).sigmoid(), candidates.sigmoid()
    confidence = target_confidence[:, None].clamp(low, high)
    # Up to what no M can mend, -min(m*, 0): added to a large one, differences would round away.
    loss = (candidates - start[:, None]).abs() + beta * (confidence - target_confidence[:, None]).abs()
    best = loss.argmin(dim=1, keepdim=True)
    return candidates.gather(1, best).squeeze(1), confidence.gather(1, best).squeeze(1)


def exact_logits(logits: Tensor, target_margin: Tensor, target_confidence: Tensor, beta: float) -> Tensor:
    """Log-probabilities that minimise the loss of AAA among those that keep the best class.

    The other classes keep their order: one that lay e below the runner-up comes to lie ``max(0, e - b)`` below it,
    where b (:func:`_water_level`) gives the wanted confidence. Log-probabilities, since a level of the logits beyond
    them would tell an attacker about the unedited ones.

    Args:
        logits: (B, K), K >= 2.
        target_margin, target_confidence: (B,) float64.

    Returns:
        (B, K) in the dtype of ``logits``; the best class, the first where several are, leads strictly.
    """
    classes = logits.shape[1]
    margin, confidence = exact_optimum(target_margin, target_confidence, beta, classes)
    margin = margin.clamp(min=_smallest_margin(logits.dtype, classes))
    ranked, order = logits.double().sort(dim=1, descending=True, stable=True)
    behind = ranked[:, 1:2] - ranked[:, 2:]  # (B, K - 2), e of all but the best two, ascending
    # Confidence p is sum_j exp(-d_j) = (1 - p) / p over the distances d_j to the best; the runner-up has exp(-margin).
    # In log-odds, and within what this margin allows, nothing overflows.
    slack = (margin - confidence.logit()).clamp(0, math.log(classes - 1))
    apart = TIE_BREAK * torch.arange(1, classes - 1, device=logits.device).double().clamp(max=50)  # (K - 2,)
    if classes > 2:
        fullest = apart.neg().exp().sum() - RESIDUE
        mass = slack.expm1().clamp(min=RESIDUE).minimum(fullest)  # of the others, relative to the runner-up
        behind = (behind - _water_level(behind, apart, mass)[:, None]).clamp(min=0) + apart
    distance = torch.cat((torch.zeros_like(ranked[:, :2]), behind), dim=1)
    distance[:, 1:] += margin[:, None]
    log_probabilities = -distance - distance.neg().logsumexp(dim=1, keepdim=True)
    return torch.empty_like(logits).scatter_(1, order, log_probabilities.to(logits.dtype))


def adam_logits(
    logits: Tensor, target_margin: Tensor, target_confidence: Tensor, beta: float, steps: int = 100, lr: float = 0.1
) -> Tensor:
    """The logits after some steps of Adam (betas 0.9 and 0.999, eps 1e-8) on the loss of AAA, as the authors solve it.

    The margin is that of the two largest entries at each step, whatever their classes, and the confidence that of the
    class that was best at first; decisions of a small margin may therefore change. The gradient is written out, so no
    graph is needed.

    Args:
        logits: (B, K), K >= 2.
        target_margin, target_confidence: (B,).

    Returns:
        (B, K) in the dtype of ``logits``, worked out in float32.
    """
    z = logits.float()
    best = z.argmax(dim=1, keepdim=True)
    margin, confidence = target_margin.to(z)[:, None], target_confidence.to(z)[:, None]
    mean, square = torch.zeros_like(z), torch.zeros_like(z)
    for step in range(1, steps + 1):
        gradient = _loss_gradient(z, best, margin, confidence, beta) / RELEASED_BATCH
        mean = mean.lerp(gradient, 1 - 0.9)
        square = (0.999 * square).addcmul_(gradient, gradient, value=1 - 0.999)
        scale = square.sqrt().div_(math.sqrt(1 - 0.999**step)).add_(1e-8)
        z = z.addcdiv(mean, scale, value=-lr / (1 - 0.9**step))
    return z.to(logits.dtype)


SOLVERS: dict[SolverName, Solver] = {"exact": exact_logits, "as-released": adam_logits}
# In which targets are worked out. At temperature 1 the released solver starts on its target confidence, to the last
# bit of float32; a target that was rounded otherwise starts it off with a full step of Adam in that direction.
PRECISION: dict[SolverName, torch.dtype] = {"exact": torch.float64, "as-released": torch.float32}


def tuned_temperature(logits: Tensor, labels: Tensor, target: Target, beta: float) -> float:
    """The temperature, from 0.1 to 10, at which the exact solver's confidence is best calibrated.

    The confidence of the exact solver has a closed form (:func:`exact_optimum`), so nothing is solved.

    Args:
        logits, labels: (N, K) and (N,) of held-out samples.
    """
    margin, correct = target(top_margin(logits)), logits.argmax(dim=1) == labels

    def error(temperature: float) -> float:
        wanted = top_confidence(logits, temperature)
        _, confidence = exact_optimum(margin, wanted, beta, logits.shape[1])
        return calibration_error(confidence.double().cpu().numpy(), correct.cpu().numpy())

    return min(TEMPERATURES, key=error)


def _water_level(behind: Tensor, apart: Tensor, mass: Tensor) -> Tensor:
    """The shift b (B,) with ``sum_j w_j exp(-max(0, e_j - b)) = mass``; negative where all must move away.

    Args:
        behind: e (B, n), n >= 1, ascending and non-negative.
        apart: -ln of the weights w, (n,).
        mass: (B,), above 0 and below the sum of the weights.
    """
    tail = (behind + apart).neg().flip(1).logcumsumexp(dim=1).flip(1)  # ln of sum over i >= j of w_i exp(-e_i)
    weights = apart.neg().exp()
    covered = weights.cumsum(0) - weights  # (n,), of the classes before each
    # With the first k classes level the sum is covered_k + exp(b + tail_k); at b = e_j it is what ``filled`` holds.
    filled = covered + (behind + tail).exp()  # (B, n), rises along each row
    level = (filled <= mass[:, None]).sum(dim=1, keepdim=True).clamp(max=behind.shape[1] - 1)
    return (mass - covered[level.squeeze(1)]).log() - tail.gather(1, level).squeeze(1)


def _smallest_margin(dtype: torch.dtype, classes: int) -> float:
    """A margin of log-probabilities that survives their rounding to ``dtype``: the best is at least -ln K."""
    return max(1e-6, 2 * torch.finfo(dtype).eps * (1 + math.log(classes)))


def _loss_gradient(z: Tensor, best: Tensor, margin: Tensor, confidence: Tensor, beta: float) -> Tensor:
    """The gradient (B, K) of ``|margin(z) - margin| + beta |softmax(z)_best - confidence|`` by ``z``."""
    p = z.softmax(dim=1)
    p_best = p.gather(1, best)
    pull = beta * (p_best - confidence).sign() * p_best  # (B, 1)
    gradient = -pull * p
    gradient.scatter_add_(1, best, pull)
    values, classes = z.topk(2, dim=1)
    push = (values[:, :1] - values[:, 1:] - margin).sign()
    return gradient.scatter_add_(1, classes, torch.cat((push, -push), dim=1))
