"""How many samples an attack works on at once: what that saves, that no record shows it, and where it may not be."""

from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from bench.measure.pipeline import Pipeline
from bench.tracks import Tools
from bench.tracks.asking import ROOM, at_once, measure
from tests.test_runner import grid

BATCH, SAMPLES = 8, 24
CPU = torch.device("cpu")


class Deaf:
    """Wants to hear of no progress."""

    def epochs(self, done, total): ...
    def queries(self, first, settled): ...


@contextmanager
def counted(task):
    """The sizes of all forwards inside of the network of ``task``."""
    sizes, kind = [], type(task.build())

    def note(module, given, answer):
        if type(module) is kind:
            sizes.append(len(answer))

    handle = register_module_forward_hook(note)
    try:
        yield sizes
    finally:
        handle.remove()


def measured(task, shards, networks):
    """The records of ``task``, from shards of so many samples, and the sizes of the forwards that they took."""
    tools = Tools(Pipeline(networks, CPU, BATCH), lambda task, target: ({}, []), BATCH)
    tools.pipeline.train(task, lambda done, total: None)
    tables = []
    with counted(task) as sizes:
        for first in range(1, 1 + SAMPLES, shards):  # the first sample brings probes with it
            with measure(task, range(first, first + shards), tools, Deaf()) as found:
                tables.append(found.records)
    return pd.concat(tables, ignore_index=True), sizes


@pytest.mark.parametrize(
    ("attack", "defense"),
    [
        ("square", "none"), ("square", "unig(variant=stateless)"), ("nes(q=2)", "rnd(sigma=0.1)"), ("rays", "none"),
        ("autoquery", "aaa-linear"),
    ],
)  # fmt: skip
def test_records_are_the_same_and_forwards_fuller(attack, defense, trained):
    (task,) = grid(attack=[attack], defense=[defense], n=1 + SAMPLES, queries=30, eps=0.5, numerics="plain")
    apart, few = measured(task, BATCH, trained)
    together, full = measured(task, SAMPLES, trained)
    exact = ["sample_id", "first_hit", "forwards", "final_pred", "fell_to", "invalid", "unconfirmed"]
    assert together[exact].equals(apart[exact])
    assert (together["first_hit"] > 0).any()  # somebody fell to a query
    assert max(full) <= BATCH
    assert len(full) < len(few)


@pytest.mark.parametrize(
    ("settings", "samples"),
    [
        ({}, ROOM // 64),
        ({"defense": ["unig(variant=as-released)"]}, BATCH),  # a batch of it sees itself
        ({"defense": ["blacklight"]}, BATCH),  # and this one what came before
        ({"attack": ["pgd"]}, BATCH),
        ({"attack": ["transfer"]}, BATCH),
    ],
)
def test_samples_that_bear_on_each_other_and_gradients_take_a_forward_at_once(settings, samples):
    (task,) = grid(**{"attack": ["square"], "defense": ["none"]} | settings)
    assert at_once(task, SAMPLES, BATCH) == samples


def test_of_large_images_no_more_than_a_forward_takes_are_attacked_at_once():
    (task,) = grid(attack=["square"], defense=["none"])
    assert at_once(task, SAMPLES, 2 * ROOM) == 2 * ROOM
