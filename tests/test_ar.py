"""AR: patterns follow their recurrence, and each class's filter knows its own from all others."""

import pytest
import torch

from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.norms import lp_norm
from bench.protection import protected_rows
from bench.protocols import Job
from bench.rng import SampleRng
from defenses.ar import MARGIN, AutoRegressive, _steady, find_processes, patterns, run

SHAPE = (3, 12, 10)


def grey(count: int, classes: int = 10) -> Dataset:
    """Mid-grey images, so that nothing is cut off."""
    train = Split(torch.full((count, *SHAPE), 128, dtype=torch.uint8), torch.arange(count) % classes)
    empty = train.subset(slice(0))
    return Dataset("grey", tuple(map(str, range(classes))), train, empty, empty)


def responses(processes: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The l2 norms (n, K) of what each class's filters make of ``delta`` (n, C, H, W)."""
    filters = processes.flatten(2).clone()
    filters[..., -1] = -1
    windows = delta.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
    return torch.einsum("kca,nchwa->nkchw", filters, windows).flatten(2).norm(dim=2)


@pytest.fixture(scope="module")
def processes() -> torch.Tensor:
    return find_processes(10, SHAPE, seed=0)


def test_the_recurrence_is_that_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 3, 7, 6, generator=generator, dtype=torch.float64)
    processes = torch.randn(2, 3, 3, 3, generator=generator, dtype=torch.float64) / 4
    processes[..., 2, 2] = 0
    expected = start.clone()
    for sample in range(2):
        for channel in range(3):
            for y in range(2, 7):
                for x in range(2, 6):
                    window = expected[sample, channel, y - 2 : y + 1, x - 2 : x + 1]
                    terms = [window[i, j] * processes[sample, channel, i, j] for i in range(3) for j in range(3)]
                    expected[sample, channel, y, x] = sum(terms[:-1])
    torch.testing.assert_close(run(processes, start), expected, rtol=1e-12, atol=1e-12)


def test_coefficients_sum_to_one_and_patterns_do_not_grow(processes):
    assert processes.shape == (10, 3, 3, 3)
    assert (processes[..., 2, 2] == 0).all()
    assert (processes.sum(dim=(2, 3)) - 1).abs().max() < 1e-9
    made = patterns(processes.repeat(20, 1, 1, 1), SHAPE, SampleRng.create(1, torch.arange(200), "test"))
    loudness = made.reshape(20, 10, 3, -1).square().mean(dim=(0, 3)).sqrt()
    assert (loudness < 2).all()  # at most 1 on the starts that they were chosen on


def test_a_filter_is_silent_on_its_own_patterns_alone(processes):
    labels = torch.arange(100) % 10
    made = patterns(processes[labels], SHAPE, SampleRng.create(1, torch.arange(100), "test"))
    made /= made.flatten(1).norm(dim=1)[:, None, None, None]
    found = responses(processes, made)
    own = torch.zeros_like(found, dtype=torch.bool).scatter(1, labels[:, None], True)
    assert found[own].max() < 1e-12
    assert found[~own].min() > 0.02


def test_the_choice_sets_classes_further_apart_than_chance(processes):
    def least(chosen: torch.Tensor) -> float:
        labels = torch.arange(200) % 10
        made = patterns(chosen[labels], SHAPE, SampleRng.create(1, torch.arange(200), "test"))
        found = responses(chosen, made / made.flatten(1).norm(dim=1)[:, None, None, None])
        mean = found.view(20, 10, 10).mean(dim=0)
        return float((mean + 9 * torch.eye(10)).min())

    drawn, _ = _steady(SampleRng.create(9, torch.arange(1000), "test"), SHAPE)
    unchosen = [group.view(10, 3, 3, 3) for group in drawn[:150].split(30)]
    assert least(processes) > max(map(least, unchosen))


def test_released_patterns_still_name_their_class(processes):
    data = grey(100)
    released = AutoRegressive()(data, Job())
    delta = (released.images.double() - 128) / 255
    assert (responses(processes, delta).argmin(1) == data.train.labels).all()
    size = lp_norm(delta, "l2")
    assert (size <= 1.0).all()
    assert (size > 0.99).all()


def test_a_sample_does_not_see_the_others():
    data = grey(60)
    rows = protected_rows(data.train, 0.4, Job(seed=4))
    part, whole = (AutoRegressive(share=share)(data, Job(seed=4)).images for share in (0.4, 1.0))
    assert torch.equal(part[rows], whole[rows])
    assert (part != 128).flatten(1).any(dim=1).sum() == len(rows)
    assert len(whole.unique(dim=0)) == 60  # a random start for each
    assert not torch.equal(AutoRegressive()(data, Job(seed=5)).images, whole)


def test_the_random_start_is_cut_off():
    made = patterns(torch.zeros(1, 3, 3, 3).double(), SHAPE, SampleRng.create(0, torch.arange(1), "test"))
    assert MARGIN >= 2
    assert made.shape == (1, *SHAPE)
    assert (made == 0).all()  # coefficients of zero leave nothing but the start


def test_impossible_parameters_are_refused():
    for eps in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="an l2 radius"):
            AutoRegressive(eps=eps)
