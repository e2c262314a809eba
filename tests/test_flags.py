"""Red flags: each fires on the one fault it is named for, and not where a figure stays inside the noise."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.errors import StoreError
from bench.oracle import NEVER
from bench.report.flags import flags, write_flags
from bench.report.standings import tables
from bench.results.store import Row
from bench.threat import Threat
from tests.rows import defends, learner, row
from tests.test_cli import MODEL, bench

LEVELS = 8 / 255


def at_queries(
    hits: Sequence[int], attack: str, defense: str = "d", *, access: Any = "scores", budget: int = 100,
    eps: float = LEVELS, **fields: Any,
) -> Row:  # fmt: skip
    return row(hits, defense, attack, threat=Threat("linf", eps, access, budget), **fields)


def met(attack: str, left: int, defense: str = "d", *, n: int = 100, at: int = 5, **settings: Any) -> Row:
    """A row of ``n`` samples of which the last ``left`` stand; the others fell at query ``at``."""
    return at_queries([at] * (n - left) + [NEVER] * left, attack, defense, **settings)


def labels(attack: str, left: int, defense: str = "d", **settings: Any) -> Row:
    return met(attack, left, defense, access="labels", **settings)


def recorded(before: Row, **columns: Any) -> Row:
    """``before`` with more columns, or others."""
    return Row(before.cell, before.records.assign(**columns), before.shards)


def unlasting(count: int, left: int, n: int = 100) -> Row:
    """A row in which the first ``count`` hits fail when re-evaluated."""
    plain = met("square", left, n=n)
    return recorded(plain, final_pred=plain.records["final_pred"].where(np.arange(n) >= count, 0))


def cascade(to_square: int, n: int) -> Row:
    """A row of attacks that took turns: 30 samples fell to the first, and ``to_square`` to the last."""
    fell_to = ["apgd-ce"] * 30 + ["square"] * to_square + [""] * (n - 30 - to_square)
    return recorded(met("autoattack", n - 30 - to_square, n=n, access="gradients"), fell_to=fell_to)


def found(before: Row, fired: bool) -> Row:
    """``before`` with one finding of the audit."""
    finding = {"flag": "trend-reversal", "fired": fired, "evidence": "they go the other way"}
    return Row(before.cell, before.records, tuple(replace(shard, findings=(finding,)) for shard in before.shards))


def draws(before: Row) -> Row:
    """``before``, of a random defense."""
    (part,) = before.cell.defense
    return Row(replace(before.cell, defense=(replace(part, traits=("random",)),)), before.records, before.shards)


def chain(before: Row, *parts: str) -> Row:
    cell = replace(before.cell, defense=tuple(defends(part) for part in parts))
    return Row(cell, before.records, before.shards)


def fired(rows: Sequence[Row], elsewhere: Sequence[Row] = ()) -> list[tuple[str, str]]:
    return [(flag.defense, flag.flag) for flag in flags(rows, elsewhere)]


def late(stood: int, fell: int, defense: str) -> Row:
    """``stood`` samples stand after a tenth of the queries; ``fell`` of them fall later."""
    return met("square", stood - fell, defense, n=stood, at=50)


def confused(gain: int, idle: int, room: int = 40, n: int = 100, attack: str = "rays") -> list[Row]:
    """A defense that gains so many samples against Square, and so many where labels take ``room`` undefended."""
    return [
        met("square", n - room, n=n), met("square", n - room - gain, "none", n=n),
        labels(attack, n - room + idle, n=n), labels(attack, n - room, "none", n=n),
    ]  # fmt: skip


def predicted(right: int, n: int = 1000, classes: int = 10) -> Row:
    """A row of ``n`` samples in equal classes; ``right`` are right when clean, the others evenly wrong."""
    y = np.arange(n) % classes
    off = 1 + np.arange(n) // classes % (classes - 1)
    clean_pred = np.where(np.arange(n) >= n - right, y, (y + off) % classes)
    return recorded(met("square", right, n=n, at=0), y=y, clean_pred=clean_pred, final_pred=clean_pred)


# Of 100 samples, 8 against none are significant (exact two-sided p = 2 / 2^8), 7 are not.
PLANTED = {
    "invalid-answers": [met("square", 90, invalid=True)],
    "constraint-violation": [recorded(met("square", 90), ball_violation=2e-5)],
    "hits-do-not-hold": [unlasting(8, 80)],
    "search-is-blind": [met("square", 90, final_wrong=range(92, 100))],
    "labels-beat-scores": [met("square", 90), labels("rays", 82)],
    "transfer-beats-queries": [met("square", 90), labels("rays", 91), labels("transfer", 82, at=1)],
    "queries-beat-gradients": [met("pgd", 90, access="gradients"), labels("rays", 80)],
    "queries-beat-gradients by transfer": [met("pgd", 90, access="gradients"), labels("transfer", 80, at=1)],
    "square-beats-gradients": [cascade(2, n=500)],
    "noise-beats-attacks": [met("square", 90), labels("noise", 89)],
    "survives-any-radius": [met("square", 5, eps=0.5)],
    "budget-does-not-help": [late(100, 12, "d"), late(100, 50, "none")],
    "other-tactic-wins": [
        met("square", 90), met("simba", 80), met("square", 50, "none"), met("simba", 45, "none"),
    ],
    "confuses-queries": confused(11, 1),
    "trend-reversal": [found(met("square", 90), True)],
    "explained-by-chance": [predicted(150)],  # as after normalising twice
}  # fmt: skip


@pytest.mark.parametrize("flag", PLANTED)
def test_a_planted_fault_fires_its_flag_and_no_other(flag):
    assert fired(PLANTED[flag]) == [("d", flag.partition(" ")[0])]


NEAR_MISSES = {
    "valid": [met("square", 90, invalid=False)],
    "rounding": [recorded(met("square", 90), ball_violation=1e-5, box_violation=9e-6)],
    "7 hits do not hold": [unlasting(7, 80)],
    "7 fall unseen": [met("square", 90, final_wrong=range(93, 100))],
    "1 point falls unseen": [met("square", 900, n=1000, final_wrong=range(990, 1000))],
    "minimum-norm examples fall unseen": [recorded(labels("rays", 90, final_wrong=range(100)), best_distance=0.1)],
    "hits of 2 points do not hold": [unlasting(20, 800, n=1000)],
    "8 hits do not hold, and 8 others fall": [recorded(met("square", 50), final_pred=[0] * 8 + [1] * 50 + [0] * 42)],
    "labels lead by 7": [met("square", 90), labels("rays", 83)],
    "labels lead by 1 point": [met("square", 900, n=1000), labels("rays", 890, n=1000)],
    "labels lead, with more queries": [met("square", 90), labels("rays", 60, at=150, budget=1000)],
    "labels lead on samples of their own": [
        met("square", 80, n=80), at_queries([NEVER] * 80 + [5] * 20, "rays", access="labels"),
    ],
    "labels lead together": [
        met("square", 100), labels("rays", 95), at_queries([NEVER] * 95 + [5] * 5, "boundary", access="labels"),
    ],
    "labels lead one score attack of two": [met("square", 90), met("simba", 80), labels("rays", 80)],
    "labels lead gradients by 7": [met("pgd", 90, access="gradients"), labels("rays", 83)],
    "labels lead a single step": [met("fgsm", 90, access="gradients"), labels("rays", 80)],
    "transfer leads white-box of a trained network": [
        met("pgd", 90, "pgd-at", access="gradients"), labels("transfer", 80, "pgd-at"),
    ],
    "Square takes 0.2 points": [cascade(1, n=500)],
    "transfer leads by 7": [met("square", 90), labels("transfer", 83, at=1)],
    "transfer leads undefended": [met("square", 90, "none"), labels("transfer", 50, "none")],
    "transfer leads where training defends": [met("square", 90, "pgd-at"), labels("transfer", 50, "pgd-at")],
    "noise leads by 0.2 points": [met("square", 90, n=500), labels("noise", 89, n=500)],
    "noise leads where answers are random": [draws(met("square", 90)), draws(labels("noise", 50))],
    "noise leads transfer": [labels("transfer", 90), labels("noise", 50)],
    "noise leads, with more queries": [met("square", 90), labels("noise", 50, at=150, budget=1000)],
    "4 samples survive": [met("square", 4, eps=0.5)],
    "a small radius": [met("square", 90, eps=0.49)],
    "one attack of two leaves some": [met("square", 90, eps=0.5), met("simba", 0, eps=0.5)],
    "controls leave some": [labels("noise", 90, eps=0.5), labels("transfer", 90, eps=0.5)],
    "the budget takes over a quarter": [late(100, 13, "d"), late(100, 50, "none")],
    "the budget takes none of few": [late(20, 0, "d"), late(20, 5, "none")],
    "the budget of labels takes none": [labels("rays", 100), labels("rays", 50, "none", at=50)],
    "the budget takes none where training defends": [late(100, 0, "pgd-at"), late(100, 50, "none")],
    "another tactic leads by 7": [
        met("square", 90), met("simba", 83), met("square", 50, "none"), met("simba", 50, "none"),
    ],
    "another tactic leads by 2 points": [
        met("square", 900, n=1000), met("simba", 880, n=1000),
        met("square", 500, "none", n=1000), met("simba", 500, "none", n=1000),
    ],
    "another tactic leads undefended": [
        met("square", 90), met("simba", 80), met("square", 50, "none"), met("simba", 44, "none"),
    ],
    "another tactic is sooner undefended": [
        met("square", 90), met("simba", 80), met("square", 0, "none", at=8), met("simba", 0, "none", at=4),
    ],
    "another tactic leads another than Square": [
        met("nes", 90), met("simba", 80), met("nes", 50, "none"), met("simba", 50, "none"),
    ],
    "10 points against scores": confused(10, 0),
    "2 points against labels": confused(20, 2),
    "6 of 50 against scores": confused(6, 0, n=50, room=20),
    "labels take little undefended": confused(20, 0, room=10),
    "no gain against noise": confused(20, 0, attack="noise"),
    "a fifth of ten classes is right": [predicted(210)],
    "three quarters of two classes are right": [predicted(750, classes=2)],
    "none of few is right": [predicted(0, n=19)],
    "nothing found": [found(met("square", 90), False)],
    "learners and failures": [learner(9, 10, "d"), row([], "d", asked=4, error="boom")],
}  # fmt: skip


@pytest.mark.parametrize("rows", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_what_stays_inside_the_noise_fires_nothing(rows):
    assert fired(rows) == []


@pytest.mark.parametrize("rows", [[predicted(100)], [predicted(530, classes=2)], [predicted(3, n=20)],
                                  [recorded(predicted(100), clean_pred=3)]])  # fmt: skip
def test_what_chance_explains_is_said(rows):
    assert fired(rows) == [("d", "explained-by-chance")]


class TestRadii:
    def at(self, eps: float, left: int, attack: str = "square", **settings: Any) -> Row:
        return met(attack, left, eps=eps, **settings)

    def test_a_larger_radius_that_leaves_more_is_a_flag_of_its_table(self):
        rows = [self.at(0.1, 50), self.at(0.15, 58)]
        assert fired(rows[1:], rows) == [("d", "radius-does-not-help")]
        assert fired(rows[:1], rows) == []
        shown = {table.title: [flag.flag for flag in table.flags] for table in tables(rows)}
        assert shown == {"digits · cnn · linf 0.1": [], "digits · cnn · linf 0.15": ["radius-does-not-help"]}

    @pytest.mark.parametrize(
        "smaller",
        [
            {"left": 51},  # 7 fewer are no more than noise
            {"attack": "simba"},
            {"seed": 1},
            {"data_hash": "other"},
            {"quantise": True},
            {"numerics": "plain"},
            {"access": "labels", "budget": 4},  # nothing has fallen so soon
        ],
        ids=str,
    )
    def test_other_cells_are_no_measure(self, smaller):
        assert fired([self.at(0.15, 58)], [self.at(0.1, **{"left": 50, **smaller})]) == []

    def test_1_point_more_is_no_effect(self):
        assert fired([self.at(0.15, 510, n=1000)], [self.at(0.1, 500, n=1000)]) == []


class TestWhoIsCompared:
    def test_rows_of_one_seed_compare_and_the_lowest_shows(self):
        rows = [met("square", 90), labels("rays", 80, seed=1)]
        assert fired(rows) == [], "another seed may be another network"
        (flag,) = flags([*rows, met("square", 95, seed=1)])
        assert flag.evidence == "rays leaves 80.0 %, score attacks 95.0 % at 100 queries (n=100, p=6e-05), seed 1"
        (flag,) = flags([*rows, met("square", 95, seed=1), labels("rays", 81)])
        assert "seed" not in flag.evidence

    def test_the_twin_of_a_chain_is_the_chain_without_its_output_defense(self):
        defended = chain(late(100, 0, "d"), "pgd-at", "rnd")
        assert fired([defended, late(100, 50, "none")]) == []
        assert fired([defended, late(100, 50, "pgd-at")]) == [("pgd-at + rnd", "budget-does-not-help")]

    def test_an_unknown_defense_is_taken_to_act_on_outputs(self):
        assert fired([late(100, 0, "gone.py:D"), late(100, 50, "none")]) == [("gone.py:D", "budget-does-not-help")]

    def test_a_twin_with_another_budget_counts_up_to_the_smaller(self):
        defended, twin = late(100, 0, "d"), met("square", 100, "none", budget=40)
        assert fired([defended, twin]) == [], "nothing has happened by query 40"
        later = met("square", 0, "none", at=50, budget=1000)
        assert fired([defended, twin, later]) == [("d", "budget-does-not-help")], "of two twins, the larger"

    def test_a_schedule_that_follows_the_budget_compares_at_equal_budgets_only(self):
        defended = met("square", 100, traits=("rescaled",))
        other, same = (met("square", 0, "none", at=50, budget=budget, traits=("rescaled",)) for budget in (1000, 100))
        assert fired([defended, other]) == []
        assert fired([defended, same]) == [("d", "budget-does-not-help")]

    def test_late_queries_count_on_the_samples_that_both_have_met(self):
        defended = at_queries([NEVER] * 20 + [50] * 80, "square")
        assert fired([defended, late(20, 20, "none")]) == [("d", "budget-does-not-help")]

    def test_the_widest_effect_is_the_evidence(self):
        (flag,) = flags([met("square", 90), labels("boundary", 70), labels("rays", 80)])
        assert flag.evidence.startswith("boundary leaves 70.0 %, score attacks 90.0 %")

    def test_each_finding_shows_once(self):
        assert fired([found(met("square", 90), True), found(met("simba", 90), True)]) == [("d", "trend-reversal")]

    def test_invalid_answers_count_samples_not_rows(self):
        (flag,) = flags([met("square", 50, invalid=True), met("simba", 50, invalid=True)])
        assert flag.evidence.startswith("100 attacked samples")


MIRROR = '''
"""A defense that tells the class as it is and mirrors how sure it is: close to the boundary it looks surest."""
import torch

class Mirror:
    stage, random, version, paper = "output", False, 1, ""

    def __call__(self, model, calibration, seed):
        return Mirrored(model)

class Mirrored(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        z = self.model(x)
        (first, second), labels = z.topk(2).values.T, z.argmax(dim=1, keepdim=True)
        return z.scatter(1, labels, (second + 10 / (1 + first - second))[:, None])
'''


def test_a_planted_defense_shows_its_flags_in_the_table_and_in_the_file(tmp_path: Path):
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "mirror.py").write_text(MIRROR)
    out, mirror = tmp_path / "out", f"{tmp_path / 'mirror.py'}:Mirror"
    ended = bench(
        "run", "--dataset", "digits", "--n", 100, "--model", f"{tmp_path / 'model.py'}:Means",
        "--defense", "none", "--defense", mirror, "--attack", "square", "--attack", "transfer",
        "--eps", 0.15, "--queries", 100, "--out", out,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    kept = json.loads((out / "flags.json").read_text())
    (defense,) = {flag["defense"] for flag in kept}  # the undefended model shows none
    assert defense.startswith("mirror.py:Mirror #")
    assert {flag["flag"] for flag in kept} == {
        "trend-reversal", "transfer-beats-queries", "budget-does-not-help", "confuses-queries",
    }  # fmt: skip
    for flag in kept:
        assert f"- {flag['defense']}: **{flag['flag']}**. {flag['evidence']}." in ended.out


def test_a_folder_in_the_place_of_the_file_is_one_line(tmp_path):
    (tmp_path / "flags.json").mkdir()
    with pytest.raises(StoreError, match=r"cannot write .*flags\.json"):
        write_flags(tmp_path / "flags.json", [])
