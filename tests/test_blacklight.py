"""Blacklight: what is like an earlier query is recognised, what is not is left alone."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bench.errors import ConfigError
from bench.measure.inspection import false_alarms
from bench.oracle.served import ServedModel
from bench.registry import defenses
from bench.report.marks import UNRANKED, marks_of
from bench.rng import SampleRng
from defenses.blacklight import NOTHING, fingerprints
from tests.rows import row

CLASSES = 10
KEY = SampleRng.create(3, torch.zeros(1, dtype=torch.int64), "key").words(20)[0]
SALT = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(9)) * 255


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, CLASSES)).eval()


def served(**parameters: int) -> nn.Module:
    args = ", ".join(f"{name}={value}" for name, value in parameters.items())
    return defenses.create(f"blacklight({args})")(network(), None, 0)


def shared(a: torch.Tensor, b: torch.Tensor) -> int:
    one, other = (set(fingerprints(x[None], SALT, KEY, 50, 50)[0].tolist()) - {NOTHING} for x in (a, b))
    return len(one & other)


def test_a_fingerprint_is_the_largest_of_all_windows_hashed_one_by_one():
    (x,) = images(1)
    salted = [
        (float(v) * 255 + float(s)) % 255
        for v, s in zip(*(y.permute(1, 2, 0).flatten() for y in (x, SALT)), strict=True)
    ]
    values = [int(round(value / 50) * 50) for value in salted]
    wrap = 1 << 64
    hashes = set()
    for start in range(3072 - 20 + 1):
        total = sum(value * (int(k) | 1) for value, k in zip(values[start : start + 20], KEY, strict=True))
        total = (total + wrap // 2) % wrap - wrap // 2
        mixed = (total ^ (total >> 29)) * (int(KEY[0]) | 1)
        hashes.add((mixed + wrap // 2) % wrap - wrap // 2)
    assert fingerprints(x[None], SALT, KEY, 50, 50)[0].tolist() == sorted(hashes, reverse=True)[:50]


def test_an_image_with_few_windows_has_a_short_fingerprint():
    flat = torch.full((1, 3, 32, 32), 0.5)
    assert (fingerprints(flat, torch.zeros(3, 32, 32), KEY, 50, 50)[0] != NOTHING).sum() == 1


def test_the_salt_tells_the_places_of_a_flat_image_apart_and_moves_where_values_round():
    flat = torch.full((1, 3, 32, 32), 0.5)
    assert (fingerprints(flat, SALT, KEY, 50, 50)[0] != NOTHING).all()
    assert shared(flat[0], flat[0] + 1e-4) > 25
    assert shared(flat[0], flat[0] + 40 / 255) <= 1


def test_the_same_image_and_one_that_differs_in_a_square_are_alike_and_strangers_are_not():
    x, stranger = images(2)
    changed = x.clone()
    changed[:, 4:10, 4:10] = 1 - changed[:, 4:10, 4:10]
    assert shared(x, x) == 50
    assert shared(x, changed) > 25
    assert shared(x, stranger) <= 1


def test_what_is_like_an_earlier_query_is_told_what_that_was_told_in_a_batch_and_later():
    x = images(3)
    near = x.clone()
    near[:, :, 0, :4] = 0
    plain, model = network(), served()
    with torch.no_grad():
        first = model(torch.cat((x, near[:1])))
        later = model(near)
        assert torch.equal(first[:3], plain(x))
        assert torch.equal(first[3], first[0])
        assert torch.equal(later, first[:3])
        assert not torch.equal(plain(near), first[:3])


def test_a_walk_of_small_steps_stays_in_the_family_of_its_start():
    (x,) = images(1)
    model, start = served(), None
    for step in range(8):
        x = x.clone()
        x[:, 4 * step : 4 * step + 4] = torch.rand(3, 4, 32, generator=torch.Generator().manual_seed(step))
        with torch.no_grad():
            answer = model(x[None])
        start = answer if start is None else start
        assert torch.equal(answer, start)


def test_false_alarms_are_counted_on_clean_traffic():
    x = images(20)
    streams = SampleRng.create(0, torch.arange(20), "test")
    assert false_alarms(ServedModel(served()), x, streams) == 0
    twice = torch.cat((x[:10], x[:10]))
    assert false_alarms(ServedModel(served()), twice, streams) == 0  # equal images have equal answers
    twice[10:, 0, 0, :8] = 1 - twice[10:, 0, 0, :8]
    assert false_alarms(ServedModel(served()), twice, streams) == 0.5


def test_impossible_parameters_are_one_line():
    with pytest.raises(ConfigError, match="which no two queries can exceed"):
        defenses.create("blacklight(threshold=50)")
    with pytest.raises(ConfigError, match="longer than the 12 values"):
        defenses.create("blacklight")(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), None, 0)(torch.rand(1, 3, 2, 2))


def test_a_memory_is_marked_and_bars_no_rank():
    one = row([-1, 5], "blacklight")
    stated = one.cell.defense[0].__class__("blacklight", traits=("stateful",), stage="output")
    marked = row([-1, 5], "blacklight")
    object.__setattr__(marked.cell, "defense", (stated,))
    assert "stateful" in marks_of(marked) - UNRANKED


@pytest.mark.slow
def test_the_published_figures_of_the_mechanism_hold_on_cifar10():
    """Half a percent of clean images raise a false alarm at most, and nine in ten queries of Square are recognised."""
    from attacks.square import Square
    from bench.data.cifar import Cifar10
    from bench.models import resolve
    from tests.problems import attack_with, referee

    shared_folder = Path(__file__).parents[2] / "shared"
    if not (shared_folder / "data" / "cifar10").is_dir():
        pytest.skip("needs CIFAR-10 beside the checkout")
    test = Cifar10()(shared_folder / "data").test.subset(slice(2000))
    x = test.pixels()
    model = defenses.create("blacklight")(network(), None, 0)
    with torch.no_grad():
        model(x)
    assert 1 - len(model.told) / len(x) <= 0.005
    net = resolve("resnet20(weights=cifar10_resnet20.safetensors)")(10, (3, 32, 32), shared_folder / "models")
    few, y = x[:20], test.labels[:20]
    model = defenses.create("blacklight")(net, None, 0)
    judge = referee(model, few, y, eps=8 / 255, budget=100)
    attack_with(Square(), judge, few, y)
    asked = int(judge.ledger.forwards.sum())
    assert len(model.told) <= 0.1 * asked
