"""Equal meaning, equal cell: a default spelt out, or a number spelt otherwise, makes no other cell."""

from dataclasses import replace

import pandas as pd
import pytest

from bench.plan.cell import Cell, Component
from bench.registry import attacks, defenses, describe
from bench.report.compare import duels
from bench.report.selection import Selection
from bench.report.standings import tables
from bench.results.shards import Shard
from bench.results.spelling import Spelling, is_spelt
from bench.results.store import Store
from tests.rows import row
from tests.test_grid import plan


@pytest.mark.parametrize(("text", "short"), [
    ("pgd(steps=40)", "pgd"),
    (" pgd ( rel_step = 2, steps=40.0 )", "pgd"),
    ("pgd(steps=50, rel_step=2.0)", "pgd(steps=50)"),
    ("pgd(rel_step=3.0)", "pgd(rel_step=3)"),
    ("pgd(rel_step=1e0, steps=7)", "pgd(steps=7, rel_step=1)"),
    ("square(p_init=0.30)", "square(p_init=0.3)"),
])
def test_a_component_is_written_in_one_way(text, short):
    assert attacks.shortest(text) == short
    assert attacks.create(short) == attacks.create(text)


def test_radii_are_the_same_as_fractions_of_255():
    spelt = {defenses.shortest(f"pgd-at(eps={eps})") for eps in ("4/255", "0.01568627450980392", "4.0/255")}
    assert spelt == {"pgd-at(eps=4/255)"}


def test_equal_cells_come_once_however_they_are_spelt():
    (task,) = plan(attack=["pgd", "pgd(steps=40)", "pgd(restarts=1, rel_step=2)"], defense=["rnd", "rnd(sigma=0.02)"])
    assert (task.cell.attack.spec, task.cell.defense_name) == ("pgd", "rnd")


def spelt(cell: Cell, **parts: str) -> Cell:
    """``cell`` as an earlier version has kept it: what somebody wrote."""
    named = {"defense": (replace(cell.defense[0], spec=parts.pop("defense")),)} if "defense" in parts else {}
    return replace(cell, **named, **{name: replace(getattr(cell, name), spec=spec) for name, spec in parts.items()})


def records(cell: Cell, start: int, stop: int) -> pd.DataFrame:
    return pd.DataFrame({"sample_id": cell.ids[start:stop], "y": 0, "first_hit": 3, "final_pred": 1, "invalid": False})


def test_a_row_in_other_words_is_found_and_gone_on_with(tmp_path):
    (task,) = plan(attack="pgd", defense="rnd", n=20)
    old = spelt(task.cell, attack="pgd(steps=40)", defense="rnd(sigma=0.02)")
    assert old.key != task.cell.key
    Store(tmp_path).open().save(Shard(old, 0, 10), records(old, 0, 10))
    store = Store(tmp_path)
    assert store.missing(task.cell) == list(range(10, 20))
    store.save(Shard(task.cell, 10, 20), records(task.cell, 10, 20))
    assert store.missing(task.cell) == []
    assert store.settled(Shard(task.cell, 10, 20))[0]
    (read,), damaged = store.rows()
    assert not damaged
    assert read.complete
    assert store.row(task.cell).complete


def test_a_cell_that_is_whole_in_other_words_is_not_run_again(tmp_path):
    (task,) = plan(attack="pgd", n=20)
    Store(tmp_path).open().save(Shard(task.cell, 0, 10), records(task.cell, 0, 10))
    old = spelt(task.cell, attack="pgd(steps=40)")
    Store(tmp_path / "theirs").open().save(Shard(old, 0, 20), records(old, 0, 20))
    assert Store(tmp_path).missing(task.cell) == []
    assert Store(tmp_path).row(task.cell).complete


def test_what_joins_a_folder_takes_its_words(tmp_path):
    """Or the attacks on one defense would stand in two lines of a table, each with a worst case of its own."""
    first, second = (task.cell for task in plan(attack=["pgd", "square"], defense="rnd", n=20))
    old = spelt(first, defense="rnd(sigma=0.02)")
    Store(tmp_path).open().save(Shard(old, 0, 20), records(old, 0, 20))
    store = Store(tmp_path)
    assert store.missing(second) == list(range(20))
    store.save(Shard(second, 0, 20), records(second, 0, 20))
    assert {read.cell.defense_name for read in store.rows()[0]} == {"rnd(sigma=0.02)"}


def test_rows_in_two_spellings_are_shown_in_one(tmp_path):
    first, second = (task.cell for task in plan(attack=["pgd", "square"], defense="rnd", n=20))
    for cell in (spelt(first, defense="rnd(sigma=0.02)"), second, spelt(second, attack="square(p_init=None)")):
        folder = tmp_path / cell.key
        Store(folder).open().save(Shard(cell, 0, 20), records(cell, 0, 20))
    rows, damaged = Store(tmp_path).rows()
    assert not damaged
    assert sorted(read.cell.attack.name for read in rows) == ["pgd", "square"]
    assert len({read.cell.defense_name for read in rows}) == 1


def test_other_parameters_and_code_that_only_knows_itself_stay_apart():
    (cell,) = (task.cell for task in plan(attack="pgd", n=20))
    other = replace(cell, attack=Component("pgd(steps=41)", 2, describe(attacks.create("pgd(steps=41)"))))
    assert other.meaning != cell.meaning
    theirs = [replace(cell, attack=Component(f"mine.py:A(b={b})", "1+ab12", {"c": 1})) for b in (1, 2)]
    bare = [replace(cell, attack=Component(f"pgd(steps={steps})")) for steps in (1, 2)]
    newer = replace(cell, attack=replace(cell.attack, version=3))
    assert len({each.meaning for each in (cell, other, newer, *theirs, *bare)}) == 7
    assert Spelling([cell]).alike(other) == other


def test_fast_and_plain_numbers_share_no_worst_case():
    fast = [row([1, 5, -1, -1], "rnd", attack, numerics="fast") for attack in ("square", "simba")]
    plain = [row([-1, -1, 5, 1], "rnd", attack, numerics="plain") for attack in ("square", "rays")]
    found = tables([*fast, *plain], (100,))
    assert len({table.title for table in found}) == 2
    for table in found:
        worst = next(line for line in table.lines if line.attack.startswith("worst"))
        assert worst.shares["@100"].value == 0.5


@pytest.mark.parametrize(("spec", "params", "text", "same"), [
    ("rnd", {"sigma": 0.02}, "rnd(sigma=0.02)", True),
    ("rnd", {"sigma": 0.02}, "rnd( sigma = 2e-2 )", True),
    ("rnd", {}, "rnd(sigma=0.02)", True),
    ("rnd(sigma=0.02)", {"sigma": 0.02}, "rnd", True),
    ("rnd", {"sigma": 0.02}, "rnd(sigma=0.03)", False),
    ("rnd(sigma=0.03)", {"sigma": 0.03}, "rnd", False),
    ("rnd", {"sigma": 0.01}, "rnd(sigma=0.02)", False),  # as an earlier version had it
    ("rnd", {"sigma": 0.02}, "rnd(what=1)", False),
    ("rnd", {"sigma": 0.02}, "rnd(", False),
    ("mine.py:Mine", {"width": 3}, "a/mine.py:Mine(width=3)", True),
    ("mine.py:Mine(width=4)", {"width": 4}, "mine.py:Mine", False),
])
def test_a_chain_is_known_however_its_defaults_are_written(spec, params, text, same):
    assert is_spelt([Component(spec, params=params)], text, defenses) == same
    after = Component("pgd-at")
    assert is_spelt([after, Component(spec, params=params)], f"pgd-at + {text}", defenses) == same


def test_tables_and_comparisons_know_a_defense_in_other_words():
    rows = [row([1, 2, 3], "rnd", "square"), row([1, 2, 2], "none", "square")]
    (table,) = Selection(defenses=["rnd(sigma=0.02)"], attacks=["square(loss=margin)"]).of(tables(rows))
    assert {line.defense for line in table.lines} == {"rnd"}
    (found,) = duels(rows, "none", "rnd(sigma=0.02)")
    assert (found.a, found.b) == ("none", "rnd")
