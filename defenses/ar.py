"""AR: the perturbation of each class follows a recurrence of its own, which one convolution can tell."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.dataset import Dataset, Split, grey_levels
from bench.errors import ConfigError
from bench.protection import check_share, fitting, merge, protected_rows
from bench.protocols import Job, Stage
from bench.registry import defenses
from bench.rng import SampleRng
from bench.threat import Norm
from defenses.levels import moved, rounded_in_l2

WINDOW = 3   # a value follows from the eight others of the 3x3 window that it closes
MARGIN = 4   # rows and columns that are generated first and cut off, with the random start among them
POOL = 4     # groups of processes to choose from, for each class
DRAWS = 256  # processes drawn at a time, for images of CIFAR's size
TRIALS = 4   # starts on which a process is judged
CHUNK = 256  # images at a time, to stay in the cache


@defenses("ar")
@dataclass(frozen=True, kw_only=True)
class AutoRegressive:
    """Add to each image a pattern that its class's autoregressive processes run on from a random start.

    A class has one process for each channel: eight coefficients that sum to 1, by which the last value of every 3x3
    window follows from the other eight. The image's own random numbers fill the first two rows and columns. The pattern
    is scaled to an l2 norm of ``eps``, rounded to whole grey levels inside the ball, and cut off at black and white.
    ``share`` is the part of the training images to protect.

    The processes are drawn at random and chosen so that their patterns differ: see :func:`find_processes`. The authors
    ship the ones that they found by a threshold on the filters' responses; here a greedy choice takes its place, which
    suits any number of classes and any size.

    Source:
        Sandoval-Segura et al., NeurIPS 2022, arXiv:2206.03693, and the released ``autoregressive.py``: window, sum
        of coefficients, margin, l2 norm 1.0 for CIFAR.

    Raises:
        ConfigError: an eps that is not positive and finite, or a share outside (0, 1].
    """

    eps: float = 1.0
    share: float = 1.0

    stage: ClassVar[Stage] = "data"
    norm: ClassVar[Norm] = "l2"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Sandoval-Segura et al., NeurIPS 2022, arXiv:2206.03693"

    def __post_init__(self) -> None:
        if not 0 < self.eps < float("inf"):
            raise ConfigError(f"eps is {self.eps:g}; an l2 radius on the pixel scale is positive and finite")
        check_share(self.share)

    def __call__(self, data: Dataset, job: Job) -> Split:
        """The training split to release, uint8; processes and starts are drawn from ``job.seed``."""
        rows, images = protected_rows(data.train, self.share, job), grey_levels(data.train)
        processes = find_processes(len(data.classes), data.train.shape, job.seed)
        streams, labels = SampleRng.create(job.seed, rows, "ar start"), data.train.labels[rows]
        protected = []
        for chunk in torch.arange(len(rows)).split(fitting(CHUNK, data.train.shape)):
            delta = patterns(processes[labels[chunk]], data.train.shape, streams[chunk])
            delta *= 255 * self.eps / delta.flatten(1).norm(dim=1)[:, None, None, None]
            protected.append(moved(images[rows[chunk]], rounded_in_l2(delta, self.eps)))
        return merge(data.train, rows, torch.cat(protected))


def patterns(processes: Tensor, shape: tuple[int, int, int], rng: SampleRng) -> Tensor:
    """What ``processes`` (n, C, 3, 3) make of random starts: (n, C, H, W) float64, neither scaled nor rounded."""
    channels, height, width = shape
    start = rng.normal(channels, height + MARGIN, width + MARGIN).double()
    return run(processes, start)[..., MARGIN:, MARGIN:].contiguous()


def find_processes(classes: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """Coefficients (classes, C, 3, 3) float64, 0 in the last place, whose patterns are told apart by their filters.

    The filter of a process has -1 in the last place, and so answers 0 to its own patterns. From ``POOL`` random groups
    of C processes for each class, the first one is taken, and then again and again the one whose least response to
    and from those taken is the largest. A response is the l2 norm of what the filters of one make of the patterns of
    the other, over that of the patterns. Processes that grow louder than their start are not drawn.
    """
    channels, draws = shape[0], min(DRAWS, fitting(16 * DRAWS, shape))  # few of a draw are kept: see _steady
    drawn, grams, step = list[Tensor](), list[Tensor](), 0
    while sum(map(len, drawn)) < POOL * classes * channels:
        ids = torch.arange(step * draws, (step + 1) * draws)
        processes, gram = _steady(SampleRng.create(seed, ids, "ar process"), shape)
        drawn.append(processes)
        grams.append(gram)
        step += 1
    pool = torch.cat(drawn)[: POOL * classes * channels].view(-1, channels, WINDOW, WINDOW)
    gram = torch.cat(grams)[: len(pool) * channels].view(-1, channels, WINDOW**2, WINDOW**2)
    filters = pool.flatten(2).clone()                                                    # (P, C, 9)
    filters[..., -1] = -1
    energy = gram[..., -1, -1].sum(dim=1)                                                # (P,)
    response = torch.einsum("ica,jcab,icb->ij", filters, gram, filters) / energy         # squared, of i to j
    mutual = torch.minimum(response, response.T)
    taken, nearest = [0], mutual[0]
    while len(taken) < classes:
        taken.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, mutual[taken[-1]])
    return pool[taken]


def _steady(rng: SampleRng, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Those of random processes (n, 3, 3) that do not grow, and the second moments (n, 9, 9) of their windows."""
    processes = rng.normal(1, WINDOW, WINDOW).double()
    processes[..., -1, -1] = 0
    processes /= processes.sum(dim=(2, 3), keepdim=True)
    trials = patterns(processes.expand(-1, TRIALS, -1, -1), (TRIALS, *shape[1:]), rng.fork("start"))
    steady = trials.square().mean(dim=(1, 2, 3)) <= 1  # the variance of the start; NaN is not
    grams = [_moments(part) for part in trials[steady].split(fitting(DRAWS, shape))]
    return processes[steady, 0], torch.cat(grams)


def _moments(trials: Tensor) -> Tensor:
    """The second moments (n, 9, 9) of all 3x3 windows of ``trials`` (n, T, H, W)."""
    windows = trials.unfold(2, WINDOW, 1).unfold(3, WINDOW, 1).flatten(4).flatten(1, 3)  # (n, T H W, 9)
    return windows.transpose(1, 2) @ windows


def run(processes: Tensor, start: Tensor) -> Tensor:
    """``start`` (n, C, H, W) with everything but its first two rows and columns replaced by the recurrence.

    ``processes`` (n, C, 3, 3) hold the coefficients, and 0 in the last place. Values on one antidiagonal do not depend
    on each other, so they are found together.
    """
    signal = start.flatten(0, 1).permute(1, 2, 0).clone(memory_format=torch.contiguous_format)  # (H, W, n C), one block
    coefficients = processes.flatten(0, 1).permute(1, 2, 0).contiguous()                        # per place
    height, width = signal.shape[:2]
    before = WINDOW - 1
    for diagonal in range(2 * before, height + width - 1):
        row = torch.arange(max(before, diagonal - width + 1), min(height, diagonal - before + 1))
        column = diagonal - row
        value = torch.zeros_like(signal[row, column])
        for up in range(WINDOW):
            for left in range(WINDOW):
                if up or left:
                    value.addcmul_(coefficients[before - up, before - left], signal[row - up, column - left])
        signal[row, column] = value
    return signal.permute(2, 0, 1).reshape(start.shape)
